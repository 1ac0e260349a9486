"""BD-LRU and H-LRU as one: raw gates and values from x, a scan with gates normalised row by row, and a read-out."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from statemix import fused, kernels
from statemix.analysis import transitions
from statemix.gates import normalize
from statemix.mixers.base import Mixer, Rows
from statemix.scan import lagged_states, scan_to_state


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

    def forward(self, x: Tensor, blocks: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> raw gates (B, T, *shape), of N blocks only those that are named."""
        if self.projection is None:
            assert self.constant is not None
            own = self.constant if blocks is None else self.constant[..., blocks]
            return own.expand(*x.shape[:2], *own.shape)
        raw_gates: Tensor
        if blocks is None:
            raw_gates = self.projection(x)
            return raw_gates.unflatten(2, self.shape)
        raw_gates = _project(self.projection, x, blocks, self.shape[-1])
        return raw_gates.unflatten(2, (*self.shape[:-1], len(blocks)))


def _project(linear: nn.Linear, x: Tensor, blocks: Tensor, count: int) -> Tensor:
    """What `linear` makes of x (B, T, D), of its features (..., N) only those of some of `count` blocks."""
    weight = linear.weight.unflatten(0, (-1, count))[:, blocks].flatten(0, 1)
    bias = None if linear.bias is None else linear.bias.unflatten(0, (-1, count))[:, blocks].flatten()
    return nn.functional.linear(x, weight, bias)


def _recurrence_step(mixer: "LinearRecurrence", weights: tuple[Tensor, ...]) -> kernels.LayerStep:
    return kernels.LayerStep(cast(kernels.Weights, weights), mixer.state_shape, mixer.normalization, mixer.kind)


def _allowed_on_cpu(mixer: "LinearRecurrence") -> bool:
    return _allowed_hidden(mixer) and not mixer.hidden


def _allowed_hidden(mixer: "LinearRecurrence") -> bool:
    return _may_run_on_cpu(mixer) and not mixer.one_hot


def _may_run_on_cpu(mixer: "LinearRecurrence") -> bool:
    return mixer.backend in ("auto", "cpu") and mixer.state_shape[0] <= kernels.MAX_ORDER


def _allowed_on_gpu(mixer: "LinearRecurrence") -> bool:
    from statemix.scan.gpu import MAX_ORDER  # when it is first asked for

    return mixer.backend in ("auto", "gpu") and mixer.state_shape[0] <= MAX_ORDER and not mixer.one_hot


RECURRENCE = fused.Part(
    parts={
        "raw_gates": fused.Part(RawGates, parts={"projection": fused.AFFINE}),
        "values": fused.LINEAR,
        "output": fused.LINEAR,
    },
    settings=["normalization", "kind", "backend", "state_shape", "one_hot", "hidden"],
    allows=_allowed_on_cpu,
    calls=["forward", "mix"],
    arrange=_recurrence_step,
)
ROWS = RECURRENCE.without("output", allows=lambda mixer: True)  # its raw gates and values, by whatever engine
HIDDEN_RECURRENCE = RECURRENCE.on(fused.CPU, allows=_allowed_hidden, arrange=lambda mixer, weights: weights)
ONE_HOT_RECURRENCE = RECURRENCE.on(fused.CPU, allows=_may_run_on_cpu, arrange=lambda mixer, weights: weights)
RECURRENCE_ON_GPU = RECURRENCE.on(fused.GPU, allows=_allowed_on_gpu, arrange=lambda mixer, weights: weights)


def one_hot_rows(weights: Tensor) -> Tensor:
    """Rows (..., M + 1, N) in which the largest weight is 1 or -1 and the others are 0, with the gradient of `weights`.

    It is what sharpened gates come to, with the same shares where weights are equal, and can be trained: a
    straight-through estimate (Bengio et al. 2013, arXiv 1308.3432).
    """
    with torch.no_grad():
        sizes = weights.abs()
        rows = (sizes == sizes.amax(-2, keepdim=True)).to(weights.dtype)  # four times as fast as argmax and scatter
        rows = rows / rows.sum(-2, keepdim=True) * weights.sign()
    return rows + (weights - weights.detach())


class LinearRecurrence(Mixer):
    """Raw gates and values from x, a scan with gates normalised row by row, and a read-out: BD-LRU and H-LRU.

    A subclass sets what is declared here. Where fused.py says that a kernel may stand in for `RECURRENCE`, the whole
    layer is one operator, and on a GPU a scan between two products; elsewhere, as without selection, its products are
    those of its parts.
    """

    has_gate_rows = True
    plain_options: ClassVar = {"backend": "reference"}
    one_hot: bool  # True: `forward` takes the largest weight of each row for all of it, see `one_hot_rows`
    heard: Tensor | None  # only with `one_hot`: the blocks that the read-out has weights for; None: all of them
    kind: str  # of the scan: block, companion or observer
    normalization: str
    backend: str
    recompute: bool | None
    raw_gates: RawGates
    values: nn.Linear
    output: nn.Linear

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.forward`."""
        visibility = self._visibility(x)
        if x.shape[1] == 1 and reset is None and (stepped := self._fused_step(x[:, 0], state)) is not None:
            return stepped[0][:, None], stepped[1]
        # below, packing the weights for the fused products takes longer than the products; an exported program is for
        # all sizes
        long = torch.compiler.is_exporting() or x.shape[0] * x.shape[1] >= 32
        if long and (fused_results := self._fused_mix(x, state, reset, visibility)) is not None:
            return fused_results
        return self._scan(self._gates(x), self._values(x), state, reset, visibility, x.dtype)

    def shares_rows(self, positions: int) -> bool:
        """Where a kernel reads the table; else in training, unless the raw gates at full length are not to be kept."""
        if self.raw_gates.projection is None or not ROWS.runs_its_own(self) or not ROWS.reads(self):
            return False
        if (ONE_HOT_RECURRENCE if self.one_hot else self._part_on_cpu).reads(self):
            return True
        if not torch.is_grad_enabled():  # one operator is faster
            return False
        weight = self.raw_gates.projection.weight
        size = positions * len(weight) * weight.element_size()
        return not self.recompute and (self.recompute is False or size <= kernels.KEPT_BYTES)

    def mix_rows(self, rows: Rows, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Mixer.mix_rows`."""
        visibility, dtype = self._visibility(rows.places), rows.table.dtype
        if self.one_hot:
            fused_results = self._fused_one_hot(rows, state, reset, visibility)
        else:
            fused_results = self._fused_mix(rows.table, state, reset, visibility, rows.places)
        if fused_results is not None:
            return fused_results
        return self._scan(rows.each(self._gates), rows.each(self._values), state, reset, visibility, dtype)

    @property
    def _part_on_cpu(self) -> fused.Part:
        return HIDDEN_RECURRENCE if self.hidden else RECURRENCE

    def _visibility(self, x: Tensor) -> Tensor | None:
        """What the read-out sees of each block, (B, N): a share `hidden` of them not at all, and more of the others."""
        if self.hidden == 0:
            return None
        seen = torch.rand(len(x), self.state_shape[1], device=x.device) >= self.hidden
        return seen.to(self.output.weight.dtype) / (1 - self.hidden)

    def _gates(self, x: Tensor) -> Tensor:
        """Raw gates; with `one_hot` the weights themselves."""
        if not self.one_hot:
            raw_gates: Tensor = self.raw_gates(x)
            return raw_gates
        return one_hot_rows(normalize(self.raw_gates(x, self.heard), self.normalization, dim=-2))

    def _values(self, x: Tensor) -> Tensor:
        """Values (B, T, M N or N), of the blocks that are heard alone."""
        if self.heard is None:
            values: Tensor = self.values(x)
            return values
        return _project(self.values, x, self.heard, self.state_shape[1])

    def _scan(
        self,
        gates: Tensor,
        values: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        visibility: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Of `_gates` and values, (B, T, ...), the outputs in a dtype and the final state, 0 of blocks not heard."""
        state, visibility = self._of_heard(state), self._of_heard(visibility)
        if self.kind == "block":
            values = values.unflatten(2, (self.state_shape[0], -1))
        states, final_state = scan_to_state(
            self.kind,
            gates.to(values.dtype),
            values,
            state,
            normalization="none" if self.one_hot else self.normalization,
            reset=reset,
            backend=self.backend,
        )
        if self.kind == "companion":
            states = lagged_states(states, state, reset, self.state_shape[0])
        states = states.to(dtype)
        if visibility is not None:
            states = states * visibility[:, None, None].to(dtype)
        if self.heard is None:
            return self.output(states.flatten(2)), final_state
        return nn.functional.linear(states.flatten(2), self._output_weight()), self._whole(final_state)

    def _of_heard(self, numbers: Tensor | None) -> Tensor | None:
        """Of numbers (..., N) those of the blocks that are heard."""
        return numbers if numbers is None or self.heard is None else numbers[..., self.heard]

    def _output_weight(self) -> Tensor:
        """Of the read-out, (D, M N), of the blocks that are heard alone."""
        if self.heard is None:
            return self.output.weight
        return self.output.weight.unflatten(1, (-1, self.state_shape[1]))[..., self.heard].flatten(1)

    def _whole(self, state: Tensor) -> Tensor:
        """A state of the blocks that are heard, with zeros for the others, (B, M, N)."""
        if self.heard is None:
            return state
        return state.new_zeros(len(state), *self.state_shape).index_copy(2, self.heard, state)

    def row_entropy(self, x: Tensor) -> Tensor:
        """Mean over a step's rows of gates of -sum_j |p_j| ln |p_j|, in nats: x (B, T, D) to (B, T); 0 if one-hot.

        A row of a block that is not heard counts as one that is one-hot.
        """
        weights = normalize(self.raw_gates(x, self.heard), self.normalization, dim=-2).abs()
        # the slope of w ln w is infinite where a weight is zero in floating point
        logarithms = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        entropies = -(weights * logarithms).sum(-2).flatten(2)
        return entropies.mean(-1) * (weights.shape[-1] / self.state_shape[1])

    @classmethod
    def sharpens(cls, options: Mapping[str, Any]) -> bool:
        """See `Mixer.sharpens`."""
        return bool(options["normalization"] == "softmax")

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

    def step(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Mixer.step`. Without gradients it is one fused call, which allocates its results and nothing else."""
        state = self._kept(state, reset, x)
        if RECURRENCE.plainly_called(self) and (stepped := self._fused_step(x, state)) is not None:
            return stepped
        return super().step(x, state)

    def transitions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A_t (B, T, N, M, M) and a0_t (B, T, N, M) at every step of x (B, T, D): see `analysis.transitions`."""
        return transitions(self.raw_gates(x), normalization=self.normalization, kind=self.kind)

    def _fused_mix(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        visibility: Tensor | None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """`mix`, or with places of rows x `mix_rows`, by the kernels for a layer; None where they do not serve."""
        on_gpu = x.is_cuda or self.backend == "gpu"  # "auto" never takes the emulator
        part = RECURRENCE_ON_GPU if on_gpu else self._part_on_cpu
        if on_gpu and places is not None:
            return None
        if not fused.serves(part.engine, x, state, reset) or (inputs := part.inputs(self)) is None:
            return None
        weights = inputs.weights if part is RECURRENCE else inputs
        if weights[0].dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        if on_gpu:
            from statemix.scan.gpu.layer import layer

            return layer(
                x,
                weights,
                state,
                reset,
                visibility,
                normalization=self.normalization,
                kind=self.kind,
                order=self.state_shape[0],
            )
        return kernels.layer(
            x,
            weights,
            state,
            reset,
            visibility,
            places,
            normalization=self.normalization,
            kind=self.kind,
            order=self.state_shape[0],
            recompute=self.recompute,
        )

    def _fused_one_hot(
        self, rows: Rows, state: Tensor | None, reset: Tensor | None, visibility: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """`mix_rows` with one-hot rows of gates, by the kernels for a layer; None where they do not serve.

        To the kernel weights and values are the columns of what projects another table: a row of the identity for each
        row of this one. A product with it changes no bit, and the gradient of a column is that of its row.
        """
        table, places = rows
        if len(table) > self.d_model or (self.heard is not None and len(self.heard) == 0):
            return None
        if not fused.serves(fused.CPU, table, state, reset) or ONE_HOT_RECURRENCE.inputs(self) is None:
            return None
        columns = (0, self.d_model - len(table))
        weights = nn.functional.pad(self._gates(table[None])[0].flatten(1).mT, columns)
        values = nn.functional.pad(self._values(table[None])[0].mT, columns)
        if weights.dtype != table.dtype:
            return None
        y, final_state = kernels.layer(
            torch.eye(len(table), self.d_model, dtype=table.dtype),
            (weights, weights.new_zeros(len(weights)), values, self._output_weight()),
            self._of_heard(state),
            reset,
            self._of_heard(visibility),
            places,
            normalization="none",
            kind=self.kind,
            order=self.state_shape[0],
            recompute=self.recompute,
        )
        return y, self._whole(final_state)

    def _fused_step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The step as one call, or None where that does not serve."""
        state = fused.step_state(x, state, (self.d_model, *self.state_shape))
        if state is None or (step := RECURRENCE.inputs(self)) is None or step.weights[0].dtype != x.dtype:
            return None
        return step(x, state)
