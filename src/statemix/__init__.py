"""Linear recurrent networks with rich state mixing: BD-LRU and H-LRU, their scans, tasks and training."""

from statemix.mixers import BDLRU, HLRU, LSTM
from statemix.model import AutoEncoder, SequenceModel, load_model
from statemix.scan import available_backends, block_scan, companion_scan, observer_scan
from statemix.training.config import TrainConfig
from statemix.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "BDLRU",
    "HLRU",
    "LSTM",
    "AutoEncoder",
    "SequenceModel",
    "TrainConfig",
    "available_backends",
    "block_scan",
    "companion_scan",
    "load_model",
    "observer_scan",
    "train",
]
