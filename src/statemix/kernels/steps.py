"""One token without gradients: through a mixer, a residual pair of mixer and SwiGLU, or a whole model (csrc/step.h)."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from statemix.kernels.layers import Weights, layer_problem
from statemix.kernels.library import STORAGES, LayerCall, ModelCall, PairCall, ReadoutCall, library
from statemix.kernels.memory import address, dense

STEP_ROWS = 64  # torch's products of more rows at once are as fast where the weights are large


def layer_step(x: Tensor, weights: Weights, state: Tensor, *, normalization: str, kind: str) -> tuple[Tensor, Tensor]:
    """One step of `layer` for x (B, D) and a state, without gradients. The weights must be dense."""
    x, state = dense(x), dense(state)
    y, final_state = torch.empty_like(x), torch.empty_like(state)
    problem = _step_problem(x, weights, state, y, final_state, normalization, kind)
    library().run("statemix_layer_step", problem)
    return y, final_state


class PairInputs(NamedTuple):
    """What z = x + mixer(norm(x)) and z + SwiGLU(norm(z)) read besides x and a state: dense weights, of one dtype.

    mixer, normalization, kind: as in `layer`. mixer_norm, mlp_norm: (D,), with their epsilons. gate_and_input:
    (2 H, D), the gates first. mlp_output: (D, H). state_shape: (M, N).
    """

    mixer: Weights
    mixer_norm: Tensor
    mlp_norm: Tensor
    gate_and_input: Tensor
    mlp_output: Tensor
    mixer_epsilon: float
    mlp_epsilon: float
    normalization: str
    kind: str
    state_shape: tuple[int, int]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.mixer, self.mixer_norm, self.mlp_norm, self.gate_and_input, self.mlp_output)


def pair_step(x: Tensor, inputs: PairInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step for x (B, D) and a state to y (B, D) and the next state, without gradients."""
    x, state = dense(x), dense(state)
    y, final_state = torch.empty_like(x), torch.empty_like(state)
    library().run("statemix_pair_step", _pair_problem(x, inputs, state, y, final_state))
    return y, final_state


class ModelStep:
    """Tokens (B,) to logits (B, V) of a whole model, one token of each row at a call, without gradients.

    The addresses of weights and states are those of this moment: whoever keeps a step watches them. The states are
    changed in place. Its room is used by one call at a time.

    Args:
        embedding: (V, D).
        pairs: of each layer, what it reads and its state (B, M, N), dense.
        norm: weight of the last RMS norm (D,).
        epsilon: of it.
        head: (V, D).
        batch: B.
    """

    def __init__(
        self,
        embedding: Tensor,
        pairs: Sequence[tuple[PairInputs, Tensor]],
        norm: Tensor,
        epsilon: float,
        head: Tensor,
        batch: int,
    ) -> None:
        stream = embedding.new_empty(batch, embedding.shape[1])
        problems = [_pair_problem(stream, inputs, state, stream, state) for inputs, state in pairs]
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
        self._use_threads(torch.get_num_threads())
        self._logits = head.new_empty(0)
        # an alias keeps the memory, also where `parameter.data` is exchanged
        of_pairs = [tensor for inputs, state in pairs for tensor in (*inputs.weights, state)]
        self._kept = [tensor.detach() for tensor in (embedding, stream, norm, head, *of_pairs)]

    def _use_threads(self, threads: int) -> None:
        self._threads = self._problem.readout.threads = threads
        for pair in self._pairs:
            pair.mixer.threads = threads

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B,), int64 on the CPU. Raises IndexError, before anything changes, if one is outside [0, V)."""
        tokens, problem, threads = dense(tokens), self._problem, torch.get_num_threads()
        if threads != self._threads:
            self._use_threads(threads)
        logits = self._logits.new_empty(problem.readout.batch, problem.readout.count)
        problem.tokens, problem.readout.y = address(tokens), address(logits)
        if row := library().run("statemix_model_step", problem):  # counted from 1
            raise IndexError(f"step: `tokens` must be in [0, {problem.vocabulary}), got {tokens[row - 1]}.")
        return logits


def _pair_problem(x: Tensor, inputs: PairInputs, state: Tensor, y: Tensor, final_state: Tensor) -> PairCall:
    return PairCall(
        mixer=_step_problem(x, inputs.mixer, state, y, final_state, inputs.normalization, inputs.kind),
        mlp_size=inputs.mlp_output.shape[1],
        mixer_epsilon=inputs.mixer_epsilon,
        mlp_epsilon=inputs.mlp_epsilon,
        mixer_norm=address(inputs.mixer_norm),
        mlp_norm=address(inputs.mlp_norm),
        gate_and_input=address(inputs.gate_and_input),
        mlp_output=address(inputs.mlp_output),
    )


def _step_problem(
    x: Tensor, weights: Weights, state: Tensor, y: Tensor, final_state: Tensor, normalization: str, kind: str
) -> LayerCall:
    problem = layer_problem(x, weights, state, None, normalization, kind)
    problem.y, problem.final_state = address(y), address(final_state)
    return problem
