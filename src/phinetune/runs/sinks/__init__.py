"""Other tools that show a run while it goes on; each reads the run's events and nothing else."""
