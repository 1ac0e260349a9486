"""Backbone: a stack of pre-norm residual (mixer, SwiGLU) pairs on continuous inputs. Every model is built from it.

Initialisation is one rule for all mixers. The last map of every residual branch, `mixer.output` and `mlp.output`,
starts small enough that the sum of all branches has the same scale at any depth. With `init_std` (0.02 in MAD and in
the paper), the weights of every nn.Linear and nn.Embedding are N(0, init_std^2), and those of the branches' last maps
N(0, init_std^2 / (2 num_layers)): there are 2 num_layers branches. Without it all are as torch or the mixer makes them,
and the last maps are divided by sqrt(num_layers): a model of one pair is left as it is. Neither touches what else a
mixer sets up: biases, the ring of LRU, the decays of Mamba-2, convolutions, the matrices within torch.nn.LSTM and GRU.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statemix import fused, kernels
from statemix.gates import check_floats
from statemix.lengths import Ends
from statemix.mixers import Mixer, build_mixer, complete_mixer
from statemix.mixers.base import Rows, check_flags, check_reset, check_sizes, reset_rows
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

    def forward(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        rows: Rows | None = None,
        where: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), and the mixer's state.

        `rows` are x once more, of a pair that `shares_rows`. With `where`, (B, T) bool, the result is of K steps alone,
        (1, K, D), and so is the work of the SwiGLU.
        """
        alone = x.shape[1] == 1 and reset is None and where is None
        if alone and (stepped := self._fused_step(x[:, 0], state)) is not None:
            return stepped[0][:, None], stepped[1]
        if rows is None:
            mixed, state = self.mixer(self.mixer_norm(x), state, reset)
        else:
            mixed, state = self.mixer(self.mixer_norm(x), state, reset, Rows(self.mixer_norm(rows.table), rows.places))
        x = x + self.dropout(mixed)
        if where is not None:
            x = x[where][None]
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state

    def shares_rows(self, positions: int) -> bool:
        """Whether its mixer does, and nothing comes between x and the mixer."""
        plain = LAYER.plainly_called(self) and fused.RMS_NORM.plainly_called(self.mixer_norm)
        return plain and fused.unchanged_by_hooks(self.mixer) and self.mixer.shares_rows(positions)

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
    there. `recompute`, which may be set at any time, saves memory in training: a pair then keeps what it reads and
    nothing else, and the backward runs it again.
    """

    recompute = False
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

    def run_stack(
        self,
        x: Tensor,
        state: Sequence[Tensor] | None,
        reset: Tensor | None,
        rows: Rows | None = None,
        where: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """x (B, T, D) to the normalised residual stream (B, T, D) and the state of every layer: see `Layer.forward`."""
        return self._run(self.layers, self.norm, x, state, reset, rows, where)

    def _run(
        self,
        layers: nn.ModuleList,
        norm: nn.Module,
        x: Tensor,
        state: Sequence[Tensor] | None,
        reset: Tensor | None,
        rows: Rows | None = None,
        where: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        states = []
        for i, layer in enumerate(layers):
            before = None if state is None else state[i]
            of_ends = rows if i == 0 else None, where if i == len(layers) - 1 else None
            # a pair that someone wraps may take no more than three
            others = () if of_ends == (None, None) else of_ends
            if self.recompute and torch.is_grad_enabled():
                x, layer_state = checkpoint(layer, x, before, reset, *others, use_reentrant=False)
            else:
                x, layer_state = layer(x, before, reset, *others)
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


class Backbone(Stack):
    """Residual (mixer, SwiGLU) pairs on continuous inputs, x (B, T, D) to y (B, T, D), and a norm behind them.

    With `bidirectional` a second stack, with weights of its own, reads the sequence from its end, and y is (B, T, 2 D):
    what each direction has made of the steps that it has read, its own step among them. It needs whole sequences.

    Args:
        d_model: D, width of x and of the residual stream.
        num_layers: number of (mixer, SwiGLU) pairs, of each direction.
        mixer: a spec such as {"name": "bd_lru", "num_blocks": 16, "block_size": 3}; names in `MIXERS`.
        bidirectional: True: the sequence is read from both ends.
        mlp_size: inner width of the SwiGLU. None: 8/3 D, rounded up to a multiple of 32.
        init_std: of the first weights, see the module's docstring. None: torch's defaults.
        dropout: share of the numbers of each residual branch that are dropped in training, in [0, 1).

    Raises:
        TypeError, ValueError: a size is not a positive int, or the mixer spec is wrong.
    """

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        mixer: Spec,
        *,
        bidirectional: bool = False,
        mlp_size: int | None = None,
        init_std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, num_layers, mixer, mlp_size, init_std, dropout)
        check_flags("Backbone", bidirectional=bidirectional)
        self.config["bidirectional"] = bidirectional
        self.layers, self.norm = self._pairs()
        if bidirectional:
            self.reverse_layers, self.reverse_norm = self._pairs()
        self._initialise()

    def _all_layers(self) -> list[Layer]:
        """Those of the reverse direction come last."""
        reverse = self.reverse_layers if self.config["bidirectional"] else ()
        return super()._all_layers() + [cast(Layer, layer) for layer in reverse]

    @property
    def output_size(self) -> int:
        """Width of y: D, or 2 D of both directions."""
        return self.config["d_model"] * (2 if self.config["bidirectional"] else 1)

    if TYPE_CHECKING:  # torch says of no call what it returns

        def __call__(
            self,
            x: Tensor,
            state: Sequence[Tensor] | None = None,
            reset: Tensor | None = None,
            lengths: Tensor | None = None,
        ) -> tuple[Tensor, State]:
            """See `forward`."""

    def forward(
        self,
        x: Tensor,
        state: Sequence[Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Outputs and final state of sequences.

        What is behind the end of a sequence has no part in any number or gradient, be it NaN: y and the state are, bit
        for bit, functions of `lengths` and of what is within them.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, one (B, M, N) per layer, those of the reverse direction last. Zeros
                if None. Only without `lengths`: a state is that before the first of T steps.
            reset: (B, T) bool. True: the sequence is cut before that step, and no state goes over the cut in either
                direction. Never if None.
            lengths: (B,) integers in [1, T], of sequences that are shorter than T. All are of T steps if None.

        Returns:
            y, (B, T, D) or (B, T, 2 D) of both directions, of zeros behind the end of a sequence; and the state after
            the last step of each sequence, which is its first step in the reverse direction.

        Raises:
            TypeError, ValueError: a dtype, device or shape is wrong, T = 0, a length is not in [1, T], or a state comes
                with lengths.
        """
        self._check_input("Backbone", x, "(B, T, D)")
        self._check_state(state)
        if reset is not None:
            check_reset("Backbone", reset, x.shape[:2], x.device)
        ends = None
        if lengths is not None:
            if state is not None:
                raise ValueError(
                    "Backbone: `state` must be None where there are `lengths`: it is of the first step of x, which the "
                    "sequences do not have in common once they are moved to end together. Run rows of one length."
                )
            ends = Ends("Backbone", lengths, x)
            x, reset = ends.cut(x), None if reset is None else ends.cut(reset)
        y, final_state = self._run_ahead(x, state, reset, ends)
        if self.config["bidirectional"]:
            z, of_reverse = self._run_back(x, state, reset, ends)
            y, final_state = torch.cat([y, z], dim=2), final_state + of_reverse
        return y if ends is None else ends.pad(y), final_state

    def _run_ahead(
        self, x: Tensor, state: Sequence[Tensor] | None, reset: Tensor | None, ends: Ends | None
    ) -> tuple[Tensor, State]:
        if ends is None:
            return self.run_stack(x, state, reset)
        moved = None if reset is None else ends.together(reset)
        y, final_state = self.run_stack(ends.together(x), None, ends.starts(moved))
        return ends.apart(y), final_state

    def _run_back(
        self, x: Tensor, state: Sequence[Tensor] | None, reset: Tensor | None, ends: Ends | None
    ) -> tuple[Tensor, State]:
        """From the last step to the first; read so, what is behind the end of a sequence stands before its first."""
        if reset is not None:  # a cut between the steps t - 1 and t, from the other side
            reset = nn.functional.pad(reset[:, 1:].flip(1), (1, 0))
        if ends is not None:
            reset = ends.starts(reset)
        before = None if state is None else state[len(self.layers) :]
        y, final_state = self._run(self.reverse_layers, self.reverse_norm, x.flip(1), before, reset)
        return y.flip(1), final_state

    def step(
        self, x: Tensor, state: Sequence[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: x (B, D) and a state to y (B, D) and the next state.

        Where reset, (B,) bool, is True, the state is zero before the step. Without gradients, and up to 64 rows on a
        CPU, it is one call of the compiled kernels for each pair.

        Raises:
            TypeError, ValueError: as of `forward`, or the backbone is bidirectional.
        """
        if self.config["bidirectional"]:
            raise ValueError(
                "Backbone.step: `bidirectional` must be False, got True: the reverse direction begins at the last step."
            )
        self._check_input("Backbone.step", x, "(B, D)")
        self._check_state(state)
        state = self._kept(state, reset, x)
        plain = BACKBONE.plainly_called(self) and fused.RMS_NORM.plainly_called(self.norm)
        if torch.is_grad_enabled() or not plain or not fused.undisturbed():
            y, final_state = self(x[:, None], state)
            return y[:, 0], final_state
        return self._step_stack(x, state)

    def _check_input(self, owner: str, x: Tensor, axes: str) -> None:
        check_floats(owner, "x", x)
        own, size = self.norm.weight.dtype, self.config["d_model"]
        if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{owner}: `x` must be {own} like the parameters, got {x.dtype}.")
        if x.ndim != axes.count(",") + 1 or x.shape[-1] != size or 0 in x.shape:
            rule = f"{axes} with D = {size}, and the others at least 1"
            raise ValueError(f"{owner}: `x` must have shape {rule}, got {tuple(x.shape)}.")


BACKBONE = fused.Part(Backbone, calls=["forward", "run_stack", "_run_ahead", "_run"])
