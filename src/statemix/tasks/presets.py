"""Presets: the settings in which a task is usually reported. Options of tasks and sizes of data, not of training."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

Options = dict[str, Any]


class Setting(NamedTuple):
    """One setting of a task.

    task: spec of the task. train_sequences: size of the training set; None: every batch is new. test_sequences: at each
    length. changed: "baseline", or what differs from it, such as "vocab_size=64". test_lengths: lengths of the test;
    empty: the task's own.
    """

    task: Options
    train_sequences: int | None
    test_sequences: int
    changed: str
    test_lengths: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A baseline and its changes, one factor at a time."""

    baseline: Options
    train_sequences: int | None = 12_800
    test_sequences: int = 1_280
    changes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    test_lengths: tuple[int | str, ...] = ()


TRAIN_SEQUENCES = {"train_sequences": (6_400, 3_200, 1_600, 800)}
RECALL_LENGTHS = {"seq_len": (256, 512, 1_024)}
SMALL_VOCABULARIES = {"vocab_size": (32, 64, 128)}
TEST_LENGTHS = (40, 64, 96, 128, 192, 256)
WORDS = {"seq_len": 40, "min_len": 1, "start": True, "scored": "last"}

PRESETS: dict[str, dict[str, Grid]] = {
    # Poli et al. 2024 (arXiv 2403.17844): 66 settings
    "mad": {
        "in-context-recall": Grid(
            {"vocab_size": 16, "seq_len": 128},
            changes=SMALL_VOCABULARIES | RECALL_LENGTHS | TRAIN_SEQUENCES,
        ),
        "noisy-in-context-recall": Grid(
            {"vocab_size": 32, "seq_len": 128, "noise_vocab_size": 16, "frac_noise": 0.2},
            # 16 of the tokens are noise
            changes={"vocab_size": (48, 80, 144), **RECALL_LENGTHS, **TRAIN_SEQUENCES, "frac_noise": (0.4, 0.6, 0.8)},
        ),
        "fuzzy-in-context-recall": Grid(
            {"vocab_size": 16, "seq_len": 128, "k_motif_size": 3, "v_motif_size": 3},
            changes=SMALL_VOCABULARIES | RECALL_LENGTHS | TRAIN_SEQUENCES,
        ),
        "memorization": Grid(
            {"vocab_size": 256, "seq_len": 32},
            train_sequences=256,
            changes={"vocab_size": (512, 1_024, 2_048, 4_096, 8_192)},
        ),
        "selective-copying": Grid(
            {"vocab_size": 16, "seq_len": 256, "num_tokens_to_copy": 16},
            changes={
                **SMALL_VOCABULARIES,
                "seq_len": (512, 1_024),
                **TRAIN_SEQUENCES,
                "num_tokens_to_copy": (32, 64, 96),
            },
        ),
        "compression": Grid(
            {"vocab_size": 16, "seq_len": 32},
            changes={**SMALL_VOCABULARIES, "seq_len": (64, 128, 256), **TRAIN_SEQUENCES},
        ),
    },
    # train at lengths 3-40, test at 40-256
    "formal": {
        "parity": Grid({"seq_len": 40, "min_len": 3}, train_sequences=None, test_lengths=TEST_LENGTHS),
        "modular-counting": Grid(
            {"seq_len": 40, "min_len": 3, "modulus": 5}, train_sequences=None, test_lengths=TEST_LENGTHS
        ),
        "cycle-navigation": Grid(
            {"seq_len": 40, "min_len": 3, "cycle_length": 5}, train_sequences=None, test_lengths=TEST_LENGTHS
        ),
        "modular-arithmetic": Grid(
            {"seq_len": 40, "min_len": 3, "modulus": 5, "multiplication": True},
            train_sequences=None,
            test_lengths=TEST_LENGTHS,
        ),
    },
    # Terzic et al. 2025: a label at the end of words of up to 40 tokens, tested at 40 to 256; the start token is ours
    "exact": {
        "parity": Grid(WORDS, train_sequences=None, test_lengths=("40-256",)),
        "even-pairs": Grid(WORDS, train_sequences=None, test_lengths=("40-256",)),
        "modular-counting": Grid(WORDS, train_sequences=None, test_lengths=("40-256",)),
        "cycle-navigation": Grid(WORDS, train_sequences=None, test_lengths=("40-256",)),
        "modular-arithmetic-simple": Grid(WORDS, train_sequences=None, test_lengths=("40-256",)),
        "permutation": Grid(
            {**WORDS, "group": "S5", "generators": 32},
            train_sequences=None,
            changes={"group": ("A5",), "generators": (8, 12)},
            test_lengths=("40-256",),
        ),
    },
}


def settings(preset: str, task: str) -> list[Setting]:
    """The settings of a task in a preset, the baseline first.

    Raises:
        ValueError: the preset is unknown, or has no settings of the task; the message lists the names.
    """
    if preset not in PRESETS:
        raise ValueError(f"settings: `preset` must be one of {sorted(PRESETS)}, got {preset!r}.")
    if task not in PRESETS[preset]:
        raise ValueError(f"settings: `task` must be one of {sorted(PRESETS[preset])}, got {task!r}.")
    grid = PRESETS[preset][task]
    found = []
    for key, value in [("", None), *((key, value) for key, values in grid.changes.items() for value in values)]:
        options = {"name": task, **grid.baseline}
        train_sequences = grid.train_sequences
        if key == "train_sequences":
            train_sequences = value
        elif key:
            options[key] = value
        changed = f"{key}={value}" if key else "baseline"
        found.append(Setting(options, train_sequences, grid.test_sequences, changed, grid.test_lengths))
    return found
