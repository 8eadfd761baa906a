"""The kinds of files that hold examples, one module each. Knows nothing of rules, tokens or models."""
