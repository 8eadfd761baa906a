"""Base models: finding, loading, segment attention, the trained-token loss, memory.

Knows nothing of training, run folders or terminals.
"""
