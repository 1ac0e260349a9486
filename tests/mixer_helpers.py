"""What the tests of the mixers share: small specs of each, with weights, states and resets that make a fault show."""

import pytest
import torch
from torch import Tensor

from statemix.mixers import MLSTM, Attention, DeltaProduct, Mamba2, Mixer, build_mixer

D = 6
SPECS = {
    "bd_lru": {"name": "bd_lru", "num_blocks": 5, "block_size": 3},
    "bd_lru M=1": {"name": "bd_lru", "num_blocks": 17, "block_size": 1},
    "bd_lru linear": {"name": "bd_lru", "num_blocks": 4, "block_size": 2, "normalization": "linear"},
    "bd_lru fixed": {"name": "bd_lru", "num_blocks": 5, "block_size": 3, "selective": False},
    "h_lru": {"name": "h_lru", "num_channels": 5, "order": 3},
    "h_lru M=1": {"name": "h_lru", "num_channels": 17, "order": 1},
    "h_lru M=12": {"name": "h_lru", "num_channels": 1, "order": 12},  # more lags than steps
    "h_lru fixed": {"name": "h_lru", "num_channels": 5, "order": 3, "selective": False},
    "observer": {"name": "h_lru", "num_channels": 5, "order": 3, "form": "observer"},
    "observer fixed": {"name": "h_lru", "num_channels": 5, "order": 3, "form": "observer", "selective": False},
    "lru": {"name": "lru", "num_channels": 5},
    "gru": {"name": "gru", "hidden_size": 7},
    "lstm": {"name": "lstm", "hidden_size": 7},
    # chunks and windows that neither divide a length nor hold it
    "mlstm": {"name": "mlstm", "head_dim": 6, "num_heads": 2, "chunk_size": 4},
    "mamba2": {"name": "mamba2", "head_dim": 3, "state_dim": 5, "chunk_size": 4},
    "mamba2 groups": {"name": "mamba2", "head_dim": 5, "num_heads": 6, "state_dim": 3, "num_groups": 3, "conv_size": 1},
    "delta_net": {"name": "delta_net", "head_dim": 8, "num_heads": 2, "chunk_size": 4},
    "gated_delta_net": {"name": "gated_delta_net", "head_dim": 3, "num_heads": 2, "chunk_size": 5},
    "delta_product": {"name": "delta_product", "head_dim": 8, "num_heads": 2, "rank": 3, "chunk_size": 4},
    "delta_product gated": {"name": "delta_product", "head_dim": 8, "num_heads": 1, "gated": True, "conv_size": 0},
    "pd_ssm": {"name": "pd_ssm", "num_channels": 5, "dictionary_size": 3, "chunk_size": 4},
    "pd_ssm soft": {"name": "pd_ssm", "num_channels": 4, "expand": 1, "one_hot": False},
    "attention": {"name": "attention", "head_dim": 4, "num_heads": 2, "context": 5},
    "attention W=2": {"name": "attention", "head_dim": 2, "num_heads": 3, "context": 2},
    "attention W=30": {"name": "attention", "head_dim": 2, "num_heads": 3, "context": 30},  # more than steps
}
SCANNED = [name for name, spec in SPECS.items() if spec["name"] in ("bd_lru", "h_lru")]
each_mixer = pytest.mark.parametrize("mixer", SPECS)
# Chunks and windows sum over time, too, in another order, and a norm divides by what may be small.
CHUNKED = (MLSTM, Mamba2, DeltaProduct, Attention)


def build(name: str, generator: torch.Generator, dtype: torch.dtype = torch.float64, **options) -> Mixer:
    """A mixer with weights from the generator and, in every other channel, a slow decay: there carries fail."""
    mixer = build_mixer(SPECS[name] | options, D)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / D**0.5)
        if name == "lstm":
            mixer.lstm.bias_ih_l0.view(4, -1)[1, ::2] = 5  # the forget gate
        elif name == "gru":
            mixer.gru.bias_ih_l0.view(3, -1)[1, ::2] = 5  # the update gate
        elif name == "lru":
            mixer.log_nu[::2] = -7
        elif name == "mlstm":
            mixer.gates.bias[-1] = 6  # the forget gate
        elif name.startswith("pd_ssm"):
            mixer.magnitude[-1].bias[::2] = 7
        elif getattr(mixer, "decay", None) is not None:
            mixer.decay.rate[::2] = -7
        elif name in SCANNED:
            gates = mixer.raw_gates.projection.bias if mixer.raw_gates.constant is None else mixer.raw_gates.constant
            softmax = mixer.normalization == "softmax"
            gates.view(mixer.raw_gates.shape)[..., -1, ::2] = -6 if softmax else 0.01
    return mixer.to(dtype)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def start(mixer: Mixer, generator: torch.Generator, batch: int = 3) -> Tensor:
    """A state to go on from; of an attention, with every third slot empty."""
    state = normal(generator, batch, *mixer.state_shape, dtype=next(mixer.parameters()).dtype)
    if isinstance(mixer, Attention):
        state[..., -1] = torch.arange(mixer.context) % 3 > 0
    return state


def random_reset(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """A third of the steps, with the first of row 0 and the last of the last row; row 1 has none."""
    reset = torch.rand(batch, length, generator=generator) < 1 / 3
    reset[0, 0] = reset[-1, -1] = True
    reset[1] = False
    return reset


def everything(mixer: Mixer, x: Tensor, state: Tensor, reset=None, cuts=()) -> dict[str, Tensor]:
    """Outputs, final state and the gradients of both in all there is, with the sequence called in pieces."""
    x, state = x.clone().requires_grad_(), state.clone().requires_grad_()
    ys, carried, begin = [], state, 0
    for end in (*cuts, x.shape[1]):
        piece = None if reset is None else reset[:, begin:end]
        y, carried = mixer(x[:, begin:end], carried, piece)
        ys.append(y)
        begin = end
    y = torch.cat(ys, dim=1)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    loss = (y * weight).sum() + carried.square().sum()
    names = [name for name, _ in mixer.named_parameters()]
    grads = torch.autograd.grad(loss, [x, state, *mixer.parameters()])
    return {"y": y, "final": carried} | dict(zip(["x", "state", *names], grads, strict=True))
