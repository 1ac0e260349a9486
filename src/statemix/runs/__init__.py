"""Runs in numbers: what is trained together, where it runs, and what came of it."""
