"""From files to checked examples. Knows nothing of tokens or models; imports no torch."""
