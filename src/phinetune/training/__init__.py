"""Settings, packing, plan, schedule and the training loop. Knows nothing of run folders or terminals."""
