"""Linear recurrent networks with rich state mixing: BD-LRU and H-LRU, their scans, tasks and training.

A name is imported when it is first used: a layer needs nothing of what trains it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statemix.backbone import Backbone
    from statemix.mixers import BDLRU, HLRU, LSTM
    from statemix.model import AutoEncoder, SequenceModel, load_model
    from statemix.predictor import SequencePredictor
    from statemix.scan import available_backends, block_scan, companion_scan, observer_scan
    from statemix.training.config import TrainConfig
    from statemix.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "BDLRU",
    "HLRU",
    "LSTM",
    "AutoEncoder",
    "Backbone",
    "SequenceModel",
    "SequencePredictor",
    "TrainConfig",
    "available_backends",
    "block_scan",
    "companion_scan",
    "load_model",
    "observer_scan",
    "train",
]

_MODULES = {
    "BDLRU": "mixers",
    "HLRU": "mixers",
    "LSTM": "mixers",
    "AutoEncoder": "model",
    "Backbone": "backbone",
    "SequenceModel": "model",
    "SequencePredictor": "predictor",
    "TrainConfig": "training.config",
    "available_backends": "scan",
    "block_scan": "scan",
    "companion_scan": "scan",
    "load_model": "model",
    "observer_scan": "scan",
    "train": "training.loop",
}

if not TYPE_CHECKING:  # to a type checker it would give any name

    def __getattr__(name: str) -> object:
        """A public name, imported from its module."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
