"""What every task shares: its contract, batches, disjoint splits, finite training sets, accuracies.

Of a task that draws its sequences, a split is a property of the sequence itself: a hash of its tokens says whether it
belongs to training, validation or test. So the three never overlap, whatever the seeds, the number of batches, or the
number of processes. A text is cut by position instead.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from statemix.analysis import Automaton
from statemix.text.tokenizer import Tokenizer

IGNORE_INDEX = -100  # a target that is not scored

# split -> buckets of the sequence hash, out of 8
SPLITS: dict[str, tuple[int, ...]] = {"train": (2, 3, 4, 5, 6, 7), "valid": (0,), "test": (1,)}

COMPAT = ("none", "mad")  # whether a task of MAD trains as defined here, or as MAD does

TRIES = 100  # how often a split is searched in vain before a task is said to have no sequence for it

Tokens = np.ndarray[tuple[int, int], np.dtype[np.int64]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


class Batch(NamedTuple):
    """Tokens (B, T) and targets (B, T), int64; a target of IGNORE_INDEX is not scored.

    reset (B, T) bool: where a document begins, before which the state is zero. None: nowhere.
    """

    tokens: Tensor
    targets: Tensor
    reset: Tensor | None = None


class Task(ABC):
    """Sequences to draw and the targets they have. A subclass is a frozen dataclass, whose fields are the options.

    It defines `name`, `vocab_size`, `seq_len`, `chance`, `generate` and `oracle`; `targets`, `length` and `pad` where
    they are not the ones here.
    """

    name: ClassVar[str]  # in TASKS; of one that does not set it, its path
    autoencoder: ClassVar[bool] = False  # True: read all tokens, then predict all targets from the last position
    later: ClassVar[tuple[str, ...]] = ()  # options that it has not had in version 0.1.0 from its start
    can_carry: ClassVar[bool] = False  # True: `carried` has batches whose rows go on where the last batch's stopped

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, of the embedding and of the logits."""

    @property
    @abstractmethod
    def seq_len(self) -> int:
        """L, in tokens."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Token accuracy of guessing uniformly among the targets there are, in (0, 1]; 0 where that is no measure."""

    @property
    def length(self) -> int:
        """T, tokens in each sequence that `sample` returns."""
        return self.seq_len

    @property
    def pad(self) -> int | None:
        """The token that fills a sequence up to T and is no part of it. None: there is none."""
        return None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are: always training and validation."""
        return tuple(SPLITS)

    @property
    def vocabulary(self) -> Tokenizer | None:
        """What the tokens stand for, if they are text."""
        return None

    @property
    def token_names(self) -> tuple[str, ...]:
        """What the tokens of the vocabulary are called, where they are no text: their numbers, if nothing else."""
        return tuple(map(str, range(self.vocab_size)))

    @property
    def fingerprint(self) -> str | None:
        """Of the data, if they are read: a run goes on with the same data alone. None: the options determine them."""
        return None

    def automaton(self) -> Automaton:
        """What says the targets of the task's words at every length, its tokens as columns.

        Where the last position alone is scored, each at which a word may end has its output. Lengths that a task leaves
        out, such as the shortest, are words too.

        Raises:
            ValueError: there is no finite one.
        """
        raise ValueError(f"{self.name}: no finite automaton says its targets at every length.")

    def with_seq_len(self, seq_len: int) -> Self:
        """The same task at another length."""
        return type(self)(**(vars(self) | {"seq_len": seq_len}))

    def with_lengths(self, shortest: int, longest: int) -> Self:
        """The same task with lengths uniform in a range. Raises ValueError if its sequences have one length."""
        raise ValueError(f"{self.name}: its sequences have one length, not those of a range.")

    def sample(self, split: str, batch_size: int, *, seed: int = 0, index: int = 0) -> Batch:
        """Batch number `index` of a split's stream: a pure function of its arguments. Splits never overlap.

        Raises:
            TypeError: a number is not an int.
            ValueError: the split is unknown, a number is out of range, or the task has no sequence for the split.
        """
        tokens = self.draw(split, batch_size, seed, index)
        return to_batch(tokens, self.targets(tokens, split))

    def evaluation(self, split: str, sequences: int, batch_size: int) -> Iterator[Batch]:
        """Fixed batches of the split, of so many sequences in all, or of as many as there are. Raises as `sample`.

        Where `can_carry`, row r of each batch goes on where row r of the last one stopped; later ones may have fewer.
        """
        for index, start in enumerate(range(0, sequences, batch_size)):
            yield self.sample(split, min(batch_size, sequences - start), index=index)

    def carried(self, batch_size: int, *, seed: int = 0, index: int = 0) -> Batch:
        """Training batch number `index` of those in which each row goes on where it stopped in the last one.

        Raises:
            TypeError, ValueError: as `sample`; or the sequences of this task do not go on.
        """
        raise ValueError(f"{self.name}: its sequences have an end, so that no state is carried to the next batch.")

    def draw(self, split: str, count: int, seed: int, index: int) -> Tokens:
        """The tokens (count, T) of a sample, the same for the same arguments in any process. Raises as `sample`."""
        rng = stream(split, count, seed, index)
        found: list[Tokens] = []
        missing, tries = count, 0
        while missing > 0:
            candidates = self.generate(rng, 8 + missing * 9 // len(SPLITS[split]), split)
            chosen = candidates[in_split(candidates, split, self.pad)][:missing]
            found.append(chosen)
            missing -= len(chosen)
            tries = 0 if len(chosen) else tries + 1
            if tries == TRIES:
                raise too_few(split, candidates.shape[1])
        return np.concatenate(found)

    @abstractmethod
    def generate(self, rng: np.random.Generator, count: int, split: str) -> Tokens:
        """`count` sequences (count, T), drawn independently; those that belong to another split are dropped later."""

    @abstractmethod
    def oracle(self, tokens: Tokens) -> Tokens:
        """The scored targets (B, T) of tokens (B, T), from the definition and the tokens alone."""

    def targets(self, tokens: Tokens, split: str) -> Tokens:
        """What a sample of the split has as targets: the oracle's, unless a task trains on more."""
        return self.oracle(tokens)

    def check_int(self, option: str, least: int) -> None:
        """Raise TypeError or ValueError unless an option is an int of at least `least`."""
        value = getattr(self, option)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{self.name}: `{option}` must be an int, got {value!r}.")
        if value < least:
            raise ValueError(f"{self.name}: `{option}` must be at least {least}, got {value}.")
        if value >= 2**63:
            raise ValueError(f"{self.name}: `{option}` must be below 2^63, got {value}.")

    def check_flag(self, option: str) -> None:
        """Raise TypeError unless an option is a bool."""
        value = getattr(self, option)
        if not isinstance(value, bool):
            raise TypeError(f"{self.name}: `{option}` must be True or False, got {value!r}.")

    def check_choice(self, option: str, allowed: tuple[str, ...]) -> None:
        """Raise ValueError unless an option is one of the allowed names."""
        value = getattr(self, option)
        if value not in allowed:
            raise ValueError(f"{self.name}: `{option}` must be one of {sorted(allowed)}, got {value!r}.")


def stream(split: str, count: int, seed: int, index: int) -> np.random.Generator:
    """The random numbers for batch `index` of a split's stream, of `count` sequences.

    Raises:
        TypeError: a number is not an int.
        ValueError: the split is unknown, or a number is out of range.
    """
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"sample: `split` must be one of {sorted(SPLITS)}, got {split!r}.")
    _check_numbers("sample", ("batch_size", count, 1), ("seed", seed, 0), ("index", index, 0))
    if count >= 2**31:
        raise ValueError(f"sample: `batch_size` must be below 2^31, got {count}.")
    return np.random.default_rng([*seed_words(seed, index), *(1 + bucket for bucket in SPLITS[split])])


def in_split(tokens: Tokens, split: str, pad: int | None = None) -> Mask:
    """Which rows (B, T) belong to the split, (B,)."""
    return np.isin(sequence_hash(tokens, pad) % np.uint64(8), SPLITS[split])


def too_few(split: str, length: int) -> ValueError:
    """What is raised when a split has no sequence of the length."""
    return ValueError(
        f"sample: no sequence of length {length} belongs to split {split!r}: the task has too few "
        "sequences. Ask for longer ones or a larger vocabulary."
    )


def sequence_hash(tokens: Tokens, pad: int | None = None) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A 64-bit hash of each row, (B, T) -> (B,), the same on every machine (FNV-1a, finished as in splitmix64).

    Tokens equal to `pad` are left out, so that a sequence belongs to the same split whatever it is padded to.
    """
    state = np.full(tokens.shape[0], 0xCBF29CE484222325, dtype=np.uint64)
    for column in tokens.T:
        mixed = (state ^ column.astype(np.uint64)) * np.uint64(0x100000001B3)
        state = mixed if pad is None else np.where(column == pad, state, mixed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def finite_batch(task: Task, sequences: int, batch_size: int, *, seed: int = 0, step: int = 0) -> Batch:
    """The batch of one step of training in epochs on a finite set: the sample of `sequences` sequences at index 0.

    Every epoch is a new order of the set. Batches follow one another through the epochs without a gap, so the one that
    meets the end of an epoch is completed from the next. A pure function of its arguments: a run can go on from any
    step. The last set drawn is kept in memory.

    Args:
        task: what to draw from.
        sequences: size of the training set, at least 1.
        batch_size: at least 1; above `sequences`, a batch holds some of them more than once.
        seed: of the set and of its orders.
        step: number of the batch, at least 0.

    Raises:
        TypeError, ValueError: a number is not an int or out of range, or the task has no training sequences.
    """
    least = (("sequences", sequences, 1), ("batch_size", batch_size, 1), ("seed", seed, 0), ("step", step, 0))
    _check_numbers("finite_batch", *least)
    tokens, targets, reset = _finite_set(task, sequences, seed, task.fingerprint)
    epoch, start = divmod(step * batch_size, sequences)
    end = start + batch_size
    orders = [_epoch_order(sequences, seed, epoch + i) for i in range(-(-end // sequences))]
    rows = np.concatenate(orders)[start:end]
    return Batch(tokens[rows], targets[rows], None if reset is None else reset[rows])


@functools.lru_cache(maxsize=1)
def _finite_set(task: Task, sequences: int, seed: int, fingerprint: str | None) -> Batch:
    """Shared by all steps: a caller gets copies of its rows."""
    return task.sample("train", sequences, seed=seed)


@functools.lru_cache(maxsize=2)
def _epoch_order(sequences: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # the last word sets it apart from the streams of splits
    return np.random.default_rng([*seed_words(seed, epoch), 9]).permutation(sequences)


def seed_words(*numbers: int) -> list[int]:
    """Each number as words of fixed width: numpy would read (0, 2^32) and (0, 0, 1) as one seed."""
    return [part for number in numbers for part in (number % 2**32, number // 2**32)]


def _check_numbers(caller: str, *arguments: tuple[str, int, int]) -> None:
    for name, value, least in arguments:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{caller}: `{name}` must be an int, got {value!r}.")
        if not least <= value < 2**64:
            raise ValueError(f"{caller}: `{name}` must be at least {least} and below 2^64, got {value}.")


@dataclass(frozen=True)
class Score:
    """Counts of right answers; scores of several batches add up.

    Token accuracy: right / scored over all scored tokens. Sequence accuracy: sequences with every scored token right.
    Macro accuracy: the share of right tokens among those with one target, averaged over the targets that occur.

    MAD's own number is the macro average of each batch, averaged over the batches by their size; in a batch a class
    that is only predicted counts as one with accuracy 0. It depends on the batch size, since in a small batch a
    class has few tokens or none: `mad_accuracy` is it, with the parts that were added up as batches.
    """

    right: Tensor  # (T,) int64: right tokens by position
    scored: Tensor  # (T,) int64
    sequences_right: int
    sequences: int
    class_right: Tensor  # (classes,) int64: right tokens by target
    class_scored: Tensor  # (classes,) int64
    mad_sum: float  # over parts: MAD's macro average times the number of sequences

    @classmethod
    def of(cls, predictions: Tensor, targets: Tensor) -> "Score":
        """The score of predicted tokens (B, T) against targets (B, T). Raises ValueError if the shapes differ."""
        if predictions.shape != targets.shape:
            wanted, got = tuple(targets.shape), tuple(predictions.shape)
            raise ValueError(f"Score: `predictions` must have the shape of `targets` = {wanted}, got {got}.")
        predictions, targets = predictions.cpu(), targets.cpu()
        scored = targets != IGNORE_INDEX
        right = (predictions == targets) & scored
        whole, sequences = int((right == scored).all(1).sum()), len(targets)
        class_scored = torch.bincount(targets[scored])
        class_right = torch.bincount(targets[right], minlength=len(class_scored))
        seen = len(torch.cat((targets[scored], predictions[scored])).unique())
        mad = float((class_right.double() / class_scored.clamp(min=1)).sum()) / max(seen, 1)
        return cls(right.sum(0), scored.sum(0), whole, sequences, class_right, class_scored, mad * sequences)

    def __add__(self, other: "Score") -> "Score":
        if self.right.shape != other.right.shape:
            raise ValueError(f"Score: lengths must agree to add up, got {len(self.right)} and {len(other.right)}.")
        return Score(
            self.right + other.right,
            self.scored + other.scored,
            self.sequences_right + other.sequences_right,
            self.sequences + other.sequences,
            _add_counts(self.class_right, other.class_right),
            _add_counts(self.class_scored, other.class_scored),
            self.mad_sum + other.mad_sum,
        )

    @property
    def token_accuracy(self) -> float:
        """Share of scored tokens that are right, in [0, 1]."""
        return float(self.right.sum() / self.scored.sum())

    @property
    def sequence_accuracy(self) -> float:
        """Share of sequences without a wrong token, in [0, 1]."""
        return self.sequences_right / self.sequences

    @property
    def macro_accuracy(self) -> float:
        """Mean over the targets that occur of the share of their tokens that are right, in [0, 1]."""
        occurs = self.class_scored > 0
        return float((self.class_right[occurs].double() / self.class_scored[occurs]).mean())

    @property
    def mad_accuracy(self) -> float:
        """Mean of the parts' macro averages as MAD takes it, in [0, 1]; the parts weigh by their sequences."""
        return self.mad_sum / self.sequences

    @property
    def accuracy_by_position(self) -> list[float | None]:
        """Token accuracy at each of the T positions; None where nothing is scored."""
        pairs = zip(self.right.tolist(), self.scored.tolist(), strict=True)
        return [right / scored if scored else None for right, scored in pairs]


def _add_counts(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two vectors of counts, the shorter one padded with zeros."""
    total = torch.zeros(max(len(a), len(b)), dtype=torch.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for no error.

    Raises:
        ValueError: `chance` is not in [0, 1).
    """
    if not 0 <= chance < 1:
        raise ValueError(f"scaled_accuracy: `chance` must be in [0, 1), got {chance}.")
    return (accuracy - chance) / (1 - chance)


def next_tokens(tokens: Tokens, scored: Tokens) -> Tokens:
    """MAD's training targets of the recall tasks: the next token at every position, and at the last the scored one."""
    return np.concatenate((tokens[:, 1:], scored[:, -1:]), axis=1)


def to_batch(tokens: Tokens, targets: Tokens) -> Batch:
    """NumPy tokens and targets as a batch."""
    return Batch(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))
