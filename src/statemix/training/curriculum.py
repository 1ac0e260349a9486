"""Words of growing lengths packed into rows; wrong ones come again; an end where none has been wrong for long.

What a step trains on is a function of the config, the step and the state of the curriculum, which a checkpoint holds.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from statemix.model import SequenceModel, TokenModel
from statemix.search import explore
from statemix.tasks import IGNORE_INDEX, Batch
from statemix.tasks.base import Task, seed_words
from statemix.training.config import TrainConfig
from statemix.training.pruning import STATE as PRUNING
from statemix.training.pruning import Pruning, Silenced, heard_blocks, one_hot_copy

MEMORY = 0.9  # of the running accuracy, for one batch
TRIED = 8  # batches on which blocks or components are compared
SHARE = 32  # one word in so many is a short one of another split
QUERY_STATES = 1_000_000  # that a search visits at most: as `statemix verify` does
UNSEEN = 1000  # times the steps of a run: the index of the first batch for pruning, which no training has

# the form of a curriculum's state in a checkpoint, see records.py
STATE = {
    "longest": int,
    "accuracy": float,
    "quiet": int,
    "wrong": [{"tokens": [int], "targets": [int | None], "rights": int}],  # None: not scored
    "pruning?": PRUNING,
    "given?": [{"tokens": [int], "targets": [int | None]}],
    "answered?": bool,
}


class Word(NamedTuple):
    """A sequence without padding, and its targets."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


class Curriculum:
    """What a run trains on next, as `CurriculumConfig` says, and what it has come to.

    Args:
        config: with a curriculum.
        task: of the config: the lengths that are reached at last.

    Attributes:
        longest: length of the longest words now, in tokens.
        quiet: batches in a row, at the last length, without an error.
        wrong: words that were wrong -> how often they were right since; the oldest first.
        pruning: of what the model can do without. None: nothing is taken away.
        given: words that searches found wrong; they come again from then on.
        is_answered: whether no search follows: the last one found no wrong word, or there were enough of them.
    """

    def __init__(self, config: TrainConfig, task: Task) -> None:
        assert config.curriculum.first is not None
        self.config, self.options, self.task = config, config.curriculum, task
        self.longest = min(max(config.curriculum.first, self._shortest), task.seq_len)
        self.accuracy, self.quiet = 0.0, 0
        self.wrong: dict[Word, int] = {}
        self.pruning = None if config.curriculum.prune is None else Pruning(config)
        self.given: list[Word] = []
        self.is_answered = config.curriculum.queries == 0
        self._short = task.with_lengths(self._shortest, max(self._shortest, self.options.shared))
        self._sharing = _splits_of(self._short) if self.options.shared else []
        self._batch: list[Word | None] = []  # the words of the last batch; None: one that was cut
        self._numbers = np.empty((0, 0), dtype=np.int64)  # which of them each of its tokens belongs to

    @property
    def _shortest(self) -> int:
        return int(self.config.task["min_len"])

    @property
    def at_last(self) -> bool:
        """Whether the words are as long as those of the task."""
        return self.longest == self.task.seq_len

    @property
    def is_settled(self) -> bool:
        """Whether enough batches in a row were without an error, and if there is pruning, after it."""
        wanted = self.options.prune_settle if self.given else self.options.quiet
        return wanted is not None and self.quiet >= wanted and (self.pruning is None or self.pruning.is_over)

    @property
    def has_ended(self) -> bool:
        """Whether it is settled, and no search has more to say."""
        return self.is_settled and self.is_answered

    @property
    def silenced(self) -> Silenced | None:
        """Components that were taken away, by layer; from then on rows of gates are one-hot. None: as yet none were."""
        return None if self.pruning is None else self.pruning.silenced

    def tasks(self) -> list[Task]:
        """The task at every range of lengths from here on."""
        found, longest = [self._task(self.longest)], self.longest
        while longest < self.task.seq_len:
            longest = self._longer(longest)
            found.append(self._task(longest))
        return found

    def batch(self, step: int, split: str = "train") -> Batch:
        """The batch of a step: `batch_size` rows of words, in each of which the last word is cut where the row ends."""
        size, rows = self.options.row, self.config.batch_size
        tokens = np.zeros((rows, size), dtype=np.int64)
        targets = np.full((rows, size), IGNORE_INDEX, dtype=np.int64)
        reset = np.zeros((rows, size), dtype=bool)
        self._batch, self._numbers = [], np.zeros((rows, size), dtype=np.int64)
        words = self._words(step, split)
        for row in range(rows):
            begin = 0
            while begin < size:
                word = next(words)
                end = min(begin + len(word.tokens), size)
                tokens[row, begin:end] = word.tokens[: end - begin]
                targets[row, begin:end] = word.targets[: end - begin]
                reset[row, begin] = True
                self._numbers[row, begin:end] = len(self._batch)
                self._batch.append(word if end - begin == len(word.tokens) else None)
                begin = end
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(reset))

    def observe(self, predictions: Tensor, targets: Tensor) -> None:
        """Take note of the answers (rows, T) to the last batch, and go on to longer words where they are right."""
        scored = targets != IGNORE_INDEX
        wrong = (predictions != targets) & scored
        accuracy = 1 - int(wrong.sum()) / max(1, int(scored.sum()))
        self.quiet = self.quiet + 1 if self.at_last and accuracy == 1 else 0
        if self.at_last:
            self._note(set(self._numbers[wrong.cpu().numpy()].tolist()))
        self.accuracy = MEMORY * self.accuracy + (1 - MEMORY) * accuracy
        if self.accuracy > self.options.accuracy and not self.at_last:
            self.longest, self.accuracy = self._longer(self.longest), 0.0

    def judge(self, accuracy: float) -> None:
        """Go on to the last length where the accuracy of a validation, which is at that length, says so.

        Hidden blocks keep the accuracy of training below the mark where few blocks know the answer.
        """
        if accuracy > self.options.accuracy and not self.at_last:
            self.longest, self.accuracy = self.task.seq_len, 0.0

    def prune(self, model: TokenModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take away what the model can do without, if it is time to; batches count anew from there."""
        pruning, options = self.pruning, self.options
        if pruning is None or options.prune is None or pruning.is_over:
            return
        if pruning.silenced is None:
            if self.quiet >= options.prune_after:
                pruning.begin(model, self._batches(model, step, options.prune))
                self.quiet = 0
        elif self.quiet >= options.prune_settle:
            if pruning.try_without(model, optimizer, step, self._batches(model, step, TRIED)):
                self.quiet = 0
        elif pruning.is_in_vain(step):
            pruning.put_back(model, optimizer)
            # wrong without what came back, they say nothing of the model that has it, and as a third of each batch they
            # would break it again
            self.wrong.clear()

    def ask(self, model: TokenModel) -> None:
        """Where training would end, search for a word that the model says wrong with one-hot rows, and go on with it.

        All that were found come again, in place of others: one that was right for long may be wrong once more.
        """
        if self.is_answered or not self.is_settled:
            return
        if len(self.given) == self.options.queries:
            self.is_answered = True
            return
        asked = one_hot_copy(model).cpu()
        assert isinstance(asked, SequenceModel)
        found = explore(asked, self.task.automaton(), max_states=QUERY_STATES).wrong
        if found is None or len(found.word) > self.options.row:
            self.is_answered = True
            return
        self.given.append(Word(found.word, (IGNORE_INDEX,) * (len(found.word) - 1) + (found.target,)))
        self.wrong = dict.fromkeys(self.given, 0)
        self.quiet = 0

    def _batches(self, model: TokenModel, step: int, count: int) -> list[Batch]:
        """New batches; every other one is of the words for validation: short ones never trained on are few."""
        device, first = next(model.parameters()).device, UNSEEN * self.config.steps + step * count
        splits = itertools.cycle(("train", "valid"))
        made = [self.batch(first + i, split) for i, split in zip(range(count), splits, strict=False)]
        return [Batch._make(None if part is None else part.to(device) for part in batch) for batch in made]

    def figures(self) -> dict[str, float]:
        """What a line of metrics says of it."""
        figures: dict[str, float] = {"longest": self.longest, "quiet": self.quiet, "wrong_words": len(self.wrong)}
        if self.silenced is not None:
            figures["silenced"] = sum(map(len, self.silenced))
        return figures | {"queries": len(self.given)} if self.options.queries else figures

    def summary(self, model: TokenModel) -> dict[str, Any]:
        """What it came to, for the end of the run: of each layer the blocks and components that are left; queries."""
        summary: dict[str, Any] = {}
        if self.silenced is not None:
            layers = list(zip(model.mixers, self.silenced, strict=True))
            summary["blocks"] = [len(heard_blocks(mixer, columns)) for mixer, columns in layers]
            summary["components"] = [mixer.output.weight.shape[1] - len(columns) for mixer, columns in layers]
        return summary | {"queries": len(self.given)} if self.options.queries else summary

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on: STATE."""
        wrong = [{**_record(word), "rights": rights} for word, rights in self.wrong.items()]
        state = {"longest": self.longest, "accuracy": self.accuracy, "quiet": self.quiet, "wrong": wrong}
        if self.pruning is not None and self.pruning.silenced is not None:
            state["pruning"] = self.pruning.state()
        if self.options.queries:
            state |= {"given": [_record(word) for word in self.given], "answered": self.is_answered}
        return state

    def restore(self, state: dict[str, Any], model: TokenModel) -> None:
        """Go on from a state of this model. Raises ValueError if it is of another."""
        if self.pruning is not None and "pruning" in state:
            self.pruning.restore(state["pruning"], model)
        self.longest, self.accuracy, self.quiet = state["longest"], state["accuracy"], state["quiet"]
        self.wrong = {_word(record): record["rights"] for record in state["wrong"]}
        self.given = [_word(record) for record in state.get("given", ())]
        self.is_answered = state.get("answered", self.options.queries == 0)

    def _task(self, longest: int) -> Task:
        return self.task.with_lengths(self._shortest, longest)

    def _longer(self, longest: int) -> int:
        return min(self.task.seq_len, max(longest + 1, int(longest * self.options.growth)))

    def _note(self, wrong: set[int]) -> None:
        """Keep the words that were wrong, of these numbers, and let go of those that were right often enough."""
        for number, word in enumerate(self._batch):
            if word is None:
                continue
            if number in wrong:
                self.wrong[word] = 0
                if len(self.wrong) > self.options.kept:
                    del self.wrong[next(iter(self.wrong))]
            elif word in self.wrong:
                self.wrong[word] += 1
                if self.wrong[word] > self.options.rights:
                    del self.wrong[word]

    def _words(self, step: int, split: str) -> Iterator[Word]:
        """Words of a step without end: new ones, and of those that were wrong a share."""
        rng = np.random.default_rng([*seed_words(self.config.seed, step), 10])  # sets it apart from other streams
        again, fresh = list(self.wrong), self._fresh(step, split)
        while True:
            repeats = again and rng.random() < self.options.again
            yield again[rng.integers(len(again))] if repeats else next(fresh)

    def _fresh(self, step: int, split: str) -> Iterator[Word]:
        """Words of a split, by about as many at a time as a batch takes, and in training short ones of all."""
        task, config = self._task(self.longest), self.config
        count = config.batch_size * (2 + 2 * self.options.row // (self._shortest + task.length))
        for block in itertools.count():
            index = step + block * config.steps
            words = _words_of(task, split, count, config.seed, index)
            if split == "train" and self.options.shared and self.longest >= self.options.shared:
                for other in self._sharing:
                    words += _words_of(self._short, other, max(1, count // SHARE), config.seed, index)
                order = np.random.default_rng([*seed_words(config.seed, index), 11]).permutation(len(words))
                words = [words[i] for i in order]
            yield from words


def _record(word: Word) -> dict[str, Any]:
    """Of a word, for a checkpoint."""
    return {"tokens": word.tokens, "targets": [None if t == IGNORE_INDEX else t for t in word.targets]}


def _word(record: Mapping[str, Any]) -> Word:
    """Of a checkpoint."""
    targets = (IGNORE_INDEX if target is None else target for target in record["targets"])
    return Word(tuple(record["tokens"]), tuple(targets))


def _words_of(task: Task, split: str, count: int, seed: int, index: int) -> list[Word]:
    """Those of a sample, without padding."""
    sample = task.sample(split, count, seed=seed, index=index)
    sizes = (sample.tokens.numpy() != task.pad).sum(1).tolist()
    rows = zip(sample.tokens.tolist(), sample.targets.tolist(), sizes, strict=True)
    return [Word(tuple(tokens[:size]), tuple(targets[:size])) for tokens, targets, size in rows]


def _splits_of(task: Task) -> list[str]:
    """The splits, besides that of training, that have a word of the task."""
    found = []
    for split in ("valid", "test"):
        with contextlib.suppress(ValueError):
            task.draw(split, 1, seed=0, index=0)
            found.append(split)
    return found
