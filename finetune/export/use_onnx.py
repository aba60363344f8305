"""What a user of onnxruntime does with an export: python use_onnx.py FOLDER GIVEN OUT.npz.

GIVEN holds pixels.npy and tokens.npy. The graphs take batches of any size: here all at once but the first, and that
alone. Nothing of cliptailor is imported, nor torch: this shows that nothing of them is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

folder, given, out = sys.argv[1:]
found = {}
for tower, name in (("image", "pixels"), ("text", "tokens")):
    session = onnxruntime.InferenceSession(Path(folder, f"{tower}.onnx"), providers=["CPUExecutionProvider"])
    batch = np.load(Path(given, f"{name}.npy"))
    found[tower] = np.concatenate([session.run(None, {name: part})[0] for part in (batch[:1], batch[1:])])
np.savez(out, image=found["image"], text=found["text"])
