"""What a user of open_clip does with an export: python use_open_clip.py FOLDER GIVEN OUT.npz.

GIVEN holds *.png and captions.json. Nothing of cliptailor is imported: this shows that nothing of it is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

folder, given, out = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
pixels = torch.stack([preprocess(Image.open(path)) for path in sorted(Path(given).glob("*.png"))])
tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(json.loads(Path(given, "captions.json").read_text("utf-8")))
with torch.no_grad():
    image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
np.savez(out, image=image, text=text)
