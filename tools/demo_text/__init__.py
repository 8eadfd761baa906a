"""Texts that the demo base is pre-trained on: generators of our own and readers of public corpora.

Knows nothing of models, optimisers or of the demo task's ticket schema.
"""
