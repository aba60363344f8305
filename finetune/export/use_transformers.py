"""What a user of transformers does with an export: python use_transformers.py FOLDER GIVEN OUT.npz.

GIVEN holds *.png and captions.json. Nothing of cliptailor is imported: this shows that nothing of it is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer

try:  # PIL's resize, which CLIP was trained with; transformers 5 resizes tensors by default: pixels off by one in 255
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    PROCESSORS: dict[str, Any] = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}
except ImportError:
    PROCESSORS = {"clip": AutoProcessor, "siglip": AutoProcessor}

folder, given, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
kind = model.config.model_type
AutoProcessor.from_pretrained(folder, local_files_only=True)
images: list[Image.Image] = [Image.open(path) for path in sorted(Path(given).glob("*.png"))]
captions = json.loads(Path(given, "captions.json").read_text("utf-8"))
pixels = PROCESSORS[kind].from_pretrained(folder, local_files_only=True)(images=images, return_tensors="pt")
tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
    captions,
    padding=True if kind == "clip" else "max_length",  # SigLIP's padding is seen
    max_length=model.config.text_config.max_position_embeddings,
    truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    found = model(**pixels, **tokens)
np.savez(out, image=found.image_embeds, text=found.text_embeds)
