"""What may be asked and answered: the content filter. Knows nothing of engines, service or terminals."""
