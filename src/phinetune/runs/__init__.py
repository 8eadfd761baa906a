"""Runs over time: their folders, and the whole road from lora.yaml to a proven adapter."""
