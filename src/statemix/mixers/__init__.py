"""Sequence mixers by name."""

from typing import Any

from statemix.mixers.base import Mixer
from statemix.mixers.bd_lru import BDLRU
from statemix.mixers.h_lru import HLRU
from statemix.mixers.lstm import LSTM
from statemix.specs import Spec, complete

MIXERS: dict[str, type[Mixer]] = {"bd_lru": BDLRU, "h_lru": HLRU, "lstm": LSTM}


def complete_mixer(spec: Spec) -> dict[str, Any]:
    """The spec of a mixer with every default filled in. Raises ValueError if a name is unknown or missing."""
    return complete("mixer", MIXERS, spec, given=("d_model",))


def build_mixer(spec: Spec, d_model: int) -> Mixer:
    """The mixer of a spec, such as {"name": "bd_lru", "num_blocks": 16, "block_size": 3}, at width `d_model`.

    Raises:
        TypeError, ValueError: the name or an option is unknown, an option is missing, or the mixer rejects one.
    """
    options = complete_mixer(spec)
    return MIXERS[options.pop("name")](d_model, **options)


__all__ = ["BDLRU", "HLRU", "LSTM", "MIXERS", "Mixer", "build_mixer", "complete_mixer"]
