"""Errors, files, events and seeds: the ground floor. Knows nothing of models, data or torch."""
