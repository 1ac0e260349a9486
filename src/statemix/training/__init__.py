"""Training: a run's config, the loop, and what a run leaves on the disk."""
