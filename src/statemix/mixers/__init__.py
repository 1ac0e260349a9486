"""Sequence mixers by name."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from statemix.mixers.attention import Attention
from statemix.mixers.base import Mixer
from statemix.mixers.bd_lru import BDLRU
from statemix.mixers.delta import DeltaNet, DeltaProduct, GatedDeltaNet
from statemix.mixers.gru import GRU
from statemix.mixers.h_lru import HLRU
from statemix.mixers.lru import LRU
from statemix.mixers.lstm import LSTM
from statemix.mixers.mamba2 import Mamba2
from statemix.mixers.mlstm import MLSTM
from statemix.mixers.pd_ssm import PDSSM
from statemix.specs import Registry, Spec, complete

REGISTERED: dict[str, type[Mixer]] = {
    "bd_lru": BDLRU,
    "h_lru": HLRU,
    "lru": LRU,
    "gru": GRU,
    "lstm": LSTM,
    "mlstm": MLSTM,
    "mamba2": Mamba2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "delta_product": DeltaProduct,
    "pd_ssm": PDSSM,
    "attention": Attention,
}
MIXERS = Registry("mixer", Mixer, REGISTERED)

NEEDED = ("d_model", "state_shape", "output")  # attributes, of a mixer that was built
DEFAULT_MIXER: Spec = {"name": "bd_lru", "num_blocks": 16, "block_size": 3}  # of a config that names none

# packages with GPU kernels that library.py can use: the mixers
KERNEL_LIBRARIES = {"flash-linear-attention": "delta_net, gated_delta_net, delta_product", "mamba-ssm": "mamba2"}


def complete_mixer(spec: Spec) -> dict[str, Any]:
    """The spec of a mixer with every default filled in. Raises ValueError if a name is unknown or missing."""
    return complete(MIXERS, spec, given=("d_model",))


def build_mixer(spec: Spec, d_model: int) -> Mixer:
    """The mixer of a spec, such as {"name": "bd_lru", "num_blocks": 16, "block_size": 3}, at width `d_model`.

    Raises:
        TypeError, ValueError: the name or an option is unknown, an option is missing, or the mixer rejects one, or is
            none: it lacks what every mixer has.
    """
    options = complete_mixer(spec)
    mixer = MIXERS[name := options.pop("name")](d_model, **options)
    missing = [attribute for attribute in NEEDED if not hasattr(mixer, attribute)]
    if type(mixer).mix is Mixer.mix:
        missing.append("mix")
    if missing:
        raise TypeError(f"mixer: {name!r} must have {missing}, see `Mixer`.")
    return mixer


def library_kernels() -> dict[str, str]:
    """By package, in a few words, whether it is installed, and what it would run."""
    facts = {}
    for package, mixers in KERNEL_LIBRARIES.items():
        try:
            found = f"{version(package)} is installed"
        except PackageNotFoundError:
            found = "not installed"
        facts[package] = f"{found}; runs {mixers} for CUDA tensors of 16 bits"
    return facts


__all__ = [
    "BDLRU",
    "DEFAULT_MIXER",
    "GRU",
    "HLRU",
    "LRU",
    "LSTM",
    "MIXERS",
    "MLSTM",
    "PDSSM",
    "Attention",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "Mamba2",
    "Mixer",
    "build_mixer",
    "complete_mixer",
    "library_kernels",
]
