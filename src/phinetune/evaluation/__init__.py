"""Measure base and adapter on the same examples, and how sure the difference is. Knows nothing of files."""
