"""`manifest.json`: what was made, from what, by which versions; written last, so a folder that has it is complete.

No clock and nothing of the machine is in it: the same list, responses, configuration and versions give the same
manifest.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from curate.files import digest, file_sha256, fingerprint, made_from


def versions(config: dict[str, Any]) -> dict[str, str]:
    """Of Python and of the packages whose version can change the result; of open_clip if a CLIP was used."""
    packages = ["cliptailor", "pyarrow", "duckdb", "pillow", "opencv-python-headless"]
    if (config.get("measure") or {}).get("clip"):
        packages += ["open_clip_torch", "torch"]
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def manifest(out: Path, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The manifest as JSON-ready data.

    Args:
        out: the dataset folder; its ledger and shards are read whole, for their sha256.
        config: the effective configuration, JSON-ready; `out` is left out: the folder may be moved.
        seed: the build's.
    """
    shards = sorted((out / "shards").glob("*.parquet"))
    paths = [path for shard in shards for path in (shard.with_suffix(".tar"), shard) if path.exists()]
    ledger = out / "ledger.parquet"
    return {
        "versions": versions(config),
        "seed": seed,
        "config": {key: value for key, value in config.items() if key != "out"},
        "made_from": made_from(ledger),
        "fingerprint": fingerprint(digest(ledger), [digest(shard) for shard in shards]),
        "files": {path.relative_to(out).as_posix(): _file(path) for path in [ledger, *paths]},
    }


def _file(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    samples = pq.read_metadata(path.with_suffix(".parquet")).num_rows
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size, "samples": samples}
