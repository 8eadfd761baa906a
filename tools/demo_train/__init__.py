"""Pre-training of the demo base: model, optimisers, batches, probes, checkpoints. Knows no corpus format."""
