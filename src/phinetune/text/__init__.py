"""From messages to token ids and the mask of trained tokens. Knows no data files, imports no torch."""
