"""TrainConfig: everything that determines a training run, as nested dataclasses with a strict JSON form."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

import torch

from statemix import records
from statemix.mixers import DEFAULT_MIXER, MIXERS, build_mixer, complete_mixer
from statemix.specs import NotImportedError, modules_of, options
from statemix.tasks import TASKS, Task, build_task, complete_task

PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("cosine", "linear")


@dataclass(frozen=True)
class ModelConfig:
    """Width, depth and first weights of a model.

    Args:
        d_model: D, width of the residual stream.
        num_layers: number of (mixer, SwiGLU) pairs.
        mlp_size: inner width of the SwiGLU. None: 8/3 D, rounded up to a multiple of 32.
        tied_embedding: the head is the transposed embedding.
        init_std: of the first weights, above 0; model.py says of which. None: torch's defaults.
        dropout: share of the numbers of each residual branch that are dropped in training, in [0, 1).
    """

    d_model: int = 64
    num_layers: int = 1
    mlp_size: int | None = None
    tied_embedding: bool = False
    init_std: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self, "model.")
        for name in ("d_model", "num_layers", "mlp_size"):
            size = getattr(self, name)
            _require(f"model.{name}", size, size is None or size >= 1, "at least 1")
        std = self.init_std
        _require("model.init_std", std, std is None or 0 < std < math.inf, "above 0 and finite")
        _require("model.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a cosine or a line to `final_lr`.

    Args:
        lr: peak learning rate, above 0.
        final_lr: learning rate at the last step, in [0, lr].
        warmup: share of the steps that warm up, in [0, 1].
        betas: decay rates of the two moments, in [0, 1).
        weight_decay: of matrices (not of biases, norms or embeddings), at least 0.
        clip: largest gradient norm, above 0. None: gradients are as they are.
        muon_lr: peak learning rate of Muon, above 0, which then updates the matrices of the layers and leaves the rest
            to AdamW; it warms up and falls as `lr` does. 0.02 is usual. None: AdamW updates all.
        amsgrad: AdamW divides by the largest second moment there was, not by that of the last steps (Reddi et al. 2018,
            arXiv 1904.09237): after many batches without an error the first one does not move all weights at once.
        schedule: from `lr` to `final_lr` after the warm-up: "cosine", or "linear" (Bergsma et al. 2025, arXiv
            2502.15938).
    """

    lr: float = 3e-3
    final_lr: float = 1e-5
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float | None = 1.0
    muon_lr: float | None = None
    amsgrad: bool = False
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        _check_types(self, "optimizer.")
        _require("optimizer.lr", self.lr, 0 < self.lr < math.inf, "above 0 and finite")
        _require("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"in [0, lr] = [0, {self.lr}]")
        _require("optimizer.warmup", self.warmup, 0 <= self.warmup <= 1, "in [0, 1]")
        _require("optimizer.betas", self.betas, len(self.betas) == 2, "two numbers")
        _require("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "in [0, 1)")
        _require("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _require("optimizer.clip", self.clip, self.clip is None or self.clip > 0, "above 0")
        muon = self.muon_lr
        _require("optimizer.muon_lr", muon, muon is None or 0 < muon < math.inf, "above 0 and finite")
        allowed = self.schedule in SCHEDULES
        _require("optimizer.schedule", self.schedule, allowed, f"one of {sorted(SCHEDULES)}")


@dataclass(frozen=True)
class CurriculumConfig:
    """Words of many lengths packed into rows: short ones first, wrong ones again, an end after none was wrong.

    Args:
        first: length of the longest words at first, in tokens; the shortest are of the task's `min_len`. None: there is
            no curriculum, and what follows is left at its defaults.
        growth: factor by which the longest length grows, above 1, by 1 at least, up to the task's `seq_len`.
        accuracy: running token accuracy above which it grows, in (0, 1): a mean that forgets a tenth with each batch.
            Where a validation, which is of the last length and hides no block, is above it, it goes there at once.
        row: tokens in a row of a batch, which is filled with words; the state is zero before each, and the last one is
            cut. A step has `batch_size` rows.
        again: share of the words of a batch, in [0, 1), that are of those which were wrong at the last length.
        kept: the number of wrong words that are kept for that, at least 1; the oldest give way.
        rights: a wrong word is let go when it has been right more often than this.
        quiet: training ends after so many batches in a row, at the last length, without an error. None: after `steps`.
        shared: words of at most so many tokens are trained on of every split, for there are too few of them to hold any
            back: what a model says to those that it never saw is as it happens. 0: of training alone.
        prune: after `prune_after` of those batches, if one-hot rows of gates (`one_hot_rows`) have no error on so many
            new batches, half of them of validation, rows are one-hot from then on, and blocks are taken away for good
            without which there is none either, those with the most different states first; batches count anew. Whenever
            `prune_settle` in a row are right, what new batches do not miss is taken away, too, and the block that they
            miss least. It comes back where no such row follows within six times as many steps: the next time it is that
            block alone, and what comes back alone stays. When all that are left were tried it is the turn of components
            of blocks, until one comes back, or until too few steps are left for that, then it goes on until `quiet` in
            a row are right. None: nothing is taken away. Of a mixer with rows of gates alone.
        prune_after: batches in a row, at the last length, without an error.
        prune_settle: batches in a row without an error, after a block or component was taken away.
        prune_lr: what the learning rate is multiplied by from the first pruning on, in (0, 1].
        queries: how often at most, where training would end, a search (`statemix.search.explore`) asks whether the
            model is right at every length: the shortest word at which it is wrong comes again as others do that were,
            and training ends when `prune_settle` batches in a row are right and nothing more is found (Angluin 1987).
            Of a task with an automaton, and with `prune`.
    """

    first: int | None = None
    growth: float = 1.4
    accuracy: float = 0.95
    row: int = 256
    again: float = 0.3
    kept: int = 64
    rights: int = 30
    quiet: int | None = None
    shared: int = 0
    prune: int | None = None
    prune_after: int = 500
    prune_settle: int = 100
    prune_lr: float = 1.0
    queries: int = 0

    def __post_init__(self) -> None:
        _check_types(self, "curriculum.")
        for name in ("first", "row", "kept", "rights", "quiet", "prune", "prune_after", "prune_settle"):
            number = getattr(self, name)
            _require(f"curriculum.{name}", number, number is None or number >= 1, "at least 1")
        _require("curriculum.shared", self.shared, self.shared >= 0, "at least 0")
        _require("curriculum.growth", self.growth, 1 < self.growth < math.inf, "above 1 and finite")
        _require("curriculum.accuracy", self.accuracy, 0 < self.accuracy < 1, "in (0, 1)")
        _require("curriculum.prune_lr", self.prune_lr, 0 < self.prune_lr <= 1, "in (0, 1]")
        _require("curriculum.again", self.again, 0 <= self.again < 1, "in [0, 1)")
        alone = self.prune is not None and self.quiet is None
        _require("curriculum.prune", self.prune, not alone, "None without `curriculum.quiet`")
        served = self.queries == 0 or (self.queries > 0 and self.prune is not None)
        _require("curriculum.queries", self.queries, served, "at least 0, and 0 without `curriculum.prune`")
        if self.first is None:
            for part in dataclasses.fields(self):
                value = getattr(self, part.name)
                rule = f"{part.default} without `curriculum.first`"
                _require(f"curriculum.{part.name}", value, value == part.default, rule)


# fields, dotted, that version 0.1.0 has not had from its start, and their defaults
LATER = {
    "accumulate": 1,
    "block_dropout": 0.0,
    "carry": False,
    "curriculum": {part.name: part.default for part in dataclasses.fields(CurriculumConfig)},
    "gate_noise": 0.0,
    "sharpen": None,
    "row_entropy": 0.0,
    "train_lengths": (),
    "model.dropout": 0.0,
    "optimizer.amsgrad": False,
    "optimizer.muon_lr": None,
    "optimizer.schedule": "cosine",
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Two runs of one config on one machine with as many threads are equal bit for bit.

    Args:
        task: spec of a task: its name in `TASKS`, or the path of one's own, "my_pkg.tasks:Mine", and its options.
        mixer: spec of a mixer: its name in `MIXERS`, or the path of one's own, and its options.
        model: width and depth.
        optimizer: AdamW and its schedule.
        steps: optimizer steps; the schedule's length, also of a run that ends earlier.
        batch_size: sequences per step, over all processes; with a curriculum, rows.
        train_sequences: size of the training set, gone through in epochs in an order of their own: the first so many of
            the training stream. None: every batch is new.
        train_lengths: sequence lengths trained on one after another, each for an equal share of the steps, with as many
            tokens in a step as at the task's own length. Empty: that length alone. Validation is at the task's own.
        curriculum: words of growing lengths, packed. Of a task with words of a range of lengths.
        row_entropy: weight of a penalty on rows of gates that are not one-hot: their mean entropy in nats, which joins
            the loss of every batch (with `accumulate` or many processes, every part) that is answered without an error,
            with a weight that rises from 0 in the middle of training to this at the end; with a curriculum it is this
            from the start. The best checkpoint is that of the lowest sum. Of a mixer with rows of gates alone.
        block_dropout: share of the blocks whose states the read-out of a layer does not see, in [0, 1), other ones for
            each sequence and step, in the first half of training, with a curriculum before its last length: what one
            block gets wrong others cannot make up for then, so each has to be right by itself. Of a mixer with rows of
            gates alone.
        gate_noise: standard deviation of normal noise on the weights of raw gates, another in each step, in the first
            half of training, with a curriculum until its pruning begins: a row of gates stays what it is only if its
            largest leads by more than the noise, so rows become one-hot where a penalty leaves them blurred. Of a mixer
            with rows of gates alone.
        seed: of the initial weights and the training stream. Validation and test data are the same for every seed.
        eval_every: steps between validations; each also writes a checkpoint.
        patience: training ends after so many validations in a row without a lower loss. None: after `steps`.
        stop_accuracy: training ends when the token accuracy of a validation is at least this, in (0, 1]. None: after
            `steps`.
        eval_sequences: sequences validated on each time, and tested on at each length at the end; of a text at most as
            many as it has.
        test_lengths: sequence lengths of the final test, in tokens, or ranges such as "40-256", of which every length
            is as likely. Empty: the task's own.
        sharpen: a factor, above 0: the final test is made again with sharpened gates, as `sharpen` of a mixer does.
            None: it is not. Of a mixer whose gates are rows of softmax alone.
        log_every: steps between lines of metrics.jsonl.
        mixed_precision: "no", "bf16" or "fp16", through accelerate.
        accumulate: parts in which a step goes through its batch, one after another, to need less memory; the gradients
            are those of the whole batch. The parts of all processes divide the batch.
        carry: in training, each row of a batch begins with the state that the same row of the last batch ended with,
            and reads on where that stopped; gradients end at the batch. In validation and test too. Text alone does.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names the field.
    """

    task: dict[str, Any] = field(default_factory=lambda: {"name": "permutation", "group": "S3", "seq_len": 16})
    mixer: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_MIXER))
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 600
    batch_size: int = 128
    train_sequences: int | None = None
    train_lengths: tuple[int, ...] = ()
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    row_entropy: float = 0.0
    block_dropout: float = 0.0
    gate_noise: float = 0.0
    seed: int = 0
    eval_every: int = 100
    patience: int | None = None
    stop_accuracy: float | None = None
    eval_sequences: int = 1024
    test_lengths: tuple[int | str, ...] = ()
    sharpen: float | None = None
    log_every: int = 10
    mixed_precision: str = "no"
    accumulate: int = 1
    carry: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("steps", "batch_size", "eval_every", "eval_sequences", "log_every", "accumulate"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("train_sequences", "patience"):
            number = getattr(self, name)
            _require(name, number, number is None or number >= 1, "at least 1")
        parts = self.accumulate
        _require("accumulate", parts, self.batch_size % parts == 0, f"a divisor of `batch_size` = {self.batch_size}")
        stop = self.stop_accuracy
        _require("stop_accuracy", stop, stop is None or 0 < stop <= 1, "above 0 and at most 1")
        _require("seed", self.seed, self.seed >= 0, "at least 0")
        lengths = self.train_lengths
        _require("train_lengths", lengths, all(n >= 1 for n in lengths), "all at least 1")
        numbers = [number for length in self.test_lengths for number in range_of(length)]
        _require("test_lengths", self.test_lengths, all(n >= 1 for n in numbers), "all at least 1")
        allowed = self.mixed_precision in PRECISIONS
        _require("mixed_precision", self.mixed_precision, allowed, f"one of {sorted(PRECISIONS)}")
        # specs are stored with their defaults, so that equal runs have equal configs, also after a default changes
        object.__setattr__(self, "task", complete_task(self.task))
        object.__setattr__(self, "mixer", complete_mixer(self.mixer))
        task = build_task(self.task)
        _require("carry", self.carry, task.can_carry or not self.carry, f"False for the task {task.name!r}")
        _require("carry", self.carry, self.train_sequences is None or not self.carry, "False with `train_sequences`")
        for length in self.test_lengths:
            own = not task.autoencoder or length == task.seq_len
            there = "test" in task.splits
            _require("test_lengths", self.test_lengths, there, "empty: the text has no part for the test")
            _require(
                "test_lengths", length, own, f"the task's `seq_len` = {task.seq_len}: an autoencoder has one length"
            )
            at_length(task, length)
        for length in self.train_lengths:
            at_will = not task.autoencoder and self.train_sequences is None and not self.carry
            rule = "empty with `train_sequences`, `carry` or an autoencoder"
            _require("train_lengths", self.train_lengths, at_will, rule)
            task.with_seq_len(length)
        if self.curriculum.first is not None:
            task.with_lengths(1, task.seq_len)
            at_will = not (self.train_lengths or self.train_sequences or self.carry)
            rule = "None with `train_lengths`, `train_sequences` or `carry`"
            _require("curriculum.first", self.curriculum.first, at_will, rule)
            row, least = self.curriculum.row, task.length
            _require("curriculum.row", row, row >= least, f"at least the longest word, {least} tokens")
        entropy, hidden, rows = self.row_entropy, self.block_dropout, MIXERS[self.mixer["name"]].has_gate_rows
        _require("row_entropy", entropy, 0 <= entropy < math.inf, "at least 0 and finite")
        _require("row_entropy", entropy, rows or not entropy, "0 for a mixer without rows of gates")
        prune = self.curriculum.prune
        _require("curriculum.prune", prune, rows or prune is None, "None for a mixer without blocks")
        if self.curriculum.queries:
            task.automaton()
        _require("block_dropout", hidden, 0 <= hidden < 1, "in [0, 1)")
        _require("block_dropout", hidden, rows or not hidden, "0 for a mixer without blocks")
        _require("gate_noise", self.gate_noise, 0 <= self.gate_noise < math.inf, "at least 0 and finite")
        _require("gate_noise", self.gate_noise, rows or not self.gate_noise, "0 for a mixer without rows of gates")
        sharpen, sharpens = self.sharpen, MIXERS[self.mixer["name"]].sharpens(self.mixer)
        _require("sharpen", sharpen, sharpen is None or 0 < sharpen < math.inf, "above 0 and finite")
        _require("sharpen", sharpen, sharpens or sharpen is None, "None for a mixer without rows of softmax")
        with torch.device("meta"):  # checks the options; no memory, no random numbers drawn
            build_mixer(self.mixer, self.model.d_model)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that define a task or mixer of one's own: who reads this config elsewhere imports them first."""
        return modules_of(self.task, self.mixer)

    @property
    def step_tokens(self) -> int:
        """Tokens in a step: of padding too, not of `train_lengths`."""
        packed = self.curriculum.first is not None
        return self.batch_size * (self.curriculum.row if packed else build_task(self.task).length)

    def sequences_at_once(self, task: Task) -> int:
        """Of a task at any length, with no more tokens than in a training step."""
        return max(1, self.step_tokens // task.length)

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal config.

        A field of LATER is left out at its default: the runs of a sweep are named by this text, also the older ones.
        """
        content = dataclasses.asdict(self)
        for name, default in LATER.items():
            part, _, key = name.rpartition(".")
            fields = content[part] if part else content
            if fields[key] == default:
                del fields[key]
        task = TASKS[self.task["name"]]
        for option in options(task):
            if option.name in task.later and content["task"][option.name] == option.default:
                del content["task"][option.name]
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The config of a JSON text. A missing key has its default; an unknown one is a ValueError."""
        try:
            data = records.parse(text)
        except ValueError as error:
            raise ValueError(f"TrainConfig: cannot be read: {error}.") from error
        return _from_mapping(cls, data, "")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The config in a JSON file. Raises ValueError, naming the file, if there is none or it is wrong."""
        try:
            return cls.from_json(Path(path).read_bytes())
        except NotImportedError as error:
            raise NotImportedError(f"TrainConfig: '{path}' needs a module. {error}") from error
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"TrainConfig: cannot read '{path}': {error}") from error


def range_of(length: int | str) -> tuple[int, int]:
    """The shortest and the longest length of one to test at: 40 or "40-256". Raises ValueError if it is no range."""
    if isinstance(length, int):
        return length, length
    if not re.fullmatch(r"\d{1,18}-\d{1,18}", length, re.ASCII):
        raise ValueError(f'TrainConfig: `test_lengths` must be numbers or ranges such as "40-256", got {length!r}.')
    shortest, longest = map(int, length.split("-"))
    if longest < shortest:
        raise ValueError(f"TrainConfig: `test_lengths` must end where they begin or later, got {length!r}.")
    return shortest, longest


def at_length(task: Task, length: int | str) -> Task:
    """The task at a length to test at. Raises ValueError if it has no such."""
    return task.with_seq_len(length) if isinstance(length, int) else task.with_lengths(*range_of(length))


def first_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key, dotted, whose values differ, as "key=theirs ... mine"; None if the mappings are equal."""
    for key in dict.fromkeys((*mine, *theirs)):
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if (inner := first_difference(a, b, f"{prefix}{key}.")) is not None:
                return inner
        elif a != b:
            return f"was made with {prefix}{key}={b!r}, the config asks for {a!r}"
    return None


def _require(name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"TrainConfig: `{name}` must be {rule}, got {value!r}.")


def _check_types(config: Any, prefix: str = "") -> None:
    """Raise TypeError, naming the field, unless every value of a config is of its field's type."""
    for key, hint in get_type_hints(type(config)).items():
        value = getattr(config, key)
        parts = value if isinstance(value, tuple) else (value,)
        kinds = get_args(hint) if get_origin(hint) is tuple else (hint,)
        ok = isinstance(value, tuple) == (get_origin(hint) is tuple)
        if not ok or not all(_is(part, kinds[0]) for part in parts):
            wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            raise TypeError(f"TrainConfig: `{prefix}{key}` must be of type {wanted}, got {value!r}.")
        small = all(part in records.COUNTS or -part in records.COUNTS for part in parts if isinstance(part, int))
        _require(f"{prefix}{key}", value, small, "below 2^63")  # else its JSON is another number


def _is(value: object, hint: Any) -> bool:
    """Whether a value is of a type; an int will do for a float, and a bool is no number."""
    if isinstance(hint, UnionType):
        return any(_is(value, part) for part in get_args(hint))
    if hint is float:
        hint = int | float
    if get_origin(hint) is dict:
        hint = Mapping
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _number(value: object, hint: Any) -> object:
    """JSON writes a whole float as an int: make it a float again where the field is one."""
    is_float = hint is float or (isinstance(hint, UnionType) and float in get_args(hint))
    return float(value) if is_float and isinstance(value, int) and not isinstance(value, bool) else value


def _from_mapping(cls: type, data: object, prefix: str) -> Any:
    """An instance of dataclass `cls` from parsed JSON, nested dataclasses too: they check their values themselves."""
    if not isinstance(data, dict):
        raise TypeError(f"TrainConfig: `{prefix.rstrip('.') or 'the config'}` must be an object, got {data!r}.")
    hints = get_type_hints(cls)
    unknown = sorted(data.keys() - hints.keys())
    if unknown:
        raise ValueError(f"TrainConfig: unknown key `{prefix}{unknown[0]}`; there are {sorted(hints)}.")
    values = {}
    for key, value in data.items():
        if dataclasses.is_dataclass(hints[key]):
            value = _from_mapping(hints[key], value, f"{prefix}{key}.")
        elif get_origin(hints[key]) is tuple and isinstance(value, list):  # JSON has no tuples
            value = tuple(_number(part, get_args(hints[key])[0]) for part in value)
        values[key] = _number(value, hints[key])
    return cls(**values)
