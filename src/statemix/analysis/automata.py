"""Automata: what a task asks for at every length, the least with the same outputs, and which blocks could follow one.

An automaton is partial: a token that cannot come in a state has no transition there. A task that begins with a start
token, or has symbols that only follow one another, so says which words it has.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from statemix.analysis.groups import images_of
from statemix.analysis.permutations import Table, permuted
from statemix.analysis.spectra import check_square

NONE = -1  # no transition, or no output


@dataclass(frozen=True, eq=False)
class Automaton:
    """A finite automaton with an output at each transition (Mealy 1955): targets of tokens, for words of every length.

    Parity of bits, after a start token 2 whose target is not scored:

        state             token 0     token 1     token 2
        0  before                                 to 1
        1  even           to 1, 0     to 2, 1
        2  odd            to 2, 1     to 1, 0

        Automaton([[-1, -1, 1], [1, 2, -1], [2, 1, -1]], [[-1, -1, -1], [0, 1, -1], [1, 0, -1]])

    Args:
        transitions: (S, X) integers, the state after each token in each state; NONE where that token cannot come.
        outputs: (S, X) integers, what is said at that token; NONE where nothing is.
        start: the state before the first token.

    Raises:
        ValueError: the shapes differ or are no tables, a state is not in [0, S), or there is an output below NONE, or
            at a token that cannot come.
    """

    transitions: Table
    outputs: Table
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("transitions", "outputs"):
            table = np.asarray(getattr(self, name))
            if table.ndim != 2 or 0 in table.shape or table.dtype.kind != "i":
                wanted = "be integers of shape (S, X) with S, X of at least 1"
                raise ValueError(f"Automaton: `{name}` must {wanted}, got {table.dtype} of shape {table.shape}.")
            object.__setattr__(self, name, table.astype(np.int64))
        shape, states = self.transitions.shape, len(self.transitions)
        if self.outputs.shape != shape:
            got = self.outputs.shape
            raise ValueError(f"Automaton: `outputs` must have the shape of `transitions` = {shape}, got {got}.")
        for name, state, least in (("transitions", self.transitions, NONE), ("start", np.array(self.start), 0)):
            if state.min() < least or state.max() >= states:
                wrong = state.min() if state.min() < least else state.max()
                raise ValueError(f"Automaton: `{name}` must be in [{least}, S) = [{least}, {states}), got {wrong}.")
        if self.outputs.min() < NONE or (self.outputs[self.transitions == NONE] != NONE).any():
            raise ValueError(f"Automaton: `outputs` must be at least {NONE}, and {NONE} where there is no transition.")

    def preceded_by(self, token: int) -> Self:
        """The same behind one token more, which comes at the start alone and has no output; it takes a new last state.

        Raises:
            ValueError: the token is outside [0, X), or some state has a transition by it.
        """
        states, tokens = self.transitions.shape
        if not 0 <= token < tokens or (self.transitions[:, token] != NONE).any():
            raise ValueError(f"Automaton: `token` must be in [0, {tokens}) and without a transition, got {token}.")
        before = np.full((1, tokens), NONE)
        transitions = np.concatenate([self.transitions, before])
        transitions[states, token] = self.start
        return type(self)(transitions, np.concatenate([self.outputs, before]), states)

    def run(self, tokens: Table) -> Table:
        """The outputs (B, T) of words (B, T).

        Raises:
            ValueError: a word has a token that cannot come there.
        """
        said, state = np.full_like(tokens, NONE), np.full(len(tokens), self.start)
        for t, token in enumerate(tokens.T):
            said[:, t] = self.outputs[state, token]
            state = self.transitions[state, token]
            if (state == NONE).any():
                word = tokens[(state == NONE).argmax(), : t + 1].tolist()
                raise ValueError(f"Automaton.run: `tokens` must be words of the automaton, got {word}.")
        return said

    def minimal(self) -> Self:
        """The least automaton with the same words and outputs, its states in the order of `in_order`.

        Two automata say the same of every word if, and only if, their minimal ones are equal, table for table. States
        are one until a token, or an output at it, tells them apart (Moore 1956).
        """
        part = self.in_order()
        kinds, count = _kinds(np.where(part.transitions == NONE, NONE - 1, part.outputs)), 0
        while kinds.max() >= count:
            count = kinds.max() + 1
            after = np.where(part.transitions == NONE, NONE, kinds[part.transitions])
            kinds = _kinds(np.column_stack([kinds, after]))
        first = np.unique(kinds, return_index=True)[1]
        merged = np.where(part.transitions == NONE, NONE, kinds[part.transitions])[first]
        return type(self)(merged, part.outputs[first], int(kinds[part.start])).in_order()

    def in_order(self) -> Self:
        """The states that words lead to, numbered as a search meets them: shorter words first, and lower tokens."""
        order, numbers = [self.start], {self.start: 0}
        for state in order:
            for after in self.transitions[state].tolist():
                if after != NONE and after not in numbers:
                    numbers[after] = len(order)
                    order.append(after)
        renumbered = np.full(len(self.transitions) + 1, NONE)  # the last is that of NONE
        renumbered[order] = np.arange(len(order))
        return type(self)(renumbered[self.transitions[order]], self.outputs[order])


def _kinds(rows: Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of each row among the different ones."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def needed_block_size(transition: Tensor, moves: Table, start: int, *, within: float = 1.4) -> int | None:
    """The smallest M with which blocks could follow what these larger ones follow: read off one trained model.

    Each set of components that the tokens permute on their own, in any block, is a part of the model that a block of
    that size could hold. It follows the task if its permutations are a function of the task's state. M is the size up
    to which these sets together tell all states apart.

    Args:
        transition: of each token, (X, N, M, M), M up to 8.
        moves: (S, X), the state of the task after each token in each of its states.
        start: the state in which a sequence begins.
        within: as in `representation`, but looser: two permutations are 2 apart, and that they are a function of the
            state for all of its words is no accident.

    Returns:
        M, or None if even all together do not tell the states apart: the model has not learned them, or not like this.
    """
    check_square("needed_block_size", transition)
    signatures: dict[int, list[dict[int, Tensor]]] = {}
    for block in transition.unbind(1):
        for components, permutations, _ in permuted(block, within):
            images = images_of(permutations, moves, start, "antihomomorphism")
            if images is not None:
                signatures.setdefault(len(components), []).append(images)
    classes: dict[int, tuple[int, ...]] = dict.fromkeys(_reached(moves, start), ())
    for size in sorted(signatures):
        for images in signatures[size]:
            kinds = torch.stack(list(images.values())).flatten(1).unique(dim=0, return_inverse=True)[1].tolist()
            classes = {state: (*classes[state], kind) for state, kind in zip(images, kinds, strict=True)}
        if len(set(classes.values())) == len(classes):
            return size
    return None


def _reached(moves: Table, start: int) -> set[int]:
    """The states that some word leads to."""
    reached, frontier = {start}, [start]
    while frontier:
        new = set(moves[frontier.pop()].tolist()) - reached
        reached |= new
        frontier += new
    return reached
