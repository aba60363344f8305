"""What a user of transformers does with an export: python use_transformers.py FOLDER GIVEN OUT.npz.

GIVEN holds *.png and captions.json. Nothing of cliptailor is imported: this shows that nothing of it is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

try:  # PIL's resize, which CLIP was trained with; transformers 5 resizes tensors by default: pixels off by one in 255
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor  # type: ignore[assignment]

folder, given, out = sys.argv[1:]
model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
images: list[Image.Image] = [Image.open(path) for path in sorted(Path(given).glob("*.png"))]
captions = json.loads(Path(given, "captions.json").read_text("utf-8"))
pixels = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)(images, return_tensors="pt")
tokens = CLIPTokenizer.from_pretrained(folder, local_files_only=True)(
    captions, padding=True, truncation=True, return_tensors="pt"
)
with torch.no_grad():
    found = model(**pixels, **tokens)
np.savez(out, image=found.image_embeds, text=found.text_embeds)
