"""CLIPs of the Hugging Face hub: which names are ids of it, the folder that an id stands for, and no long silence.

An id becomes a folder in the hub's own cache (`HF_HUB_CACHE`) with the files of a CLIP and no others: weights in one
form, configuration, tokenizer. Without a network the cached files do. What is neither there nor to be had is told
within a second; the hub's own library would try again and again, for most of a minute.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from curate.errors import ModelError

PREFIX = "hf-hub:"
_PATIENCE = 0.7  # seconds in which a hub that can be reached takes a connection
_CONFIGS = ("open_clip_config.json", "config.json")
_SMALL = {
    *_CONFIGS, "preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tokenizer.model", "sentencepiece.bpe.model",
}  # fmt: skip
_OPEN_CLIP_WEIGHTS = (r"open_clip_(pytorch_)?model\.safetensors", r"open_clip_pytorch_model\.(bin|pth)")
TRANSFORMERS_WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")


@cache
def architectures() -> tuple[str, ...]:
    """open_clip's architectures, from the names of its files: importing it takes seconds."""
    spec = find_spec("open_clip")
    folders = spec.submodule_search_locations if spec else None
    found = (path.stem for folder in folders or [] for path in (Path(folder) / "model_configs").glob("*.json"))
    return tuple(sorted(found))


def is_hub_id(name: str) -> bool:
    """Whether a name is an id of the hub: `hf-hub:ID`, or ORG/NAME that is neither a path nor an architecture's name.

    `ViT-B/32` is an architecture, written as OpenAI does; `ViT-B-32/laion2b_s34b_b79k` begins with one.
    """
    if name.startswith(PREFIX):
        return True
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name) or Path(name).exists():
        return False
    known = architectures()
    is_architecture = name.replace("/", "-") in known or name.partition("/")[0] in known
    return not is_architecture and not name.startswith(("ViT-", "RN")) and not name.endswith(".json")


def cached_folder(name: str) -> Path:
    """The folder with the files of an id: downloaded, as far as they are not there yet; offline, what is cached.

    Args:
        name: ID or `hf-hub:ID`; `@REVISION` after it names a branch, a tag or a commit.

    Raises:
        ModelError: there is no such repository, it may not be read, or it is not cached and the hub not reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not can_be_reached():
        return _cached(name, repository, revision or None)
    try:
        info = HfApi().model_info(repository, revision=revision or None)
        wanted = _wanted([file.rfilename for file in info.siblings or []])
        if not {*wanted} & {*_CONFIGS}:
            raise ModelError(f"{name}: the hub's {repository} has no {' and no '.join(_CONFIGS)}: not a CLIP")
        paths = [hf_hub_download(repository, file, revision=revision or None) for file in wanted]
    except GatedRepoError as error:
        raise ModelError(f"{name}: who may read it has to ask on its page; then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: the hub's {repository} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: no folder, no name of a CLIP, and no repository of the hub (or a private one: `hf auth login`)"
        ) from error
    return Path(paths[0]).parent


def _wanted(names: list[str]) -> list[str]:
    """Of a repository's files those that make a CLIP; weights in the first form that there is."""
    patterns = _OPEN_CLIP_WEIGHTS if _CONFIGS[0] in names else TRANSFORMERS_WEIGHTS
    forms = ([name for name in names if re.fullmatch(pattern, name)] for pattern in patterns)
    return [name for name in names if name in _SMALL] + next((form for form in forms if form), [])


def _cached(name: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    for config in _CONFIGS:
        found = try_to_load_from_cache(repository, config, revision=revision)
        if isinstance(found, str) and any(Path(found).parent.glob("*model*.*")):
            return Path(found).parent
    asked = name if name.startswith(PREFIX) else f"{name}: no such folder here, and as an id of the hub"
    raise _unreachable(asked, repository)


def _unreachable(asked: str, repository: str) -> ModelError:
    from huggingface_hub import constants

    return ModelError(
        f"clip {asked}: not in the cache ({constants.HF_HUB_CACHE}) and the hub cannot be reached; "
        f"run `hf download {repository}` where it can and copy the cache, or give a local file"
    )


@contextmanager
def reached(architecture: str, tag: str | None) -> Iterator[None]:
    """Within it open_clip loads the weights of a tag: from the hub, or, if that is not reached, from the cache alone.

    Raises:
        ModelError: they are neither cached nor to be had.
    """
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache

    source = {} if tag is None or Path(tag).exists() else open_clip.get_pretrained_cfg(architecture, tag) or {}
    repository, _, file = str(source.get("hf_hub") or "").rpartition("/")
    if not repository or can_be_reached():
        yield
        return
    file = file or "open_clip_pytorch_model.bin"
    names = [file, f"{Path(file).stem}.safetensors", "open_clip_model.safetensors"]
    if not any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
        raise _unreachable(f"{architecture}, pretrained {tag}", repository)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def can_be_reached() -> bool:
    """Whether the hub, or the proxy before it, takes a connection within `_PATIENCE`; names may hang in DNS, too."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    parts = urlsplit(proxy or constants.ENDPOINT)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    connected = threading.Event()

    def connect() -> None:
        with suppress(OSError), socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE):
            connected.set()

    attempt = threading.Thread(target=connect, daemon=True)  # a daemon: a resolver may not be interrupted
    attempt.start()
    attempt.join(_PATIENCE)
    return connected.is_set()
