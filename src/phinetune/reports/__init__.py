"""Pages, plots and state files made from a run's own records. Knows nothing of models or of how runs work."""
