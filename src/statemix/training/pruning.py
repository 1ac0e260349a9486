"""What a model can do without, blocks and components of blocks: found on new batches, taken away on trial, left out."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from statemix.mixers import Mixer
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel, TokenModel
from statemix.tasks import IGNORE_INDEX, Batch
from statemix.training.config import TrainConfig
from statemix.training.evaluate import answer

ONE_HOT = 1e4  # times the raw gates
STAGES = ("blocks", "components", "thin")  # of pruning, after the first
LIMIT = 6  # times `prune_settle`: the steps in which a run must settle without what was taken away
Silenced = list[list[int]]  # by layer, columns of the read-out's weight (D, M N): component m of block n is m N + n


class Piece(NamedTuple):
    """What a read-out may do without: its columns for a block, or the one for a component."""

    layer: int
    columns: list[int]


class Trial(NamedTuple):
    """What was taken away, and at which step that was."""

    pieces: list[Piece]
    step: int


PIECE = {"layer": int, "columns": [int]}
# the form of a pruning's state in a checkpoint, see records.py
STATE = {
    "silenced": [[int]],
    "stage": str,
    "staying": [PIECE],
    "careful": bool,
    "trial?": {"pieces": [PIECE], "step": int},
}


class Pruning:
    """What a run has taken away of its model, and tries to do without, as `CurriculumConfig` says.

    Args:
        config: with `curriculum.prune`.

    Attributes:
        silenced: components that were taken away, by layer. None: it has not begun.
        stage: what is taken away now, one of STAGES; "thin": all that is left was tried.
        trial: what was taken away last, and comes back if the run does not settle without it.
        before: weights and optimizer before that, see `snapshot`.
        staying: what came back in this stage.
        careful: whether only one block or component is taken away next, because more were too many.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.options = config, config.curriculum
        self.silenced: Silenced | None = None
        self.stage = STAGES[0]
        self.trial: Trial | None = None
        self.before: dict[str, Tensor] = {}
        self.staying: list[Piece] = []
        self.careful = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more is taken away."""
        return self.stage == "thin"

    def is_in_vain(self, step: int) -> bool:
        """Whether there is a trial that has taken too long."""
        return self.trial is not None and step - self.trial.step >= LIMIT * self.options.prune_settle

    def begin(self, model: TokenModel, batches: list[Batch]) -> None:
        """Take away all blocks that the batches do not miss, if one-hot rows answer them without an error."""
        tried = one_hot_copy(model)
        if not errors(tried, batches):
            self.silenced = [[] for _ in model.mixers]
            self._take(model, prune(tried, batches, whole_blocks=True))

    def try_without(self, model: TokenModel, optimizer: torch.optim.Optimizer, step: int, batches: list[Batch]) -> bool:
        """Take away on trial what the batches do not miss and what they miss least of the rest, as what was taken
        before was found not to be needed; but nothing that the run has no steps left to settle without.

        Returns:
            Whether there was something. If not, it is over.
        """
        if self.trial is not None:
            self.trial, self.before, self.careful = None, {}, False
        assert self.options.quiet is not None
        if self.config.steps - step < LIMIT * self.options.prune_settle + self.options.quiet:
            self.stage = "thin"
        tried, pieces = one_hot_copy(model), list[Piece]()
        while not self.is_over and not pieces:
            whole = self.stage == "blocks"
            if not self.careful:
                pieces = prune(tried, batches, self.staying, whole_blocks=whole)
            if (piece := least_needed(tried, batches, self.staying, whole_blocks=whole)) is not None:
                pieces.append(piece)
            if not pieces:
                self.stage, self.staying = STAGES[STAGES.index(self.stage) + 1], []
        if pieces:
            self.trial, self.before = Trial(pieces, step), snapshot(model, optimizer)
            self._take(model, pieces)
        return bool(pieces)

    def put_back(self, model: TokenModel, optimizer: torch.optim.Optimizer) -> None:
        """Let all be as it was before the trial; what was tried alone stays, of more the next trial is of one."""
        assert self.silenced is not None
        assert self.trial is not None
        restore(model, optimizer, self.before)
        pieces = self.trial.pieces
        for piece in pieces:
            self.silenced[piece.layer] = sorted(set(self.silenced[piece.layer]) - set(piece.columns))
        self.trial, self.before, self.careful = None, {}, len(pieces) > 1
        if len(pieces) > 1:
            return
        self.staying += pieces
        if self.stage == "components":
            self.stage = "thin"  # none that came after one which is needed was ever found not to be

    def keep_silent(self, model: TokenModel) -> None:
        """Let what was taken away be away, as the optimizer moves it on."""
        silence(model, self.silenced or [[] for _ in model.mixers])

    def _take(self, model: TokenModel, pieces: list[Piece]) -> None:
        """Take pieces away."""
        assert self.silenced is not None
        for piece in pieces:
            self.silenced[piece.layer] = sorted({*self.silenced[piece.layer], *piece.columns})
        self.keep_silent(model)

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, once it has begun: STATE."""
        staying = [piece._asdict() for piece in self.staying]
        state = {"silenced": self.silenced, "stage": self.stage, "staying": staying, "careful": self.careful}
        if self.trial is None:
            return state
        pieces = [piece._asdict() for piece in self.trial.pieces]
        return state | {"trial": {"pieces": pieces, "step": self.trial.step}}

    def restore(self, state: dict[str, Any], model: TokenModel) -> None:
        """Go on from a state of this model; `before` is to follow. Raises ValueError if it is of another."""
        trial = state.get("trial", {"pieces": []})
        sizes = [mixer.output.weight.shape[1] for mixer in model.mixers]
        columns = [(piece["layer"], piece["columns"]) for piece in state["staying"] + trial["pieces"]]
        columns += enumerate(state["silenced"])
        fits = all(layer < len(sizes) and all(column < sizes[layer] for column in taken) for layer, taken in columns)
        if not fits or len(state["silenced"]) != len(sizes):
            raise ValueError("`curriculum.pruning` names components that the model does not have")
        if state["stage"] not in STAGES:
            raise ValueError(f"`curriculum.pruning.stage` must be one of {list(STAGES)}, got {state['stage']!r}")
        self.silenced, self.stage, self.careful = state["silenced"], state["stage"], state["careful"]
        self.staying = [Piece(**piece) for piece in state["staying"]]
        self.trial, self.before = None, {}
        if "trial" in state:
            self.trial = Trial([Piece(**piece) for piece in trial["pieces"]], trial["step"])


@torch.no_grad()
def silence(model: TokenModel, silenced: Silenced) -> None:
    """Let the read-out of each layer see nothing of these components."""
    for mixer, columns in zip(model.mixers, silenced, strict=True):
        mixer.output.weight[:, columns] = 0


@torch.no_grad()
def prune(
    model: TokenModel, batches: Sequence[Batch], staying: Sequence[Piece] = (), *, whole_blocks: bool
) -> list[Piece]:
    """Silence blocks, or components, without all of which the model answers the batches without an error, as it does
    now.

    They are tried one after another, first layer first, those with the most different states before others: what is
    left has few.

    Args:
        model: as it answers now.
        batches: what it is asked.
        staying: what is not tried.
        whole_blocks: whether blocks are.

    Returns:
        What was silenced, besides what already was; nothing of a model that errs.
    """
    silenced, batches = list[Piece](), list(batches)
    if errors(model, batches, 0):
        return silenced
    for piece in _pieces(model, batches[0], whole_blocks=whole_blocks):
        if piece not in staying and not _errors_without(piece, model, batches, 0):
            model.mixers[piece.layer].output.weight[:, piece.columns] = 0
            silenced.append(piece)
    return silenced


@torch.no_grad()
def least_needed(
    model: TokenModel, batches: Sequence[Batch], staying: Sequence[Piece], *, whole_blocks: bool
) -> Piece | None:
    """The block, or component, without which the fewest answers to the batches are wrong; of equals that of the most
    different states.

    Args:
        model: as it answers now.
        batches: what it is asked.
        staying: what is not to be named.
        whole_blocks: whether it is a block.

    Returns:
        None: there are no others, or each layer has only one.
    """
    best, fewest = None, None
    pieces, batches = _pieces(model, batches[0], whole_blocks=whole_blocks), list(batches)
    by_layer = Counter(piece.layer for piece in pieces)
    for piece in pieces:
        if piece in staying or by_layer[piece.layer] == 1 or fewest == 0:
            continue
        wrong = _errors_without(piece, model, batches, fewest)
        if fewest is None or wrong < fewest:
            best, fewest = piece, wrong
    return best


def snapshot(model: TokenModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the weights and of what the optimizer keeps of each, by names of a file."""
    weights = {f"model.{name}": weight.clone() for name, weight in model.state_dict().items()}
    moments = {f"optimizer.{name}": value.clone() for name, value in _moments(optimizer)}
    return weights | moments


def restore(model: TokenModel, optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor]) -> None:
    """Let both be as they were at a `snapshot`."""
    model.load_state_dict({name: before[f"model.{name}"] for name in model.state_dict()})
    for name, value in _moments(optimizer):
        value.copy_(before[f"optimizer.{name}"])


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's own tensors, not copies."""
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            yield f"{i}.{name}", value


def one_hot_copy(model: TokenModel) -> TokenModel:
    """A copy whose rows of gates are one-hot: where it can be by sharpening, which the kernels serve."""
    made = copy.deepcopy(model)
    for mixer in made.mixers:
        assert isinstance(mixer, LinearRecurrence)
        if mixer.normalization == "softmax":
            mixer.sharpen(ONE_HOT)
        else:
            mixer.one_hot = True
    return made


def heard_blocks(mixer: Mixer, silenced: Sequence[int]) -> list[int]:
    """The blocks of which a component is not silenced."""
    blocks = mixer.state_shape[1]
    return sorted({column % blocks for column in set(range(mixer.output.weight.shape[1])) - set(silenced)})


def _pieces(model: TokenModel, batch: Batch, *, whole_blocks: bool) -> list[Piece]:
    """What the read-outs have weights for, layer by layer, what has the most different states in a batch first."""
    found: list[Piece] = []

    def hook(read_out: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer, mixer = next((i, own) for i, own in enumerate(model.mixers) if own.output is read_out)
        heard, blocks = mixer.output.weight.any(0).tolist(), mixer.state_shape[1]
        candidates = [list(range(n, len(heard), blocks)) for n in range(blocks)]
        if not whole_blocks:
            candidates = [[column] for column in range(len(heard))]
        states = inputs[0].flatten(0, 1)
        candidates.sort(key=lambda columns: -_count(states[:, columns]))
        seen = ([column for column in columns if heard[column]] for columns in candidates)
        found.extend(Piece(layer, columns) for columns in seen if columns)

    hooks = [mixer.output.register_forward_pre_hook(hook) for mixer in model.mixers]
    try:
        answer(model, batch, None)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _count(states: Tensor) -> int:
    """How many of the states (tokens, M) differ, to a hundredth of the largest number."""
    return len((states * (100 / states.abs().max().clamp(min=1e-30))).round().unique(dim=0))


def _errors_without(piece: Piece, model: TokenModel, batches: list[Batch], enough: int | None) -> int:
    """How many answers are wrong while a read-out does not see a piece: see `errors`."""
    seen = model.mixers[piece.layer].output.weight
    before = seen[:, piece.columns]
    seen[:, piece.columns] = 0
    wrong = errors(model, batches, enough)
    seen[:, piece.columns] = before
    return wrong


@torch.no_grad()
def errors(model: TokenModel, batches: list[Batch], enough: int | None = 0) -> int:
    """How many answers to the batches are wrong; counting stops above `enough`, and that batch is put first."""
    wrong = 0
    for number, batch in enumerate(batches):
        predictions: Tensor = answer(model, batch, None)[0].argmax(-1)
        wrong += int(((predictions != batch.targets) & (batch.targets != IGNORE_INDEX)).sum())
        if enough is not None and wrong > enough:
            batches.insert(0, batches.pop(number))
            break
    return wrong


@torch.no_grad()
def without_silent_blocks(model: SequenceModel) -> SequenceModel:
    """The model with as few blocks as its layers need, which gives the same answers, to the rounding of sums.

    Blocks that a read-out has no weight for are left out; a layer that needs fewer than another keeps some of them.

    Raises:
        ValueError: the mixer has no rows of gates.
    """
    mixers = model.mixers
    if not all(mixer.has_gate_rows for mixer in mixers):
        name = model.config["mixer"]["name"]
        raise ValueError(f"without_silent_blocks: `model` must have a mixer with rows of gates, got {name!r}.")
    blocks = mixers[0].state_shape[1]
    heard = [(mixer.output.weight != 0).any(0).view(-1, blocks).any(0) for mixer in mixers]
    count = max(1, max(int(layer.sum()) for layer in heard))
    config = model.config | {"mixer": model.config["mixer"] | {type(mixers[0]).width_option: count}}
    kept = [layer.int().argsort(descending=True, stable=True)[:count].sort().values for layer in heard]
    small = SequenceModel(**config).to(model.head.weight.dtype)
    weights = model.state_dict()
    for name, weight in small.state_dict().items():
        old = weights[name]
        for axis in range(old.ndim):
            if old.shape[axis] != weight.shape[axis]:  # it ends with the blocks: (..., N)
                own = kept[int(name.split(".")[1])].to(old.device)
                old = old.unflatten(axis, (-1, blocks)).index_select(axis + 1, own).flatten(axis, axis + 1)
        weight.copy_(old)
    return small.train(model.training)
