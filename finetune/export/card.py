"""README.md of an export: the model card, with the front matter that the Hugging Face hub reads.

What is known of the run is told: the start, the adapter, the data, every figure before and after with its interval.
What only people know (what it is for, what it must not be used for) is asked for.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import yaml

from curate.errors import InputError
from curate.files import write_text
from finetune.config import FitConfig
from finetune.export.formats import Format
from finetune.runs import run_config
from finetune.tables import interval

LIBRARY = {"open_clip": "open_clip", "transformers": "transformers", "onnx": "onnx", "adapter": "peft"}
USE = {
    "open_clip": """
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
""",
    "transformers": """
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("FOLDER"), AutoProcessor.from_pretrained("FOLDER")
# transformers 5 resizes with torchvision; the very pixels of training: CLIPImageProcessorPil.from_pretrained("FOLDER"),
# SiglipImageProcessorPil for a SigLIP. A SigLIP sees its padding: processor(text=…, padding="max_length")
""",
    "onnx": """
import onnxruntime
image = onnxruntime.InferenceSession("FOLDER/image.onnx")  # pixels (B, 3, H, W) → image_embedding (B, D)
text = onnxruntime.InferenceSession("FOLDER/text.onnx")    # tokens (B, L) → text_embedding (B, D)
# Both L2-normalised. Preprocessing and tokenizer: open_clip_config.json, as open_clip reads it.
""",
    "adapter": """
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from curate.clip import load_clip
from finetune.attention import split_attention

model = load_clip(BASE).model
split_attention(model)  # q, k, v and out as linears of their own
inject_adapter_in_model(PeftConfig.from_pretrained("FOLDER"), model)
set_peft_model_state_dict(model, load_file("FOLDER/adapter_model.safetensors"))
""",
}
# peft passes over, without a word, what an adapter has for layers that the model has not.
OPENED = {
    "from finetune.attention import": "from finetune.adapters import open_projections\nfrom finetune.attention import",
    "inject_adapter_in_model(PeftConfig": "open_projections(model)  # the projections as linears too\n"
    "inject_adapter_in_model(PeftConfig",
}


def write_card(
    folder: Path, checkpoint: Path, form: Format, licence: str | None, fingerprint: str | None = None
) -> None:
    """Write README.md. Of a checkpoint that lies in no run only the use, and the weights' fingerprint, are told."""
    try:
        config: FitConfig | None = run_config(checkpoint)
    except InputError:
        config = None
    path = checkpoint.parent.parent / "evaluation.json"
    evaluation = json.loads(path.read_text("utf-8")) if config and path.is_file() else {}
    text = card(
        config,
        _of_checkpoint(evaluation, checkpoint.name, fingerprint),
        checkpoint.name,
        form,
        licence,
        projections=_has_projections(folder),
    )
    if fingerprint:
        text += f"\n## Fingerprint\n\nSHA-256 of the weights (`finetune.runs.model_fingerprint`): `{fingerprint}`\n"
    write_text(folder / "README.md", text)


def _of_checkpoint(evaluation: dict[str, Any], checkpoint: str, fingerprint: str | None) -> dict[str, Any]:
    """The evaluation; of another checkpoint's neither figures nor name, only what is true of the whole run."""
    facts = evaluation.get("facts") or {}
    evaluated = str(facts.get("checkpoint", checkpoint)).split(" ")[0]  # interpolated.ckpt (α = …)
    same_weights = fingerprint is not None and fingerprint == facts.get("fingerprint")
    if same_weights or evaluated.removesuffix(".ckpt") == checkpoint.removesuffix(".ckpt"):
        return evaluation
    return {"evaluated": evaluated, "facts": {**facts, "checkpoint": checkpoint}}


def card(
    config: FitConfig | None,
    evaluation: dict[str, Any],
    checkpoint: str,
    form: Format,
    licence: str | None,
    *,
    projections: bool = False,
) -> str:
    """The text of the card; `projections`: the adapter has some for them."""
    front: dict[str, Any] = {
        "license": licence or "unknown",
        "library_name": LIBRARY[form],
        "tags": ["clip", "cliptailor"],
        "pipeline_tag": "zero-shot-image-classification",
    }
    parts = ["# A CLIP adapted with cliptailor", _use(config, form, projections=projections)]
    if config:
        front["base_model"] = config.model.clip.label
        parts += [_trained(config, evaluation.get("facts") or {}, checkpoint), _figures(evaluation)]
    parts += [INTENDED, LICENCE if licence else f"{LICENCE} None was given (`--license`)."]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"


INTENDED = """
## Intended use

Zero-shot classification and retrieval within the domain it was adapted to. What it is meant for, what it must not be
used for and whom its mistakes would hurt is for those to say who publish it: write it here.

CLIPs carry the biases of the web pairs they were trained on; adapting to a domain does not remove them.
"""
LICENCE = """
## Licence

That of the weights that training started from and of the data binds this model too."""


def _has_projections(folder: Path) -> bool:
    """Whether an adapter was written that is put on projections too (`finetune.adapters.Projection`)."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return False
    from safetensors import safe_open

    with safe_open(path, "np") as weights:
        return any(".linear.lora_" in name for name in weights.keys())  # noqa: SIM118 - no mapping


def _use(config: FitConfig | None, form: Format, *, projections: bool) -> str:
    base = (
        ", ".join(repr(part) for part in (config.model.clip.name, config.model.clip.weights) if part) if config else ""
    )
    code = USE[form].replace("BASE", base or "…")
    for line, with_projections in OPENED.items() if projections else ():
        code = code.replace(line, with_projections)
    return f"## Use\n\n```python{code}```"


def _trained(config: FitConfig, facts: dict[str, Any], checkpoint: str) -> str:
    adapter = config.model.adapter
    how = adapter.variant if adapter.kind == "lora" else adapter.kind
    sources = ", ".join(str(source.path) for source in config.data.trained_on)
    told = {
        "start": config.model.clip.label,
        "trained": how + (f", {', '.join(adapter.lock)} tower locked" if adapter.lock else ""),
        "data": sources + (f" ({facts['train_samples']:,} pairs)" if "train_samples" in facts else ""),
        "steps": facts.get("steps"),
        "checkpoint": facts.get("checkpoint", checkpoint),
        "made with": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("cliptailor", "torch", "open_clip_torch", "peft")
        ),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in told.items() if value is not None)
    return f"## What was trained\n\n| | |\n|---|---|\n{rows}"


def _figures(evaluation: dict[str, Any]) -> str:
    if not evaluation:
        return ""
    if "evaluated" in evaluation:
        return f"## Figures\n\nNone: the run was evaluated with another checkpoint ({evaluation['evaluated']})."
    rows = []
    for metric, after in evaluation["after"].items():
        before, delta = evaluation["before"][metric], evaluation["delta"][metric]
        cells = [metric, f"{after['n']:,}", interval(metric, before), interval(metric, after)]
        rows.append(f"| {' | '.join([*cells, interval(metric, delta, sign='+')])} |")
    return (
        "## Figures\n\nBefore and after, with 95 % intervals (bootstrap; that of the change is paired).\n\n"
        "| metric | n | before | after | change |\n|---|---|---|---|---|\n" + "\n".join(rows)
    )
