"""Greedy continuation of token ids, in batches and as a stream. Knows nothing of templates or files."""
