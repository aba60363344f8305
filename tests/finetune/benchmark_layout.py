"""CLIP_benchmark's webdataset layout, as its `clip_benchmark_export_wds` writes it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path


def write_benchmark(
    folder: Path, samples: Sequence[tuple[bytes, str]], *, beside: str = "cls", split: str = "test", shards: int = 2
) -> Path:
    """Samples (PNG, label or captions) dealt to so many shards."""
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text(str(shards))
    each = -(-len(samples) // shards)
    for shard in range(shards):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as archive:
            for number, (image, label) in enumerate(samples[shard * each : (shard + 1) * each]):
                for extension, content in (("png", image), (beside, label.encode())):
                    member = tarfile.TarInfo(f"s{shard * each + number:07d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder
