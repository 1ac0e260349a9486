"""What every sequence mixer is: one call for a sequence, one for a step, and a state of fixed size."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from statemix import kernels
from statemix.analysis import transitions
from statemix.gates import normalize
from statemix.scan import lagged_states, scan_to_state

_WITH_ADDRESS = (Tensor, nn.Parameter)  # not so a subclass


class Mixer(nn.Module):
    """y, state = mixer(x, state, reset): mixes a sequence over time, from a state to a state.

    A subclass sets `d_model`, `state_shape` = (M, N) and `output`, its last map, and defines `mix`. What it says of its
    options, all that knows no mixer by name asks for: sizes, configs, training.
    """

    width_option: ClassVar[str]  # the option that makes it wider
    table_options: ClassVar[Mapping[str, Any]] = {}  # in a table of sizes, of options without a default
    has_gate_rows: ClassVar[bool] = False  # True: it has `row_entropy`, and N blocks that `output` need not see

    d_model: int
    state_shape: tuple[int, int]
    output: nn.Linear

    @classmethod
    def width_step(cls, options: Mapping[str, Any]) -> int:
        """Between the widths that it takes, of all its other options."""
        return 1

    @property
    def state_size(self) -> int:
        """Numbers carried per sequence from one step to the next: M * N."""
        return self.state_shape[0] * self.state_shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    if TYPE_CHECKING:  # torch says of no call what it returns

        def __call__(
            self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            """See `forward`."""

    def forward(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final state of a sequence.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, (B, M, N), float32 or wider, differentiable. Zeros if None.
            reset: (B, T) bool. True: the state is zero before that step (packed sequences). Never if None.

        Returns:
            y (B, T, D) and the state after the last step, (B, M, N).

        Raises:
            TypeError, ValueError: a dtype or shape is wrong, or T = 0.
        """
        name = type(self).__name__
        for argument, tensor in (("x", x), ("state", state), ("reset", reset)):
            if not isinstance(tensor, Tensor) and (tensor is not None or argument == "x"):
                raise TypeError(f"{name}: `{argument}` must be a tensor, got {type(tensor).__name__}.")
        own = self.dtype
        if x.dtype != own and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"{name}: `x` must be {own} like the parameters, got {x.dtype}.")
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ValueError(
                f"{name}: `x` must have shape (B, T, D) with D = {self.d_model} and B, T of at least 1, "
                f"got {tuple(x.shape)}."
            )
        for argument, tensor in (("state", state), ("reset", reset)):
            if tensor is not None and tensor.device != x.device:
                raise TypeError(f"{name}: `{argument}` must be on {x.device} like `x`, got {tensor.device}.")
        if state is not None and tuple(state.shape) != (wanted := (x.shape[0], *self.state_shape)):
            raise ValueError(f"{name}: `state` must have shape (B, M, N) = {wanted}, got {tuple(state.shape)}.")
        if reset is not None and reset.dtype != torch.bool:
            raise TypeError(f"{name}: `reset` must be a bool tensor, got {reset.dtype}.")
        if reset is not None and reset.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: `reset` must have shape (B, T) = {tuple(x.shape[:2])}, got {tuple(reset.shape)}."
            )
        return self.mix(x, state, reset)

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of the same recurrence: x (B, D) and the state (B, M, N) to y (B, D) and the next state."""
        y, state = self(x[:, None], state)
        return y[:, 0], state

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` on checked arguments."""
        raise NotImplementedError

    def row_entropy(self, x: Tensor) -> Tensor:
        """See `LinearRecurrence.row_entropy`; of a mixer with rows of gates."""
        raise NotImplementedError


class LinearRecurrence(Mixer):
    """Raw gates and values from x, a scan with gates normalised row by row, and a read-out: BD-LRU and H-LRU.

    A subclass sets what is declared here. With the compiled kernels the whole layer runs as one fused operator in
    float32 and float64; under autocast, with a named torch backend, or without selection, its products are torch's.
    """

    has_gate_rows = True
    kind: str  # of the scan: block, companion or observer
    normalization: str
    backend: str
    recompute: bool | None
    raw_gates: "RawGates"
    values: nn.Linear
    output: nn.Linear

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.output.weight.dtype  # a tenth of the time of next(self.parameters())

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`."""
        if x.shape[1] == 1 and reset is None and (stepped := self._fused_step(x[:, 0], state)) is not None:
            return stepped[0][:, None], stepped[1]
        # below, packing the weights for the fused products takes longer than the products
        if x.shape[0] * x.shape[1] >= 32 and (weights := self._fused_weights(x)) is not None:
            return kernels.layer(
                *(x, weights, state, reset),
                normalization=self.normalization,
                kind=self.kind,
                order=self.state_shape[0],
                recompute=self.recompute,
            )
        values = self.values(x)
        if self.kind == "block":
            values = values.unflatten(2, self.state_shape)
        states, final_state = scan_to_state(
            *(self.kind, self.raw_gates(x).to(values.dtype), values, state),
            normalization=self.normalization,
            reset=reset,
            backend=self.backend,
        )
        if self.kind == "companion":
            states = lagged_states(states, state, reset, self.state_shape[0])
        return self.output(states.flatten(2).to(x.dtype)), final_state

    def row_entropy(self, x: Tensor) -> Tensor:
        """Mean over the rows of gates at x (B, T, D) of -sum_j |p_j| ln |p_j|, in nats: 0 where all are one-hot."""
        weights = normalize(self.raw_gates(x), self.normalization, dim=-2).abs()
        return -torch.special.xlogy(weights, weights).sum(-2).mean()

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply the raw gates by a factor, in place: with softmax every weight p becomes p^factor / sum p^factor.

        From large factors on a row is one-hot, and what a block of such rows moves it moves without loss.

        Raises:
            ValueError: the normalisation is not softmax, or the factor is not above 0.
        """
        if self.normalization != "softmax" or not 0 < factor < math.inf:
            what = f"normalization={self.normalization!r} and factor={factor}"
            raise ValueError(f"sharpen: `normalization` must be 'softmax' and `factor` above 0 and finite, got {what}.")
        for parameter in self.raw_gates.parameters():
            parameter.mul_(factor)

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Mixer.step`. Without gradients it is one fused call, which allocates its results and nothing else."""
        return self._fused_step(x, state) or super().step(x, state)

    def transitions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A_t (B, T, N, M, M) and a0_t (B, T, N, M) at every step of x (B, T, D): see `analysis.transitions`."""
        return transitions(self.raw_gates(x), normalization=self.normalization, kind=self.kind)

    def _fused_step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The step as one call, or None where that does not serve."""
        if (ready := self.step_inputs(x, state)) is None:
            return None
        return kernels.layer_step(x, *ready, normalization=self.normalization, kind=self.kind)

    def step_inputs(self, x: Tensor, state: Tensor | None) -> tuple[kernels.Weights, Tensor] | None:
        """Weights and state for a fused step of x (B, D), or None: with gradients, or for many rows."""
        if torch.is_grad_enabled() or type(x) is not Tensor or x.ndim != 2 or kernels.transformed():
            return None
        batch, width = x.shape
        if not 0 < batch <= 8 or width != self.d_model or (weights := self._fused_weights(x)) is None:
            return None
        wanted = (batch, *self.state_shape)
        if state is None:
            state = x.new_zeros(wanted)
        elif type(state) is not Tensor or state.shape != wanted or state.dtype != x.dtype or not state.is_cpu:
            return None
        if type(self).mix is not LinearRecurrence.mix or not (x.is_contiguous() and state.is_contiguous()):
            return None
        for weight in weights:  # a loop: `any` of a generator takes three times as long, and a step is short
            if type(weight) not in _WITH_ADDRESS or not weight.is_contiguous():
                return None
        return weights, state

    def _fused_weights(self, x: Tensor) -> kernels.Weights | None:
        """The weights for the fused kernels, or None where they do not serve this layer or x."""
        # dictionaries: a step is so short that nn.Module's attributes would be half of it
        modules = self._modules
        raw_gates = modules["raw_gates"]
        assert raw_gates is not None
        linears: tuple[Any, ...] = (raw_gates._modules.get("projection"), modules["values"], modules["output"])
        if (
            self.backend not in ("auto", "cpu")
            or x.dtype not in (torch.float32, torch.float64)
            or not kernels.serves(x.device, self.state_shape[0])
            or torch.is_autocast_enabled("cpu")
            or type(raw_gates) is not RawGates
            or raw_gates._forward_hooks
            or raw_gates._forward_pre_hooks
            or raw_gates._backward_hooks
            or raw_gates._backward_pre_hooks
        ):
            return None
        for linear in linears:  # fused, a module is not called: a subclass or a hook would be passed over
            if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
                return None
            if linear._backward_hooks or linear._backward_pre_hooks:
                return None
        gates, values, output = linears[0]._parameters, linears[1]._parameters, linears[2]._parameters
        if values.get("bias") is not None or output.get("bias") is not None:
            return None
        weights, dtype = (gates.get("weight"), gates.get("bias"), values.get("weight"), output.get("weight")), x.dtype
        for weight in weights:  # None: parametrised
            if weight is None or weight.dtype != dtype or not weight.is_cpu:
                return None
        return weights


class NonlinearRecurrence(Mixer):
    """A recurrence of torch's with a linear read-out: LSTM and GRU. A subclass sets `output` and defines `run`."""

    output: nn.Linear

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`."""
        state = start_state(x, state, self.state_shape, reset)
        with without_autocast(x):
            hidden, final_state = between_resets(self.run, x.to(self.dtype), state.to(self.dtype), reset)
        return self.output(hidden.to(x.dtype)), final_state.to(state.dtype)

    def run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and a state (B, M, H) -> hidden states (B, T, H), final state; torch's modules know no reset."""
        raise NotImplementedError


class RawGates(nn.Module):
    """Raw gates z_t = W x_t + b (selective), or learned numbers z that are the same at every step (not selective)."""

    def __init__(self, d_model: int, shape: tuple[int, ...], selective: bool) -> None:
        super().__init__()
        self.shape = shape
        self.projection = nn.Linear(d_model, torch.Size(shape).numel()) if selective else None
        self.constant = None if selective else nn.Parameter(torch.randn(shape))

    def start_from(self, gates: Tensor) -> None:
        """Let the raw gates of x = 0, or the constant ones, be `gates`, (*shape) without N, in every block."""
        start = self.constant if self.projection is None else self.projection.bias.view(self.shape)
        assert start is not None
        with torch.no_grad():
            start.copy_(gates[..., None].expand(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> raw gates (B, T, *shape)."""
        if self.projection is None:
            assert self.constant is not None
            return self.constant.expand(*x.shape[:2], *self.shape)
        raw_gates: Tensor = self.projection(x)
        return raw_gates.unflatten(2, self.shape)


def between_resets(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `run`, a recurrence without a reset of its own, makes of x (B, T, D) and a state (B, M, N), piece by piece.

    A piece ends before each step at which a sequence of the batch has a reset, (B, T) bool or None.
    """
    starts = [] if reset is None else torch.nonzero(reset.any(0)).flatten().tolist()
    outputs = []
    for begin, end in itertools.pairwise(sorted({0, *starts, x.shape[1]})):
        if reset is not None:
            state = state.masked_fill(reset[:, begin, None, None], 0)
        y, state = run(x[:, begin:end], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def start_state(x: Tensor, state: Tensor | None, shape: tuple[int, int], reset: Tensor | None) -> Tensor:
    """The state to begin with, (B, M, N), float32 or wider: zeros if None, and where the first step has a reset."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        return x.new_zeros(x.shape[0], *shape, dtype=wide)
    state = state.to(wide)
    return state if reset is None else state.masked_fill(reset[:, 0, None, None], 0)


def pack_state(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, ...) side by side as one state (B, 1, N)."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)[:, None]


def unpack_state(state: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors (B, *shape) that `pack_state` put side by side."""
    parts = state[:, 0].split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their factors: sums over time are float32 or wider."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def check_flags(owner: str, **flags: bool) -> None:
    """Raise TypeError, in the name of `owner`, unless every flag is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{owner}: `{name}` must be True or False, got {flag!r}.")


def check_recompute(owner: str, recompute: bool | None) -> None:
    """Raise TypeError, in the name of `owner`, unless it is a bool or None."""
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"{owner}: `recompute` must be True, False or None, got {recompute!r}.")


def check_sizes(owner: str, *, least: int = 1, **sizes: int) -> None:
    """Raise, in the name of `owner`, unless every size is an int of at least `least`."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{owner}: `{name}` must be an int, got {size!r}.")
        if size < least:
            raise ValueError(f"{owner}: `{name}` must be at least {least}, got {size}.")


def check_numbers(owner: str, **numbers: float) -> None:
    """Raise TypeError, in the name of `owner`, unless every value is a number."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"{owner}: `{name}` must be a number, got {number!r}.")


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, in the name of `owner`, unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{owner}: `{name}` must be one of {sorted(choices)}, got {value!r}.")
