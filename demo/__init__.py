"""The main job on pictures that pip packages ship: `python -m demo.run` (or `make demo`)."""
