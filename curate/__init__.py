"""Curate: from a list of image URLs and captions to a clean, documented dataset."""
