"""Linear recurrent networks with rich state mixing: BD-LRU and H-LRU, their scans, tasks and training."""

__version__ = "0.1.0"
