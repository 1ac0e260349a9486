"""A page that computes a trained model in a browser: one types a word, and sees what each block does to its state.

Python packs what the page needs: weights, the task's automaton, the one that `statemix verify` found, words to begin
with, and planes in which states are seen. model.js computes a step, page.js draws it; nothing is loaded from elsewhere.
"""

import base64
import html
import json
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import statemix
from statemix.analysis import NONE, Automaton, discriminants
from statemix.files import write_whole
from statemix.gates import NORMALIZATIONS
from statemix.mixers import BDLRU, HLRU
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel
from statemix.style import COLORS
from statemix.tasks import IGNORE_INDEX, Task
from statemix.verify import VERDICT_FILE, load_run, read_verdict

PAGE_FILE = "explore.html"
MAX_BYTES = 5_000_000  # of the page
MAX_TRANSITIONS = 50_000  # of an automaton
MAX_COMPONENTS = 512  # that a layer's read-out reads: their states are seen in a plane
EXAMPLES, EXAMPLE_TOKENS = 6, 24
SAMPLED, POINTS = 4000, 300  # states that a plane is found from, and those drawn in it


def explore_page(run: str | Path, *, sharpen: float | None = None) -> str:
    """One HTML document that shows the model of a run at work on any word.

    Args:
        run: folder of a run, then its best checkpoint, or a folder in it with a model. If `statemix verify` has left
            its verify.json there, the automaton that it found walks beside the model.
        sharpen: factor of the raw gates (`LinearRecurrence.sharpen`); 1 leaves them as they are. None: that of
            verify.json; without one the run's own, as in its test.

    Raises:
        ValueError: the folder has no run or no model; or the page cannot show it: its task is of texts, its mixer is
            neither BD-LRU nor H-LRU, its weights are not float32 or not finite, or the page would be above MAX_BYTES.
    """
    verdict = read_verdict(run) if (Path(run) / VERDICT_FILE).exists() else None
    if sharpen is None and verdict is not None:
        sharpen = verdict.sharpened
    model, task, factor, checkpoint = load_run(run, "explore", sharpen)
    _check_shown(model, task)
    notes = []
    if verdict is not None and (verdict.sharpened or 1.0) != (factor or 1.0):
        ours, theirs = (f"{each or 1:g}" for each in (factor, verdict.sharpened))
        notes.append(f"{VERDICT_FILE} is of raw gates times {theirs}, and these are times {ours}: it is not shown.")
        verdict = None
    automaton = _automaton(task)
    if automaton is None:
        notes.append(
            f"The task has no automaton of at most {MAX_TRANSITIONS:,} transitions: its answers are those of its words."
        )
    found = None if verdict is None else verdict.automaton
    if found is not None and found.transitions.shape[1] != task.vocab_size:
        wanted, tokens = f"an automaton of the model's {task.vocab_size} tokens", found.transitions.shape[1]
        raise ValueError(f"explore: '{Path(run) / VERDICT_FILE}' must have {wanted}, got one of {tokens}.")
    if found is not None and found.transitions.size > MAX_TRANSITIONS:
        notes.append(f"The automaton of {VERDICT_FILE} is not shown: it has more than {MAX_TRANSITIONS:,} transitions.")
        found = None
    sample = task.sample("valid", 256)
    packed = {
        "title": task.name,
        "task": repr(task),
        "about": _about(model, factor, checkpoint),
        "colors": COLORS,
        "names": task.token_names,
        "pad": task.pad,
        "automaton": None if automaton is None else _tables(automaton),
        "outcome": None if verdict is None else verdict.outcome,
        "wrong": None if verdict is None or verdict.wrong is None else verdict.wrong.word,
        "verified": None if found is None else _tables(found),
        "examples": _examples(task, sample.tokens, sample.targets),
        "planes": _planes(model, sample.tokens, sample.targets, automaton if found is None else found),
        "notes": notes,
        "model": pack(model),
    }
    page = _document(task.name, json.dumps(packed, separators=(",", ":")))
    _check_size(len(page.encode()), model)
    return page


def write_page(run: str | Path, out: str | Path, *, sharpen: float | None = None) -> Path:
    """Write `explore_page` as explore.html in a folder that is there. Returns the file."""
    path = Path(out) / PAGE_FILE
    write_whole(path, explore_page(run, sharpen=sharpen).encode())
    return path


def _check_shown(model: SequenceModel, task: Task) -> None:
    """Raise ValueError unless a page can show the model."""
    if task.vocabulary is not None:
        raise ValueError(f"explore: `run` must be of a task whose tokens are no text, got {task.name!r}.")
    if task.vocab_size != model.config["vocab_size"]:
        wanted, got = task.vocab_size, model.config["vocab_size"]
        raise ValueError(f"explore: `run` must have a model of its task's {wanted} tokens, got one of {got}.")
    for mixer in model.mixers:
        if type(mixer) not in (BDLRU, HLRU):
            raise ValueError(f"explore: `run` must have a mixer BDLRU or HLRU, got {type(mixer).__name__}.")
    for name, weight in model.state_dict().items():
        if weight.dtype != torch.float32 or not weight.isfinite().all():
            got = weight.dtype if weight.dtype != torch.float32 else "others"
            raise ValueError(f"explore: `run` must have finite weights of float32, got {got} in `{name}`.")
    _check_size(4 * 4 * model.num_parameters() // 3, model)  # base64 has 4 characters for 3 bytes


def _check_size(size: int, model: SequenceModel) -> None:
    """Raise ValueError if a page of so many bytes is too large."""
    if size > MAX_BYTES:
        raise ValueError(
            f"explore: `run` must be small enough for a page of {MAX_BYTES / 1e6:g} MB, got {size / 1e6:.1f} MB "
            f"with {model.num_parameters():,} weights."
        )


def pack(model: SequenceModel) -> dict[str, Any]:
    """What model.js computes a model from: sizes, and the float32 weights in base64, with the place of each tensor."""
    mixer = cast(LinearRecurrence, model.mixers[0])
    order, blocks = mixer.state_shape
    tensors = dict(model.named_parameters())  # a tied head is not there twice
    places, first = {}, 0
    for name, weight in tensors.items():
        places[name] = (first, weight.numel())
        first += weight.numel()
    content = b"".join(weight.detach().numpy().astype("<f4").tobytes() for weight in tensors.values())
    return {
        "config": {
            "width": model.config["d_model"],
            "layers": len(model.mixers),
            "kind": mixer.kind,
            "order": order,
            "blocks": blocks,
            "normalization": mixer.normalization,
            "floor": NORMALIZATIONS[mixer.normalization].floor,
            "epsilon": model.norm.eps,
        },
        "tensors": places,
        "weights": base64.b64encode(content).decode(),
    }


def _about(model: SequenceModel, factor: float | None, checkpoint: Path) -> str:
    """A line that says which model it is."""
    mixer = cast(LinearRecurrence, model.mixers[0])
    order, blocks = mixer.state_shape
    name = "BD-LRU" if isinstance(mixer, BDLRU) else f"H-LRU, {mixer.kind} form"
    layers, of_each = (
        f"{count} {what}{'s' * (count > 1)}" for count, what in ((len(model.mixers), "layer"), (blocks, "block"))
    )
    parts = [
        f"{name}, {layers} of {of_each} of {order}",
        f"rows of gates by {mixer.normalization}" + ("" if factor in (None, 1) else f", sharpened by {factor:g}"),
        f"{model.num_parameters():,} weights",
        f"{checkpoint.resolve().name}, statemix {statemix.__version__}",
    ]
    return " · ".join(parts)


def _automaton(task: Task) -> Automaton | None:
    """The least one with the task's answers; None if it is too large for a page, or if the task has none."""
    try:
        automaton = task.automaton()
    except ValueError:
        return None
    return automaton.minimal() if automaton.transitions.size <= MAX_TRANSITIONS else None


def _tables(automaton: Automaton) -> dict[str, Any]:
    return {
        "start": automaton.start,
        "transitions": automaton.transitions.tolist(),
        "outputs": automaton.outputs.tolist(),
    }


def _examples(task: Task, tokens: Tensor, targets: Tensor) -> list[dict[str, list[int | None]]]:
    """Some words of the task without their padding, and their targets, None where nothing is scored."""
    examples = []
    for word, answers in zip(tokens[:EXAMPLES].tolist(), targets[:EXAMPLES].tolist(), strict=True):
        length = word.index(task.pad) if task.pad in word else len(word)
        length = min(length, EXAMPLE_TOKENS)
        said = [None if answer == IGNORE_INDEX else answer for answer in answers[:length]]
        examples.append({"tokens": word[:length], "targets": said})
    return examples


@torch.no_grad()
def _planes(
    model: SequenceModel, tokens: Tensor, targets: Tensor, automaton: Automaton | None
) -> list[dict[str, Any] | None]:
    """Of each layer the plane in which its states, by what the task says or remembers there, are farthest apart.

    directions: (M N) of x and of y, from which the origin is taken. points: x, y and label of some states. Labels are
    states of the automaton, without one targets. None where there is no such plane: too many components, one label
    alone, or states that are all alike or not finite.
    """
    labels = _labels(tokens, targets, automaton)
    scored = labels != NONE
    state: tuple[Tensor, ...] | None = None
    seen: list[list[Tensor]] = [[] for _ in model.mixers]
    for token in tokens.unbind(1):
        _, state = model.step(token, state)
        for layer, part in enumerate(state):
            seen[layer].append(part.flatten(1))
    return [
        _plane(torch.stack(parts, dim=1)[scored].double()[:SAMPLED], labels[scored][:SAMPLED], mixer.output.weight)
        for parts, mixer in zip(seen, cast(list[LinearRecurrence], model.mixers), strict=True)
    ]


def _plane(states: Tensor, labels: Tensor, output: Tensor) -> dict[str, Any] | None:
    """Of states (B, M N) with labels (B,)."""
    read = torch.nonzero((output != 0).any(0) & (states.var(0) > 0)).flatten()
    if not 0 < len(read) <= MAX_COMPONENTS or len(labels.unique()) < 2 or not states.isfinite().all():
        return None
    found = discriminants(states[:, read], labels)[:, :2]
    directions = torch.zeros(2, states.shape[1], dtype=torch.float64)
    directions[: found.shape[1], read] = found.T
    seen = states @ directions.T
    origin = (seen.amax(0) + seen.amin(0)) / 2
    scale = (seen - origin).abs().max()  # of both alike: two labels differ in the first alone
    points = torch.cat([(seen - origin) / scale, labels[:, None]], dim=1)
    drawn = np.random.default_rng(0).permutation(len(points))[:POINTS]
    return {
        "directions": (directions / scale).tolist(),
        "origin": (origin / scale).tolist(),
        "points": [[round(x, 3), round(y, 3), int(label)] for x, y, label in points[drawn].tolist()],
    }


def _labels(tokens: Tensor, targets: Tensor, automaton: Automaton | None) -> Tensor:
    """What a state is to tell apart, (B, T): the automaton's states after each token, or targets; NONE if nothing."""
    if automaton is None:
        return targets.masked_fill(targets == IGNORE_INDEX, NONE)
    transitions = torch.as_tensor(automaton.transitions)
    labels, state = torch.full_like(tokens, NONE), torch.full_like(tokens[:, 0], automaton.start)
    for t, token in enumerate(tokens.unbind(1)):
        state = torch.where(state == NONE, NONE, transitions[state, token])
        labels[:, t] = state
    return labels


def _document(title: str, packed: str) -> str:
    """page.html with the style, the data and the scripts in it, in place of the tags that name them."""
    room = resources.files(__name__)
    page, style, model, view = (
        (room / name).read_text("utf-8") for name in ("page.html", "page.css", "model.js", "page.js")
    )
    inlined = {
        "TITLE": html.escape(title),
        '<link rel="stylesheet" href="page.css">': f"<style>\n{style}</style>",
        '<script src="model.js"></script>': f"<script>\n{model}</script>",
        '<script src="page.js"></script>': f"<script>\n{view}</script>",
        "DATA": packed.replace("<", "\\u003c"),  # so that nothing in it ends the script
    }
    for place, content in inlined.items():
        page = page.replace(place, content)
    return page
