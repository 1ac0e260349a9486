"""Time series: classifiers of whole sequences against MiniRocket, and a forecast that goes on from a state.

    pip install 'statemix[timeseries]'
    python examples/time_series.py classify            # the tables of docs/time-series.md
    python examples/time_series.py forecast

The data sets are those that aeon ships; nothing is downloaded. Training and test parts are as shipped, and what is
chosen is chosen within the training part.
"""

import csv
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from aeon.classification.convolution_based import MiniRocketClassifier
from aeon.datasets import load_airline, load_classification
from aeon.forecasting.stats import AutoETS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from statemix import Backbone, SequencePredictor
from statemix.mixers import MIXERS
from statemix.report.tables import align, estimate
from statemix.sizing import solve

# of aeon's bundle those with series of at most 100 steps; the longer ones take minutes each
DATASETS = ("BasicMotions", "ItalyPowerDemand", "JapaneseVowels")
SEASON, TESTED = 12, 24  # months


@dataclasses.dataclass(frozen=True)
class Config:
    """What both commands share.

    Args:
        mixers: names in statemix.mixers.MIXERS.
        seeds: how many, from 0 on.
        parameters: of one mixer; its width follows.
        d_model: width of the backbone.
        num_layers: pairs of mixer and SwiGLU, of each direction.
        dropout: in training.
        batch_size: sequences a step.
        learning_rates: to choose from; of AdamW, the highest of a cycle.
        steps: of a training; to choose from in a forecast.
    """

    mixers: tuple[str, ...] = ("bd_lru", "gru")
    seeds: int = 3
    parameters: int = 8_000
    d_model: int = 32
    num_layers: int = 2
    dropout: float = 0.1
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    steps: int = 100

    def backbone(self, mixer: str, *, bidirectional: bool) -> Backbone:
        """A new backbone with so many parameters in each mixer."""
        spec = solve(mixer, self.d_model, budget=self.parameters, **MIXERS[mixer].table_options).spec
        return Backbone(self.d_model, self.num_layers, spec, bidirectional=bidirectional, dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class Classify(Config):
    """Classifiers of each data set, and their accuracy on its test part.

    Args:
        datasets: names of data sets with a class for each sequence.
        poolings: to choose from, see SequencePredictor.
        out: a CSV with a line for each model, data set and seed.
    """

    datasets: tuple[str, ...] = DATASETS
    poolings: tuple[str, ...] = ("mean", "attention")
    out: Path = Path("runs/time_series.csv")


@dataclasses.dataclass(frozen=True)
class Forecast(Config):
    """The last two years of aeon's airline passengers, from all before: the mean absolute error in thousands."""

    learning_rates: tuple[float, ...] = (1e-3, 3e-3)


class Sequences(NamedTuple):
    """x (B, T, F), zeros behind the ends; lengths (B,); classes (B,)."""

    x: Tensor
    lengths: Tensor
    classes: Tensor

    def rows(self, which: Tensor) -> "Sequences":
        """Some of them."""
        return Sequences(*(part[which] for part in self))


def load(name: str) -> tuple[Sequences, Sequences]:
    """Training and test part, each channel with the mean 0 and the deviation 1 of the training part."""
    (train, train_names), (test, test_names) = (load_classification(name, split=split) for split in ("train", "test"))
    steps = np.concatenate([series.T for series in train])
    mean, deviation = steps.mean(0), steps.std(0)
    names = sorted(set(train_names))

    def sequences(all_series: Any, classes: Any) -> Sequences:
        rows = [torch.tensor((series.T - mean) / deviation, dtype=torch.float32) for series in all_series]
        return Sequences(
            nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.tensor([len(row) for row in rows]),
            torch.tensor([names.index(name) for name in classes]),
        )

    return sequences(train, train_names), sequences(test, test_names)


def split(sequences: Sequences) -> tuple[Sequences, Sequences]:
    """Two thirds and one third of each class."""
    order = torch.randperm(len(sequences.classes), generator=torch.Generator().manual_seed(0))
    place = one_hot(sequences.classes[order]).cumsum(0).gather(1, sequences.classes[order, None])[:, 0]
    return sequences.rows(order[place % 3 != 0]), sequences.rows(order[place % 3 == 0])


def train(model: nn.Module, loss_of: Any, config: Config, learning_rate: float, steps: int) -> None:
    """AdamW over one cycle of its learning rate; `loss_of` draws a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def fit(data: Sequences, mixer: str, config: Classify, learning_rate: float, pooling: str, seed: int) -> Any:
    """A classifier, trained."""
    torch.manual_seed(seed)
    backbone = config.backbone(mixer, bidirectional=True)
    model = SequencePredictor(data.x.shape[2], int(data.classes.max()) + 1, backbone, pooling=pooling)

    def loss_of() -> Tensor:
        batch = data.rows(torch.randint(len(data.classes), (config.batch_size,)))
        return cross_entropy(model(batch.x, batch.lengths), batch.classes)

    train(model, loss_of, config, learning_rate, config.steps)
    return model


@torch.no_grad()
def score(model: SequencePredictor, data: Sequences) -> tuple[float, float]:
    """Accuracy, and the loss with its sign turned, which decides between equals."""
    logits = torch.cat([model(part.x, part.lengths) for part in map(data.rows, torch.arange(len(data.x)).split(64))])
    accuracy = (logits.argmax(1) == data.classes).float().mean()
    return accuracy.item(), -cross_entropy(logits, data.classes).item()


def classify(config: Classify) -> Iterator[dict[str, Any]]:
    """A row for each data set, model and seed: learning rate and pooling are the best on a third of the training."""
    for name in config.datasets:
        data, test = load(name)
        part, held = split(data)
        equal = [load_classification(name, split=which, load_equal_length=True) for which in ("train", "test")]
        for seed in range(config.seeds):
            began = time.process_time()
            rocket = MiniRocketClassifier(random_state=seed).fit(*equal[0])
            accuracy = float((rocket.predict(equal[1][0]) == equal[1][1]).mean())
            yield {"dataset": name, "model": "MiniRocket", "seed": seed, "accuracy": accuracy} | {
                "seconds": time.process_time() - began
            }
        for mixer in config.mixers:
            began, tried = time.process_time(), {}
            for choice in itertools.product(config.learning_rates, config.poolings):
                tried[choice] = score(fit(part, mixer, config, *choice, seed=0), held)
            rate, pooling = best = max(tried, key=lambda choice: tried[choice])
            choosing = time.process_time() - began
            for seed in range(config.seeds):
                began = time.process_time()
                model = fit(data, mixer, config, *best, seed=seed)
                size = sum(weight.numel() for weight in model.parameters())
                row = {"dataset": name, "model": mixer, "seed": seed, "accuracy": score(model, test)[0]}
                spent = time.process_time() - began + choosing / config.seeds
                yield row | {"parameters": size, "learning_rate": rate, "pooling": pooling, "seconds": spent}


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each data set: what every model reached, and its median time, with a share of the choice.

    The first seed of MiniRocket has the time of numba's compiler in it.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [["test accuracy", *models, *(f"{model}, CPU-s" for model in models)]]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        own = {m: [row for row in rows if (row["dataset"], row["model"]) == (name, m)] for m in models}
        accuracies = [estimate([row["accuracy"] for row in own[m]], ".3f") for m in models]
        lines.append([name, *accuracies, *(f"{np.median([row['seconds'] for row in own[m]]):.1f}" for m in models)])
    return lines


class Forecaster(nn.Module):
    """The next number of a series, at every step, from all numbers up to it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.input = nn.Linear(1, backbone.output_size)
        self.backbone = backbone
        self.output = nn.Linear(backbone.output_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, 1) to what comes after each step, (B, T, 1)."""
        y, _ = self.backbone(self.input(x))
        return self.output(y)

    @torch.no_grad()
    def go_on(self, x: Tensor, steps: int) -> Tensor:
        """The `steps` numbers after x (B, T, 1), each made of the one before and the state."""
        y, state = self.backbone(self.input(x))
        made = [self.output(y[:, -1])]
        while len(made) < steps:
            y_next, state = self.backbone.step(self.input(made[-1]), state)
            made.append(self.output(y_next))
        return torch.stack(made, dim=1)


def predict(past: np.ndarray, mixer: str, config: Forecast, steps: int, learning_rate: float, seed: int) -> np.ndarray:
    """The two years after `past`: the series is learnt as yearly growth, log y_t - log y_{t-12}, standardised."""
    growth = np.log(past[SEASON:] / past[:-SEASON])
    mean, deviation = growth.mean(), growth.std()
    x = torch.tensor((growth - mean) / deviation, dtype=torch.float32)[None, :, None]
    torch.manual_seed(seed)
    model = Forecaster(config.backbone(mixer, bidirectional=False))
    train(model, lambda: mse_loss(model(x[:, :-1]), x[:, 1:]), config, learning_rate, steps)
    series = list(past)
    for number in model.go_on(x, TESTED)[0, :, 0].tolist():
        series.append(series[-SEASON] * np.exp(number * deviation + mean))
    return np.array(series[-TESTED:])


def error(made: np.ndarray, true: np.ndarray) -> float:
    """Mean absolute error."""
    return float(np.abs(made - true).mean())


def forecast(config: Forecast) -> list[list[str]]:
    """A line for each model; steps and learning rate are the best on the two years before those of the test."""
    series = np.asarray(load_airline())
    past, truth = series[:-TESTED], series[-TESTED:]
    lines = [["", "mean absolute error, thousands of passengers"]]
    lines.append(["as a year before", f"{error(np.tile(past[-SEASON:], TESTED // SEASON), truth):.1f}"])
    ets = AutoETS(seasonal_period=SEASON, allow_multiplicative_trend=True).iterative_forecast(past, TESTED)
    lines.append(["AutoETS", f"{error(ets, truth):.1f}"])
    for mixer in config.mixers:
        tried = {}
        for choice in itertools.product((config.steps // 3, config.steps), config.learning_rates):
            made = [predict(past[:-TESTED], mixer, config, *choice, seed=seed) for seed in range(config.seeds)]
            tried[choice] = sum(error(one, past[-TESTED:]) for one in made)
        best = min(tried, key=lambda choice: tried[choice])
        errors = [error(predict(past, mixer, config, *best, seed=seed), truth) for seed in range(config.seeds)]
        lines.append([f"{mixer}, {best[0]} steps at {best[1]:g}", estimate(errors, ".1f")])
    return lines


def main() -> None:
    """Run the command, and print its table."""
    config = tyro.extras.subcommand_cli_from_dict({"classify": Classify, "forecast": Forecast})
    torch.set_num_threads(1)  # of products this small, threads would only wait for each other
    if isinstance(config, Forecast):
        print(align(forecast(config), markdown=True))
        return
    config.out.parent.mkdir(parents=True, exist_ok=True)
    names = ("dataset", "model", "seed", "accuracy", "parameters", "learning_rate", "pooling", "seconds")
    with config.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        rows = []
        for row in classify(config):
            rows.append(row)
            writer.writerow(row)
            file.flush()
            print(f"{row['dataset']:24} {row['model']:12} seed {row['seed']}  {row['accuracy']:.3f}", flush=True)
    print(align(table(rows), markdown=True))


if __name__ == "__main__":
    main()
