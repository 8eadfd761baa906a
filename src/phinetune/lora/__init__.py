"""The method: low-rank updates of frozen linear layers, their files. Knows nothing of text or training."""
