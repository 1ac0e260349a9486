"""One token without gradients: through a mixer, a residual pair of mixer and SwiGLU, or a whole model (csrc/step.h)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from statemix.kernels.layers import Weights
from statemix.kernels.library import (
    KINDS,
    NORMALIZATIONS,
    STORAGES,
    LayerCall,
    ModelCall,
    PairCall,
    ReadoutCall,
    library,
)
from statemix.kernels.memory import address, dense

STEP_ROWS = 64  # torch's products of more rows at once are as fast where the weights are large


@dataclass(frozen=True, eq=False)
class LayerStep:
    """One step of `layer` without gradients: x (B, D) and a state to y (B, D) and the next state.

    The addresses of the weights are those of the first step: whoever keeps this watches them.

    Args:
        weights, normalization, kind: as in `layer`; the weights must be dense.
        state_shape: (M, N).
    """

    weights: Weights
    state_shape: tuple[int, int]
    normalization: str
    kind: str

    @cached_property
    def problem(self) -> LayerCall:
        """The struct of a step but for what each has of its own; a step copies it, as threads may make some at once."""
        gate_weight, gate_bias, value_weight, output_weight = self.weights
        order, blocks = self.state_shape
        return LayerCall(
            length=1,
            width=gate_weight.shape[1],
            order=order,
            blocks=blocks,
            kind=KINDS[self.kind],
            normalization=NORMALIZATIONS[self.normalization],
            storage=STORAGES[gate_weight.dtype],
            gate_weight=address(gate_weight),
            gate_bias=address(gate_bias),
            value_weight=address(value_weight),
            output_weight=address(output_weight),
        )

    def __call__(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Y and the next state, new tensors."""
        x, state = dense(x), dense(state)
        y, final_state = torch.empty_like(x), torch.empty_like(state)
        problem = LayerCall.from_buffer_copy(self.problem)
        _fill(problem, x, state, y, final_state)
        library().run("statemix_layer_step", problem)
        return y, final_state


@dataclass(frozen=True, eq=False)
class PairStep:
    """One step of z = x + mixer(norm(x)) and z + SwiGLU(norm(z)): see `LayerStep`.

    Args:
        mixer: its step.
        mixer_norm, mlp_norm: (D,), with their epsilons.
        gate_and_input: (2 H, D), the gates first.
        mlp_output: (D, H).
    """

    mixer: LayerStep
    mixer_norm: Tensor
    mlp_norm: Tensor
    gate_and_input: Tensor
    mlp_output: Tensor
    mixer_epsilon: float
    mlp_epsilon: float

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """All of them, dense and of one dtype."""
        return (*self.mixer.weights, self.mixer_norm, self.mlp_norm, self.gate_and_input, self.mlp_output)

    @cached_property
    def problem(self) -> PairCall:
        """See `LayerStep.problem`."""
        return PairCall(
            mixer=self.mixer.problem,
            mlp_size=self.mlp_output.shape[1],
            mixer_epsilon=self.mixer_epsilon,
            mlp_epsilon=self.mlp_epsilon,
            mixer_norm=address(self.mixer_norm),
            mlp_norm=address(self.mlp_norm),
            gate_and_input=address(self.gate_and_input),
            mlp_output=address(self.mlp_output),
        )

    def __call__(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Y and the next state, new tensors."""
        x, state = dense(x), dense(state)
        y, final_state = torch.empty_like(x), torch.empty_like(state)
        library().run("statemix_pair_step", self.filled(x, state, y, final_state))
        return y, final_state

    def filled(self, x: Tensor, state: Tensor, y: Tensor, final_state: Tensor) -> PairCall:
        """The struct of a step between these."""
        problem = PairCall.from_buffer_copy(self.problem)
        _fill(problem.mixer, x, state, y, final_state)
        return problem


class ModelStep:
    """Tokens (B,) to logits (B, V) of a whole model, one token of each row at a call, without gradients.

    The addresses of weights and states are those of this moment: whoever keeps a step watches them. The states are
    changed in place. Its room is used by one call at a time.

    Args:
        embedding: (V, D).
        pairs: of each layer, its step and its state (B, M, N), dense.
        norm: weight of the last RMS norm (D,).
        epsilon: of it.
        head: (V, D).
        batch: B.
    """

    def __init__(
        self,
        embedding: Tensor,
        pairs: Sequence[tuple[PairStep, Tensor]],
        norm: Tensor,
        epsilon: float,
        head: Tensor,
        batch: int,
    ) -> None:
        stream = embedding.new_empty(batch, embedding.shape[1])
        problems = [pair.filled(stream, state, stream, state) for pair, state in pairs]
        self._pairs = (PairCall * len(pairs))(*problems)
        readout = ReadoutCall(
            batch=batch,
            width=embedding.shape[1],
            count=head.shape[0],
            storage=STORAGES[head.dtype],
            epsilon=epsilon,
            x=address(stream),
            norm=address(norm),
            weight=address(head),
        )
        self._problem = ModelCall(
            vocabulary=embedding.shape[0],
            layers=len(pairs),
            embedding=address(embedding),
            stream=address(stream),
            pairs=ctypes.addressof(self._pairs),
            readout=readout,
        )
        self._readout, self._size = self._problem.readout, (batch, head.shape[0])
        self._use_threads(torch.get_num_threads())
        self._logits = head.new_empty(0)
        # an alias keeps the memory, also where `parameter.data` is exchanged
        of_pairs = [tensor for pair, state in pairs for tensor in (*pair.weights, state)]
        self._kept = [tensor.detach() for tensor in (embedding, stream, norm, head, *of_pairs)]

    def _use_threads(self, threads: int) -> None:
        self._threads = self._readout.threads = threads
        for pair in self._pairs:
            pair.mixer.threads = threads

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B,), integers. Raises IndexError, before anything changes, if one is outside [0, V)."""
        if tokens.dtype is not torch.int64 or not tokens.is_cpu:
            tokens = tokens.to("cpu", torch.int64)
        tokens, problem, threads = dense(tokens), self._problem, torch.get_num_threads()
        if threads != self._threads:
            self._use_threads(threads)
        logits = self._logits.new_empty(self._size)
        problem.tokens, self._readout.y = address(tokens), address(logits)
        if row := library().run("statemix_model_step", problem):  # counted from 1
            raise IndexError(f"step: `tokens` must be in [0, {problem.vocabulary}), got {tokens[row - 1]}.")
        return logits


def _fill(problem: LayerCall, x: Tensor, state: Tensor, y: Tensor, final_state: Tensor) -> None:
    problem.batch, problem.threads = len(x), torch.get_num_threads()
    problem.x, problem.initial_state = address(x), address(state)
    problem.y, problem.final_state = address(y), address(final_state)
