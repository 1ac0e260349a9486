"""Random automata: how often is one learned from labelled words so that it is right at every length?

    statemix sweep experiments/random_automata.py --budget quick --out runs/random_automata
    python experiments/random_automata.py runs/random_automata      verify every run, write results/random_automata.csv

Automata of 4 to 32 states over 2 to 4 symbols, each with a mixer of its own weights. A success is one that
`statemix.verify` finds equal at every length; a run is verified once, and its answer kept beside it.

A one-hot row of gates copies: a component holds, after a word, what another held before its last symbol, or a value of
that symbol. So what a component says of the automaton's state is a function of it that follows from the read-out by
going back symbol by symbol, and with a component for each of these functions, which `components` counts, a block can
answer alone: as many as the automaton of the reversed words has states, which are many more than its own. Columns with
a single one, as of pd_ssm, need one layer of S components. Rivals have no states that come again bit for bit: none is
ever found equal, and what is left to compare is how many of 256 words they answer without an error.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from statemix import TrainConfig, records
from statemix.analysis.automata import NONE, Automaton
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.model import SequenceModel
from statemix.report.tables import align
from statemix.runs.presets import EXACT
from statemix.runs.read import Row, Run, find_runs, write_table
from statemix.search import MAX_STATES, explore
from statemix.sizing import measure, solve
from statemix.specs import Spec
from statemix.tasks import build_task
from statemix.training.config import ModelConfig
from statemix.verify import VERDICT_FILE, write_verdict

STATES, DRAWS = (4, 8, 16, 32), {"quick": 20, "full": 50}
# rivals at quick: a run of PD-SSM or DeltaProduct takes minutes
RIVAL_STATES, RIVAL_DRAWS = {"quick": (4,), "full": STATES}, {"quick": 5, "full": 50}
BLOCK_SIZE, NUM_BLOCKS, D_MODEL = 16, 16, 64
# of 2,048 tokens; few where a block would need more components than it has
STEPS = {4: 10_000, 8: 600, 16: 600, 32: 600}
RIVAL_SEARCH = 50_000  # states of a rival, of which none comes again bit for bit: all words of up to 7 to 15 tokens
MANY = 1_000  # functions, where counting them ends; the table says "many"
# rivals have as many parameters as the BD-LRU of the same automaton
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "PD-SSM": ("pd_ssm", {}),
    "LSTM": ("lstm", {}),
    "DeltaProduct, rank 2": ("delta_product", {"chunk_size": 16}),
    "Mamba-2": ("mamba2", {"state_dim": 16}),
    "LRU": ("lru", {}),
}


def recipe(states: int, number: int, mixer: Spec, *, one_hot: bool) -> TrainConfig:
    """How one automaton is learned: by the recipe of "exact", from labels at every symbol.

    `one_hot`: with what the recipe has for rows of gates.
    """
    curriculum = dataclasses.replace(EXACT.curriculum, prune_after=50, prune_settle=50, quiet=300)
    return dataclasses.replace(
        EXACT,
        task={
            "name": "random-automaton",
            "num_states": states,
            "num_symbols": 2 + number % 3,
            "number": number,
            "min_len": 1,
            "start": True,
        },
        mixer=dict(mixer),
        model=ModelConfig(d_model=D_MODEL, mlp_size=2 * D_MODEL),
        curriculum=curriculum if one_hot else dataclasses.replace(curriculum, prune=None, queries=0),
        row_entropy=0.1 if one_hot else 0.0,
        gate_noise=0.5 if one_hot else 0.0,
        block_dropout=EXACT.block_dropout if one_hot else 0.0,
        sharpen=EXACT.sharpen if one_hot else None,
        steps=STEPS[states],
        eval_every=STEPS[states] // 5,
        eval_sequences=256,
        test_lengths=(40, 256),
        seed=number,
    )


def configs(budget: str) -> dict[str, TrainConfig]:
    """Every automaton with BD-LRU and with each rival; the smallest first."""
    made = {}
    for states in STATES:
        own: Spec = {"name": "bd_lru", "num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE}
        size, _ = measure(own, D_MODEL)
        mixers = {"BD-LRU": own}
        for label, (name, options) in RIVALS.items() if states in RIVAL_STATES[budget] else ():
            mixers[label] = solve(name, D_MODEL, budget=size, **options).spec
        for number in range(DRAWS[budget]):
            for label, mixer in mixers.items():
                if mixer is not own and number >= RIVAL_DRAWS[budget]:
                    continue
                config = recipe(states, number, mixer, one_hot=mixer is own)
                made[f"{label}, {states} states, seed {number}"] = config
    return made


def components(automaton: Automaton) -> int:
    """How many components of a block suffice to follow an automaton whose output is one of the state it comes to.

    They hold functions of the state: what it says, and with each function what that will be after each symbol. One that
    is the same at every state is a value of the symbol and needs none. Counting ends at MANY.
    """
    moves = automaton.transitions[:-1]  # without the state before the start token
    symbols = [x for x in range(moves.shape[1]) if (moves[:, x] >= 0).all()]
    says = {int(moves[q, x]): int(automaton.outputs[q, x]) for q in range(len(moves)) for x in symbols}
    pending = [tuple(says.get(q, NONE) for q in range(len(moves)))]  # nothing leads back to the first state of some
    functions: set[tuple[int, ...]] = set()
    while pending and len(functions) < MANY:
        function = pending.pop()
        if len(set(function)) > 1 and function not in functions:
            functions.add(function)
            pending += [tuple(function[q] for q in moves[:, x].tolist()) for x in symbols]
    return len(functions)


def verified(run: Run) -> Row:
    """What a search through the states of a run's best model finds; it is made once, and read from then on."""
    path = run.folder / VERDICT_FILE
    if not path.exists():
        model = SequenceModel.load(run.folder / f"step-{run.summary['best_step']}")
        own = [mixer for mixer in model.mixers if isinstance(mixer, LinearRecurrence)]
        for mixer in own:
            mixer.sharpen(EXACT.sharpen or 1)
        most = MAX_STATES if own else RIVAL_SEARCH
        write_verdict(explore(model, build_task(run.config.task).automaton(), max_states=most), run.folder)
    found = records.read(path, {"outcome": str, "states": int}, "random_automata")
    scores = run.summary.get("sharpened", run.summary["test"])["256"]
    return {
        "mixer": run.config.mixer["name"],
        "states of the automaton": run.config.task["num_states"],
        "seed": run.config.seed,
        "components that suffice": components(build_task(run.config.task).automaton()),
        "outcome": found["outcome"],
        "states explored": found["states"],
        "steps": run.summary["steps"],
        "tokens right at 256": scores["token_accuracy"],
        "sequences right at 256": scores["sequence_accuracy"],
    }


def wilson(successes: int, tries: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927): of no success in 20 tries, 0 to 0.16."""
    z = 1.96
    middle, spread = successes + z**2 / 2, z * math.sqrt(successes * (tries - successes) / tries + z**2 / 4)
    return max(0.0, (middle - spread) / (tries + z**2)), (middle + spread) / (tries + z**2)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Per mixer and number of states: verified successes, their rate, and what became of the others."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mixer"], int(row["states of the automaton"])), []).append(row)
    lines = [
        [
            "mixer",
            "states",
            "components that suffice",
            "draws",
            "equal at every length",
            "rate",
            "differ",
            "undecided",
            "without an error at 256",
            "tokens right at 256, median (least)",
        ]
    ]
    for (mixer, states), of in sorted(groups.items()):
        equal, differ, undecided = (
            sum(row["outcome"] == outcome for row in of) for outcome in ("equal", "differs", "undecided")
        )
        low, high = wilson(equal, len(of))
        right = sum(float(row["sequences right at 256"]) == 1 for row in of)
        needed = sorted(int(row["components that suffice"]) for row in of)
        names = ["many" if number >= MANY else str(number) for number in dict.fromkeys((needed[0], needed[-1]))]
        tokens = sorted(float(row["tokens right at 256"]) for row in of)
        counts = [len(of), equal, f"{equal / len(of):.2f} ({low:.2f}-{high:.2f})", differ, undecided, right]
        counts.append(f"{median(tokens):.3f} ({tokens[0]:.3f})")
        lines.append([mixer, *map(str, [states, " to ".join(names), *counts])])
    return lines


def main() -> None:
    """Verify every run that has ended, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    rows = [verified(run) for run in find_runs([parser.parse_args().runs])]
    write_table(rows, Path("results"), "random_automata")
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
