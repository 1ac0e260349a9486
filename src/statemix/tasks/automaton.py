"""A task as a finite automaton: what a machine that follows it exactly has to know of a word."""

from typing import NamedTuple

import numpy as np

from statemix.tasks.base import IGNORE_INDEX, Tokens

Labels = np.ndarray[tuple[int], np.dtype[np.int64]]

NOWHERE = -1  # a move that no word of the task makes


class Automaton(NamedTuple):
    """States, how tokens move them, and what they answer.

    moves: (S, V) int64, the state after each token in each state; NOWHERE where no word goes on so.
    labels: (S,) int64, the target of the token that led to the state; IGNORE_INDEX where it has none.
    start: the state in which nothing has been read.
    """

    moves: Tokens
    labels: Labels
    start: int


def automaton_of_words(moves: Tokens, labels: Labels, first: int, vocab_size: int, start: bool) -> Automaton:
    """The automaton of words over symbols, with a beginning of its own, whose answer no one asks for.

    Args:
        moves: (S, X), of the X symbols alone, which are the first tokens.
        labels: (S,).
        first: the state of the empty word.
        vocab_size: V, with padding and start token, of which no word makes a move.
        start: whether each word has the last token of the vocabulary before it.
    """
    states, symbols = moves.shape
    whole = np.full((states + 1 + start, vocab_size), NOWHERE, dtype=np.int64)
    whole[:states, :symbols] = moves
    whole[states, :symbols] = moves[first]  # as the first state, but without its answer
    if start:
        whole[states + 1, -1] = states
    return Automaton(whole, np.concatenate((labels, [IGNORE_INDEX] * (1 + start))), states + start)
