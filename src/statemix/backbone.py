"""Stacks of pre-norm residual (mixer, SwiGLU) pairs on continuous inputs. Every model is built from one.

Initialisation is one rule for all mixers. The last map of every residual branch, `mixer.output` and `mlp.output`,
starts small enough that the sum of all branches has the same scale at any depth. With `init_std` (0.02 in MAD and in
the paper), the weights of every nn.Linear and nn.Embedding are N(0, init_std^2), and those of the branches' last maps
N(0, init_std^2 / (2 num_layers)): there are 2 num_layers branches. Without it all are as torch or the mixer makes them,
and the last maps are divided by sqrt(num_layers): a model of one pair is left as it is. Neither touches what else a
mixer sets up: biases, the ring of LRU, the decays of Mamba-2, convolutions, the matrices within torch.nn.LSTM and GRU.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from statemix import fused, kernels
from statemix.mixers import Mixer, build_mixer, complete_mixer
from statemix.mixers.base import check_reset, check_sizes, reset_rows
from statemix.mixers.linear_recurrence import RECURRENCE
from statemix.specs import Spec

State = tuple[Tensor, ...]  # one (B, M, N) per layer


class SwiGLU(nn.Module):
    """y = W_2 (silu(W_1 x) * W_3 x), without biases. Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, d_model: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_and_input = nn.Linear(d_model, 2 * mlp_size, bias=False)
        self.output = nn.Linear(mlp_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        y: Tensor = self.output(fused.gated(self.gate_and_input(x)))
        return y


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU 16 random bits decide about a number, so the share is a multiple of 2^-16.

    There torch draws a double for each, one after another, on processors other than Intel's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        if not (self.training and self.p and x.is_cpu) or fused.transformed():
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (kept * x.new_tensor(2**16 / (2**16 - dropped)))


class Layer(nn.Module):
    """x + dropout(mixer(norm(x))), then x + dropout(SwiGLU(norm(x)))."""

    def __init__(self, d_model: int, mixer: Spec, mlp_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.mixer_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mixer = build_mixer(mixer, d_model)
        self.mlp_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mlp = SwiGLU(d_model, mlp_size)

    def forward(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), and the mixer's state."""
        if x.shape[1] == 1 and reset is None and (stepped := self._fused_step(x[:, 0], state)) is not None:
            return stepped[0][:, None], stepped[1]
        mixed, state = self.mixer(self.mixer_norm(x), state, reset)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state

    def step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step, x (B, D) -> (B, D), and the mixer's state. Without gradients, one call of the compiled kernels."""
        if LAYER.plainly_called(self) and (stepped := self._fused_step(x, state)) is not None:
            return stepped
        y, state = self(x[:, None], state, None)
        return y[:, 0], state

    def _fused_step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The step as one call, or None where that does not serve."""
        if (step := LAYER.inputs(self)) is None or step.mixer_norm.dtype != x.dtype:
            return None
        state = fused.step_state(x, state, (len(step.mixer_norm), *step.mixer.state_shape))
        return None if state is None else step(x, state)


def _pair_step(layer: Layer, weights: tuple[Tensor, ...]) -> kernels.PairStep:
    *of_mixer, mixer_norm, mlp_norm, gate_and_input, mlp_output = weights
    return kernels.PairStep(
        mixer=RECURRENCE.arrange(layer.mixer, tuple(of_mixer)),
        mixer_norm=mixer_norm,
        mlp_norm=mlp_norm,
        gate_and_input=gate_and_input,
        mlp_output=mlp_output,
        mixer_epsilon=cast(float, layer.mixer_norm.eps),
        mlp_epsilon=cast(float, layer.mlp_norm.eps),
    )


LAYER = fused.Part(
    Layer,
    parts={
        "mixer": RECURRENCE,
        "mixer_norm": fused.RMS_NORM,
        "mlp_norm": fused.RMS_NORM,
        "mlp": fused.Part(SwiGLU, parts={"gate_and_input": fused.LINEAR, "output": fused.LINEAR}),
        "dropout": fused.Part(
            Dropout,
            settings=["p", "training"],
            allows=lambda dropout: not (dropout.training and dropout.p),
        ),
    },
    arrange=_pair_step,
)


class Stack(nn.Module):
    """Residual pairs and the norm behind them, with their first weights, states and steps: what every model has.

    A subclass calls `_pairs` when it is the turn of their random numbers, and `_initialise` once all its parts are
    there.
    """

    layers: nn.ModuleList
    norm: nn.RMSNorm

    def __init__(
        self, d_model: int, num_layers: int, mixer: Spec, mlp_size: int | None, init_std: float | None, dropout: float
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_sizes(name, d_model=d_model, num_layers=num_layers)
        mlp_size = -(-8 * d_model // 96) * 32 if mlp_size is None else mlp_size
        check_sizes(name, mlp_size=mlp_size)
        if init_std is not None and not (type(init_std) in (int, float) and 0 < init_std < math.inf):
            raise ValueError(f"{name}: `init_std` must be a finite number above 0, or None, got {init_std!r}.")
        if not (type(dropout) in (int, float) and 0 <= dropout < 1):
            raise ValueError(f"{name}: `dropout` must be a number in [0, 1), got {dropout!r}.")
        self.config: dict[str, Any] = {
            "d_model": d_model,
            "num_layers": num_layers,
            "mixer": complete_mixer(mixer),
            "mlp_size": mlp_size,
            "init_std": init_std,
            "dropout": dropout,
        }

    def _pairs(self) -> tuple[nn.ModuleList, nn.RMSNorm]:
        """The pairs of the config, newly drawn, and the norm behind them."""
        d_model, mixer, mlp_size, dropout = (self.config[key] for key in ("d_model", "mixer", "mlp_size", "dropout"))
        layers = nn.ModuleList(Layer(d_model, mixer, mlp_size, dropout) for _ in range(self.config["num_layers"]))
        return layers, nn.RMSNorm(d_model, eps=1e-6)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Apply the rule of the module's docstring."""
        init_std, depth = self.config["init_std"], self.config["num_layers"]
        branches = [last for layer in self._all_layers() for last in (layer.mixer.output, layer.mlp.output)]
        if init_std is None:
            for branch in branches:
                branch.weight.div_(math.sqrt(depth))
            return
        stds = {  # by weight: a tied one is drawn once
            module.weight: init_std / math.sqrt(2 * depth) if module in branches else init_std
            for module in self.modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        }
        for weight, std in stds.items():
            nn.init.normal_(weight, std=std)

    def _all_layers(self) -> list[Layer]:
        """The pairs, each with a state of its own, in the order of the states."""
        return [cast(Layer, layer) for layer in self.layers]

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each layer, first to last."""
        return [layer.mixer for layer in self._all_layers()]

    @property
    def state_size(self) -> int:
        """Numbers carried per sequence, over all layers."""
        return sum(mixer.state_size for mixer in self.mixers)

    def num_parameters(self) -> int:
        """Number of trained numbers; one that is shared counts once."""
        return sum(p.numel() for p in self.parameters())

    def initial_state(self, batch: int) -> State:
        """The state before the first step, one (B, M, N) per layer: zeros, float32 or wider, where the weights are."""
        return tuple(mixer.initial_state(batch) for mixer in self.mixers)

    def run_stack(self, x: Tensor, state: Sequence[Tensor] | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """x (B, T, D) to the normalised residual stream (B, T, D) and the state of every layer."""
        return self._run(self.layers, self.norm, x, state, reset)

    def _run(
        self,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        x: Tensor,
        state: Sequence[Tensor] | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, State]:
        states = []
        for i, layer in enumerate(layers):
            x, layer_state = layer(x, None if state is None else state[i], reset)
            states.append(layer_state)
        return norm(x), tuple(states)

    def _step_stack(self, x: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, State]:
        """`run_stack` for one step, x (B, D) -> (B, D), where nothing waits for a call of the norm."""
        states = []
        for i, layer in enumerate(self.layers):
            x, layer_state = cast(Layer, layer).step(x, None if state is None else state[i])
            states.append(layer_state)
        return self.norm(x), tuple(states)

    def _kept(self, state: Sequence[Tensor] | None, reset: Tensor | None, x: Tensor) -> Sequence[Tensor] | None:
        """The state with which a step of B rows begins: zeros in the rows of a reset, (B,)."""
        if reset is None:
            return state
        check_reset(f"{type(self).__name__}.step", reset, x.shape[:1], x.device)
        return None if state is None else [cast(Tensor, reset_rows(part, reset)) for part in state]

    def _check_state(self, state: Sequence[Tensor] | None) -> None:
        if state is None:
            return
        name, wanted = type(self).__name__, len(self._all_layers())
        if not isinstance(state, Sequence):
            raise TypeError(f"{name}: `state` must be a sequence of tensors, got {type(state).__name__}.")
        if len(state) != wanted:
            raise ValueError(f"{name}: `state` must have one tensor per layer = {wanted}, got {len(state)}.")
