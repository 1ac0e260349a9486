"""Is a model right at every length? All states that it can reach are visited, and at each all that may come next.

A layer of one-hot rows of gates copies: each component of its next state is one of the last, or a value that the layer
makes of its input. softmax rows are one-hot in floating point once the largest raw gate of a row is some hundred above
the others, as after `sharpen`. So the states of a first layer hold nothing but zeros and values of single tokens, which
are finitely many; then its outputs are, and so the inputs and the states of the next layer. The search assumes none of
this: it steps the float program itself, with the very kernels that decode, and takes states for one where all their
bits are. One-hot rows are why it comes to an end. Only what no answer can depend on is left out of them: a component
that a layer's read-out has no weight for, and that no row of gates ever copies, at one step or over many, into one that
it has a weight for. Whether a row does is seen at every transition that the search takes; where it first does, the
component is taken in, and the search begins anew.

What it visits are pairs: the states of all layers, and the state in which the task's automaton is after the same word.
Each transition of a pair is taken once (the product construction), so that an error at any word of any length is an
error at one of them; the search is breadth-first, so the first that it meets is at the end of a shortest wrong word.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from statemix import kernels
from statemix.analysis import NONE, Automaton
from statemix.backbone import State
from statemix.decoder import Decoder
from statemix.mixers.base import check_sizes
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import MODEL, SequenceModel

MAX_STATES = 1_000_000
ZERO_WEIGHT = 110.0  # a raw gate so far below the largest of its row has a weight of zero in the kernels that decode
ZERO_IN_FLOAT64 = 750.0  # and of float64, in which the other engines have it
ROUNDING = 1e-4  # of raw gates, from one kernel to another, relative to a row's largest; there is much room
WRONG_STATES = 2_000  # after an error the search goes on as far as this, for the automaton of a small wrong model


class WrongWord(NamedTuple):
    """A word at whose last token a model says another than the target."""

    word: tuple[int, ...]
    target: int
    said: int


@dataclass(frozen=True)
class Verdict:
    """What a search has found.

    states: pairs of a model's and the task's states that were visited.
    wrong: the shortest wrong word, the first of them in the order of their tokens; None if none was met.
    automaton: the least one that says what the model says where the task scores; None if not all states were visited.
    sharpened: factor of the raw gates with which the model was searched; None: as it is.
    """

    states: int
    wrong: WrongWord | None
    automaton: Automaton | None
    sharpened: float | None = None

    @property
    def outcome(self) -> str:
        """Equal, differs, or undecided: then nothing is claimed."""
        if self.wrong is not None:
            return "differs"
        return "undecided" if self.automaton is None else "equal"


def explore(model: SequenceModel, task: Automaton, *, max_states: int = MAX_STATES) -> Verdict:
    """Whether a model's answers are the outputs of an automaton at every word that it has, of any length.

    An answer is the likeliest token. The claim is about `Decoder` on this machine; where the kernels serve it, a row is
    in any batch what it is alone, and elsewhere rows are stepped one by one.

    Args:
        model: on a CPU.
        task: its tokens are those of the model.
        max_states: pairs of states to visit, at least 1; each is kept, with all numbers of the model's state.

    Raises:
        TypeError, ValueError: `max_states` is no int of at least 1, or the automaton is of another number of tokens.
        RuntimeError: the model's logits are not finite.
    """
    check_sizes("explore", max_states=max_states)
    tokens = task.transitions.shape[1]
    if tokens != model.config["vocab_size"]:
        raise ValueError(f"explore: `task` must be of the model's {model.config['vocab_size']} tokens, got {tokens}.")
    live, most = _Live(model), max_states
    search = _Search(model, task, live)
    while search.pending and len(search.pairs) <= most:
        if not search.advance():
            search = _Search(model, task, live)
        if search.wrong is not None:
            most = min(max_states, WRONG_STATES)
    if search.pending or len(search.pairs) > max_states:
        return Verdict(min(len(search.pairs), max_states), search.wrong, None)
    return Verdict(len(search.pairs), search.wrong, search.automaton().minimal())


class _Search:
    """Pairs of states in the order in which they are met, and the transitions that are still to be taken from them."""

    def __init__(self, model: SequenceModel, task: Automaton, live: "_Live") -> None:
        self.model, self.task, self.live = model, task, live
        self.rows = kernels.STEP_ROWS if _by_kernels(model) else 1
        self.wrong: WrongWord | None = None
        self.pairs: list[tuple[bytes, int]] = []
        self.words: list[tuple[int, int]] = []  # to each pair: the one before it, and the token
        self.pending: deque[tuple[int, int]] = deque()  # numbers of pairs, and a token that may come
        self.taken: list[tuple[int, int, int, int]] = []  # these two, what is said, and the pair after
        self._numbers: dict[tuple[bytes, int], int] = {}
        self._number(self._pack(model.initial_state(1))[0], task.start, (NONE, NONE))

    def advance(self) -> bool:
        """Take some transitions. False: one of them showed a component to be live, and the search must begin anew."""
        batch = [self.pending.popleft() for _ in range(min(self.rows, len(self.pending)))]
        before = [self.pairs[number] for number, _ in batch]
        state, tokens = _unpack([state for state, _ in before], self.model), torch.tensor([token for _, token in batch])
        if self.live.grows(state, tokens):
            return False
        decoder = Decoder(self.model, state)
        logits = decoder.step(tokens)
        if not logits.isfinite().all():
            raise RuntimeError("explore: the model's logits are not finite: its training diverged or a weight is NaN.")
        for (number, token), (_, of_task), said, after in zip(
            batch, before, logits.argmax(-1).tolist(), self._pack(decoder.state), strict=True
        ):
            target = int(self.task.outputs[of_task, token])
            if self.wrong is None and target not in (NONE, said):
                self.wrong = WrongWord((*self._word(number), token), target, said)
            reached = self._number(after, int(self.task.transitions[of_task, token]), (number, token))
            self.taken.append((number, token, NONE if target == NONE else said, reached))
        return True

    def automaton(self) -> Automaton:
        """Of the pairs, with what the model says where the task scores."""
        shape = len(self.pairs), self.task.transitions.shape[1]
        transitions, outputs = np.full(shape, NONE), np.full(shape, NONE)
        before, token, said, after = np.array(self.taken, dtype=np.int64).reshape(-1, 4).T
        transitions[before, token], outputs[before, token] = after, said
        return Automaton(transitions, outputs)

    def _pack(self, state: State) -> list[bytes]:
        """The bits of each row of a state, of all layers together, without what no answer depends on."""
        parts = [part.masked_fill(~live, 0) for part, live in zip(state, self.live.components, strict=True)]
        return [row.tobytes() for row in torch.cat([part.flatten(1) for part in parts], dim=1).numpy()]

    def _number(self, state: bytes, of_task: int, came_by: tuple[int, int]) -> int:
        """The number of a pair; one that is new is put behind the others, with all that may come there."""
        pair = state, of_task
        number = self._numbers.setdefault(pair, len(self.pairs))
        if number == len(self.pairs):
            self.pairs.append(pair)
            self.words.append(came_by)
            may_come = np.flatnonzero(self.task.transitions[of_task] != NONE).tolist()
            self.pending.extend((number, token) for token in may_come)
        return number

    def _word(self, number: int) -> tuple[int, ...]:
        """The word by which a pair was met first."""
        word = []
        while number:
            number, token = self.words[number]
            word.append(token)
        return tuple(reversed(word))


def _by_kernels(model: SequenceModel) -> bool:
    """Whether it is the compiled kernels that step a model."""
    return MODEL.plainly_called(model) and MODEL.inputs(model) is not None


class _Live:
    """Which components of the states an answer may depend on, as far as a search has seen.

    A component counts where the read-out has a weight for it, or a row of gates may copy it into one that counts: where
    in softmax its raw gate is not so far below the row's largest that its weight is zero.
    The others are finite, as rows that sum to one keep them, and have no part in a sum. Where the rows are no softmax
    all of a block counts if one component does, and all that there is where nothing bounds a state.

    Attributes:
        components: (M, N) bools of each layer.
    """

    def __init__(self, model: SequenceModel) -> None:
        self._model = model
        narrow = _by_kernels(model) and model.head.weight.dtype != torch.float64
        self._zero = ZERO_WEIGHT if narrow else ZERO_IN_FLOAT64
        self._copied: dict[int, Tensor] = {}  # by layer: (M, M, N), whether a block's component m may be made of k
        self.components: list[Tensor] = []
        for layer, mixer in enumerate(model.mixers):
            live = torch.ones(mixer.state_shape, dtype=torch.bool)
            if isinstance(mixer, LinearRecurrence) and mixer.normalization != "none":
                read = (mixer.output.weight.unflatten(1, (-1, mixer.state_shape[1])) != 0).any(0)
                if mixer.kind == "block" and mixer.normalization == "softmax":
                    live = read
                    self._copied[layer] = torch.zeros(mixer.state_shape[:1] + mixer.state_shape, dtype=torch.bool)
                else:
                    live = live & read.any(0)
            self.components.append(live)

    @torch.no_grad()
    def grows(self, state: State, tokens: Tensor) -> bool:
        """Look at the rows of gates of a step, tokens (B,) in these states. True: there are more live components."""
        # rows copy within a block: where all of each block that counts does, there is nothing to be found
        if all(torch.equal(live.any(0), live.all(0)) for live in self.components):
            return False
        with _raw_gates(self._model, self._copied) as raw_gates:
            self._model(tokens[:, None], state)
        grown = False
        for layer, raw in raw_gates.items():
            rows, live = raw[:, 0], self.components[layer]
            lowest = rows.amax(-2, keepdim=True) - self._zero - ROUNDING * rows.abs().amax(-2, keepdim=True)
            self._copied[layer] |= (rows >= lowest).any(0)[:, :-1]
            while not torch.equal(live, more := live | (self._copied[layer] & live[:, None]).any(0)):
                live, grown = more, True
            self.components[layer] = live
        return grown


@contextlib.contextmanager
def _raw_gates(model: SequenceModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """A dict that fills, while the model runs, with the raw gates (B, T, M, M + 1, N) of these layers."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, raw_gates: found.update({layer: raw_gates})

    hooks = [cast(LinearRecurrence, model.mixers[i]).raw_gates.register_forward_hook(keep(i)) for i in layers]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _unpack(rows: Sequence[bytes], model: SequenceModel) -> State:
    """The state whose rows were packed."""
    dtype = model.initial_state(1)[0].dtype
    numbers = torch.frombuffer(bytearray(b"".join(rows)), dtype=dtype).view(len(rows), -1)
    parts = numbers.split([mixer.state_size for mixer in model.mixers], dim=1)
    return tuple(part.unflatten(1, mixer.state_shape) for part, mixer in zip(parts, model.mixers, strict=True))
