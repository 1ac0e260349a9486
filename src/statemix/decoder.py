"""A model that keeps its state and takes one token after another."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from statemix import fused, kernels
from statemix.backbone import State
from statemix.gates import check_dense
from statemix.model import MODEL, ModelInputs, SequenceModel


class Decoder:
    """Steps of a model without gradients, from a state that it keeps.

    Where the compiled kernels serve (BD-LRU and H-LRU in float32 or float64 on a CPU), a token is one call, from the
    embedding to the logits; a row's numbers are then, bit for bit, those that it has in a batch of one. Elsewhere it is
    `SequenceModel.step`. What is prepared once for all tokens is prepared anew as soon as the model changes: weights
    that are changed, exchanged or moved, and hooks, are seen at the next token. Threads may share a decoder; each token
    is then the next one of the same sequence.

    Args:
        model: what steps, on the device where it is.
        state: to begin with, one (B, M, N) per layer; it is not changed. None: zeros.
        batch: B of a state of zeros.

    Raises:
        ValueError: the state is not of the model, or of several batch sizes.
    """

    def __init__(self, model: SequenceModel, state: State | None = None, *, batch: int = 1) -> None:
        self.model = model
        state = model.initial_state(batch) if state is None else tuple(state)
        wanted = [(len(state[0]) if state else batch, *mixer.state_shape) for mixer in model.mixers]
        if (shapes := [tuple(part.shape) for part in state]) != wanted:
            raise ValueError(f"Decoder: `state` must be of the shapes {wanted}, one (B, M, N) per layer, got {shapes}.")
        self._state = tuple(part.detach().clone(memory_format=torch.contiguous_format) for part in state)
        self._shape = (wanted[0][0],)
        self._lock = threading.Lock()
        self._watch: fused.Watch | None = None
        self._step: kernels.ModelStep | None = None

    def _fused_step(self) -> kernels.ModelStep | None:
        """A token as one call, which changes the state in place, or None where the kernels do not serve."""
        if torch.compiler.is_compiling():
            return None
        if self._watch is None or not self._watch.holds(self.model):
            self._watch = MODEL.watch(self.model)
            self._step = None if self._watch is None else self._prepare(self._watch.inputs)
        return self._step

    def _prepare(self, inputs: ModelInputs) -> kernels.ModelStep | None:
        if any(state.dtype != inputs.head.dtype or not state.is_cpu for state in self._state):
            return None
        self._state = tuple(state.clone(memory_format=torch.contiguous_format) for state in self._state)
        pairs = list(zip(inputs.pairs, self._state, strict=True))
        rows = len(self._state[0])
        return kernels.ModelStep(inputs.embedding, pairs, inputs.norm, inputs.epsilon, inputs.head, rows)

    @property
    def state(self) -> State:
        """After the last step, one (B, M, N) per layer."""
        with self._lock:
            return tuple(part.clone() for part in self._state)

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens (B,) to logits (B, vocab_size).

        Raises:
            TypeError, ValueError, IndexError: tokens are of another type, shape or vocabulary.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"Decoder: `tokens` must be a tensor, got {type(tokens).__name__}.")
        check_dense("Decoder", "tokens", tokens)
        if tokens.shape != self._shape:
            raise ValueError(f"Decoder: `tokens` must have shape (B,) = {self._shape}, got {tuple(tokens.shape)}.")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Decoder: `tokens` must be int64 or int32, got {tokens.dtype}.")
        with self._lock:
            if (step := self._fused_step()) is not None:  # which has no gradients: no_grad would only take time
                return step(tokens)
            with torch.no_grad(), without_dropout(self.model):
                logits, self._state = self.model.step(tokens, self._state)
            self._watch = None  # it was of other states
        return logits


@contextlib.contextmanager
def without_dropout(model: SequenceModel) -> Iterator[None]:
    """The model in eval mode while it lasts: a text is no matter of chance. Then each module has its own mode again."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
