"""The bundled demo task: customer messages in, compact JSON tickets out. Never read by pre-training."""
