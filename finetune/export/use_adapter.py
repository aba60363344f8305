"""What a user of peft does with an exported adapter: python use_adapter.py FOLDER GIVEN OUT.npz.

GIVEN holds start.json (name, pretrained: the CLIP that training started from), pixels.npy and tokens.npy. Of cliptailor
only what loads that CLIP and splits its attention is used; the adapter is peft's affair alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import normalize

from curate.clip import load_clip
from finetune.adapters import open_projections
from finetune.attention import split_attention

folder, given, out = (Path(argument) for argument in sys.argv[1:])
start = json.loads((given / "start.json").read_text("utf-8"))
model: Any = load_clip(start["name"], start["pretrained"], device="cpu").model
split_attention(model)
config = PeftConfig.from_pretrained(folder)
if start["projections"]:
    open_projections(model)
inject_adapter_in_model(config, model)
set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
with torch.no_grad():
    image = model.eval().encode_image(torch.from_numpy(np.load(given / "pixels.npy")))
    text = model.encode_text(torch.from_numpy(np.load(given / "tokens.npy")))
np.savez(out, image=normalize(image, dim=-1), text=normalize(text, dim=-1))
