"""OpenAI's own files: which architecture their weights have, read from the weights themselves, without running them.

OpenAI published CLIP as TorchScript archives: a zip of raw tensors, a pickle that says which is which, and code.
`torch.jit.load` runs that code. Here only the tensors are read, through an unpickler that knows nothing else.
The architecture follows from the shapes, as in OpenAI's `build_model`: heads are 64 wide, activations QuickGELU.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import ModelError

if TYPE_CHECKING:
    import torch

NUMBERS = ("input_resolution", "context_length", "vocab_size")  # what OpenAI keeps among the weights
_HEAD_WIDTH = 64
_STRIDE = 32  # of a ResNet, from pixels to the attention pool


def is_openai_archive(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI published CLIP, and not a state dict."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive, by their names in the model, as stored (OpenAI's: float16).

    Raises:
        ModelError: the archive holds anything but modules, tensors and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        data = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if data is None:
            raise ModelError(f"{path}: no data.pkl; not a TorchScript archive")
        root = data.removesuffix("data.pkl")
        try:
            with archive.open(data) as file:
                module = _Unpickler(file, lambda key: archive.read(f"{root}data/{key}")).load()
        except (pickle.UnpicklingError, KeyError, AttributeError, TypeError, IndexError, EOFError) as error:
            raise ModelError(f"{path}: not an archive that only holds weights: {error}") from error
    return dict(_tensors(module))


def architecture(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """open_clip's configuration of the model that these weights, in OpenAI's names, belong to.

    Raises:
        ModelError: they are not those of a CLIP of the paper's kinds.
    """
    try:
        vision = _vit(state) if "visual.proj" in state else _resnet(state)
        width = state["ln_final.weight"].shape[0]
        return {
            "embed_dim": state["text_projection"].shape[1],
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": width,
                "heads": max(width // _HEAD_WIDTH, 1),
                "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
            },
        }
    except KeyError as error:
        raise ModelError(f"not the weights of a CLIP as OpenAI wrote it: no {error.args[0]}") from error


def _vit(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "head_width": _HEAD_WIDTH,
        "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
    }


def _resnet(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * _STRIDE,
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
        "head_width": _HEAD_WIDTH,
        "layers": [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
    }


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


# --- reading an archive without running it ----------------------------------------------------------------------------


class _Module:
    """What a TorchScript class becomes: its attributes, and none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    """Knows modules, tensors and what TorchScript pickles beside them; refuses every other name."""

    def __init__(self, file: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name.endswith("Storage"):
            return name
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("collections", "OrderedDict"): OrderedDict,
        } | {("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")}
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        import torch

        _, storage, key, *_ = pid
        dtype = {
            "FloatStorage": torch.float32,
            "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64,
            "LongStorage": torch.int64,
            "IntStorage": torch.int32,
            "BoolStorage": torch.bool,
        }[storage]
        content = bytearray(self._read(key))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _rebuild(storage: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _tensors(module: _Module, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    import torch

    found: list[tuple[str, torch.Tensor]] = []
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Module):
            found += _tensors(value, f"{prefix}{name}.")
    return found
