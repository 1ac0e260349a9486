"""Agents of four recurrent cores with as many parameters on popgym's games of memory: returns and speed.

    python experiments/agents.py --budget quick       writes results/agents_quick.csv
    pip install 'statemix[rl]' sb3-contrib            what it needs

quick: 100,000 steps of each run. full: 1,000,000. smoke: two games, two updates, to see that everything runs. The runs
are made one after the other by examples/popgym_ppo.py; each has its line in the table as soon as it is done, and the
command, given again, makes those that are missing. It prints the table with intervals over the seeds.

"sb3_lstm" is RecurrentPPO of sb3-contrib with the same games, settings and number of steps, and an LSTM of as many
parameters between observations and heads.
"""

import argparse
import csv
import itertools
import runpy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from statemix.report.tables import align, estimate
from statemix.runs.read import Row, write_table
from statemix.sizing import solve

EXAMPLE = Path(__file__).parents[1] / "examples" / "popgym_ppo.py"
GAMES = [
    "RepeatPreviousEasy",
    "RepeatFirstEasy",
    "AutoencodeEasy",
    "CountRecallEasy",
    "PositionOnlyCartPoleEasy",
    "VelocityOnlyCartPoleEasy",
    "HigherLowerEasy",
    "MultiarmedBanditEasy",
]
SB3 = "sb3_lstm"
CORES = ["bd_lru", "h_lru", "gru", "lstm", SB3]


class Budget(NamedTuple):
    """What is run: steps of each run, games, seeds."""

    steps: int
    games: Sequence[str]
    seeds: Sequence[int]


BUDGETS = {
    "smoke": Budget(4_096, GAMES[:2], [0]),
    "quick": Budget(100_000, GAMES, [0, 1, 2]),
    "full": Budget(1_000_000, GAMES, [0, 1, 2]),
}


def read(path: Path) -> list[Row]:
    """The runs that are done: game and mixer as they are, the others as numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds: dict[str, Callable[[str], str | float]] = {"game": str, "mixer": str, "seed": lambda cell: int(float(cell))}
    return [{name: kinds.get(name, float)(cell) for name, cell in row.items()} for row in rows]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return of each mixer by game, and environment steps per second of the processor, with 95 % intervals."""
    mixers = [mixer for mixer in CORES if any(row["mixer"] == mixer for row in rows)]
    lines = [["game", *(f"{mixer}, {what}" for what in ("return", "steps per CPU-s") for mixer in mixers)]]
    for game in dict.fromkeys(str(row["game"]) for row in rows):
        line = [game]
        for column, mixer in itertools.product(("mean_return", "steps_per_cpu_second"), mixers):
            numbers = [float(row[column] or 0) for row in rows if (row["game"], row["mixer"]) == (game, mixer)]
            line.append(estimate(numbers, ",.3f" if column == "mean_return" else ",.0f") or "-")
        lines.append(line)
    return lines


def recurrent_ppo(ppo: dict[str, Any], config: Any) -> Any:
    """A run of sb3-contrib with the settings of the example; where it came to, as the example says it."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

    games = ppo["Games"](config.env, config.num_envs)
    hidden = solve("lstm", games.input_size, budget=config.parameters).spec["hidden_size"]
    learner = RecurrentPPO(
        "MlpLstmPolicy",
        VecMonitor(DummyVecEnv([lambda game=game: game for game in games.games])),
        learning_rate=config.learning_rate,
        n_steps=config.rollout,
        batch_size=config.rollout * config.num_envs // config.minibatches,
        n_epochs=config.epochs,
        gamma=config.discount,
        gae_lambda=config.trace,
        clip_range=config.clip,
        ent_coef=config.entropy,
        policy_kwargs={
            "lstm_hidden_size": hidden,
            "net_arch": [],
            "shared_lstm": True,
            "enable_critic_lstm": False,
        },
        seed=config.seed,
        device="cpu",
    )
    began, cpu = time.perf_counter(), time.process_time()
    learner.learn(config.steps)
    steps, returns = learner.num_timesteps, [float(episode["r"]) for episode in learner.ep_info_buffer or ()]
    spent = time.perf_counter() - began, time.process_time() - cpu
    return ppo["Progress"](steps, steps / spent[0], steps / spent[1], sum(returns) / max(1, len(returns)))


def main() -> None:
    """Make the runs that are missing, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="quick")
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ppo, budget = runpy.run_path(str(EXAMPLE), run_name="popgym_ppo"), BUDGETS[arguments.budget]
    name = f"agents_{arguments.budget}"
    rows = read(arguments.out / f"{name}.csv")
    done = {(row["game"], row["mixer"], row["seed"]) for row in rows}
    for seed, game, mixer in itertools.product(budget.seeds, budget.games, CORES):  # all of a seed before the next
        if (game, mixer, seed) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = ppo["Config"](env=game, mixer=mixer, seed=seed, steps=budget.steps, out=Path(folder))
            if mixer == SB3:
                last = recurrent_ppo(ppo, config)
            else:
                *_, last = ppo["train"](config)
        rows.append({"game": game, "mixer": mixer, "seed": seed, **last._asdict()})
        write_table(rows, arguments.out, name)
        print(f"{game} {mixer} {seed}: return {last.mean_return:.3f}, {last.steps_per_second:,.0f} steps/s", flush=True)
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
