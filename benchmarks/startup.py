"""From `finetune fit` to its first step, beside importing torch, lightning and open_clip: CPU and wall seconds.

    python benchmarks/startup.py             median of five
    python benchmarks/startup.py --quick     of two

Both in processes of their own, one thread, in turn. *Import*: `import torch, lightning, open_clip`. *Start*: the
command with a tiny ViT of random weights on 64 pairs, from the start of Python until the first batch is about to go
through the towers: arguments, checks, the CLIP, the index, the plan, Lightning. The evaluation of the untouched CLIP,
which is work and no start-up, is timed apart and taken out (`evaluation_s`). As a plain installation is: without the
packages of S3, which Lightning and TensorBoard import where they find them, and with all modules compiled to bytecode:
a run of each before the first that counts sees to that.

`startup_ratio`: CPU seconds of start over those of import; `startup_ratio_wall`: of wall seconds, which say little on a
machine that does something else too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
}
IMPORT = "import time, json, torch, lightning, open_clip; print(json.dumps({'cpu_s': time.process_time()}))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of each")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fit is not None:
        start(given.fit)
        return
    found: dict[str, list[dict[str, float]]] = {"import": [], "start": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder)
        for number in range(3 if given.quick else 6):
            imported = timed(["-c", IMPORT])
            started = timed([__file__, "--fit", *fit_arguments(folder, folder / f"run{number}")])
            if number:
                found["import"].append(imported)
                found["start"].append(started)
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(f"{platform.machine()}, {os.cpu_count()} cores\n\n| | CPU s | wall s |\n|---|---|---|")
    for name, label in (("import", "import torch, lightning, open_clip"), ("start", "finetune fit, to its first step")):
        print(f"| {label} | {middle[name]['cpu_s']:.2f} | {middle[name]['wall_s']:.2f} |")
    ratio = {key: middle["start"][key] / middle["import"][key] for key in ("cpu_s", "wall_s")}
    evaluation = round(middle["start"]["evaluation_s"], 2)
    figures = {"startup_ratio": round(ratio["cpu_s"], 2), "startup_ratio_wall": round(ratio["wall_s"], 2)}
    print(json.dumps(figures | {"evaluation_s": evaluation}))


def timed(command: list[str]) -> dict[str, float]:
    """What a process says of its CPU time, and the wall time until it says it."""
    started = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "STARTED": str(started)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"wall_s": time.time() - started} | found


def write_dataset(folder: Path) -> None:
    """64 pairs to train on, 16 to validate on."""
    import io

    import numpy as np
    import pyarrow as pa
    from PIL import Image

    from curate.shards import ShardWriter

    (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    random = np.random.default_rng(0)
    for split, size in (("train", 64), ("val", 16)):
        schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
        with ShardWriter(folder / "dataset" / "shards" / f"{split}-00000", schema, made_from="startup") as shard:
            for number in range(size):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(file, "JPEG")
                shard.add({"key": f"{split}{number}", "caption": f"picture {number}"}, file.getvalue(), "jpg")


def fit_arguments(folder: Path, out: Path) -> list[str]:
    given: dict[str, Any] = {
        "out": out,
        "model.clip.name": folder / "tiny.json",
        "model.clip.pretrained": "null",
        "data.dataset": folder / "dataset",
        "data.batch_size": 16,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": "null",
        "trainer.max_steps": 1,
    }
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def start(arguments: list[str]) -> None:
    """Run the command until its first step; say what that took, and end."""
    sys.modules |= dict.fromkeys(("s3fs", "boto3", "botocore"))  # type: ignore[arg-type]  # not to be found
    import finetune.cli

    told: dict[str, float] = {"evaluation_s": 0.0}

    def step(*_: Any) -> None:
        told["cpu_s"] = time.process_time() - told["evaluation_s"]
        told["wall_s"] = time.time() - float(os.environ["STARTED"]) - told.pop("evaluation_wall_s", 0.0)
        print(json.dumps(told), flush=True)
        os._exit(0)

    import finetune.fit as fitting

    made = fitting._callbacks

    def callbacks(*given: Any, **named: Any) -> list[Any]:
        from finetune.callback import EvaluationCallback
        from finetune.module import CLIPModule

        evaluate = EvaluationCallback.evaluate

        def evaluated(self: Any, *of: Any) -> Any:
            cpu, wall = time.process_time(), time.time()
            found = evaluate(self, *of)
            told["evaluation_s"], told["evaluation_wall_s"] = time.process_time() - cpu, time.time() - wall
            return found

        EvaluationCallback.evaluate = evaluated  # type: ignore[method-assign, assignment]
        CLIPModule.training_step = step  # type: ignore[method-assign, assignment]
        return made(*given, **named)

    fitting._callbacks = callbacks
    sys.exit(finetune.cli.main(["fit", *arguments]))


if __name__ == "__main__":
    main()
