"""examples/time_series.py: what it loads, chooses and forecasts. It needs its extra."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("aeon", reason="aeon is not installed: pip install 'statemix[timeseries]'")

EXAMPLE = Path(__file__).parents[1] / "examples" / "time_series.py"


@pytest.fixture(scope="module")
def series() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE), run_name="time_series"))


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 300


def test_series_of_unequal_length_are_standardised_and_padded(series):
    train, test = series.load("JapaneseVowels")
    assert (train.x.shape, test.x.shape) == ((270, 26, 12), (370, 29, 12))
    assert (int(train.lengths.min()), int(train.lengths.max())) == (7, 26)
    steps = torch.cat([row[:length] for row, length in zip(train.x, train.lengths, strict=True)])
    torch.testing.assert_close(steps.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.std(0, correction=0), torch.ones(12), atol=1e-5, rtol=0)
    assert not train.x[train.lengths < 26][0, int(train.lengths[train.lengths < 26][0]) :].any()
    assert train.classes.bincount().tolist() == [30] * 9


def test_the_choice_sees_two_parts_of_the_training_part_with_every_class(series):
    train, _ = series.load("ItalyPowerDemand")
    part, held = series.split(train)
    assert len(part.x) + len(held.x) == 67
    rows = {tuple(row.flatten().tolist()) for row in part.x} | {tuple(row.flatten().tolist()) for row in held.x}
    assert rows == {tuple(row.flatten().tolist()) for row in train.x}
    assert len(rows) == 67  # no row is in both
    assert held.classes.bincount().tolist() == [count // 3 for count in train.classes.bincount().tolist()]


def test_a_row_for_each_model_and_seed_and_a_table_of_them(series):
    config = series.Classify(datasets=("ItalyPowerDemand",), seeds=2, steps=3, d_model=8, parameters=500)
    rows = list(series.classify(config))
    assert [(row["model"], row["seed"]) for row in rows] == [
        (model, seed) for model in ("MiniRocket", "bd_lru", "gru") for seed in (0, 1)
    ]
    sizes = [row["parameters"] for row in rows if "parameters" in row]
    assert max(sizes) <= 1.05 * min(sizes)
    head, line = series.table(rows)
    assert head[:4] == ["test accuracy", "MiniRocket", "bd_lru", "gru"]
    assert line[0] == "ItalyPowerDemand"
    assert [row["accuracy"] for row in rows[:2]] == pytest.approx([0.965, 0.965], abs=0.02)


def test_a_forecast_goes_on_as_the_whole_sequence_would(series):
    """Each number from the state and the one before, against all numbers from the beginning."""
    torch.manual_seed(0)
    forecaster = series.Forecaster(series.Forecast(d_model=8, parameters=500).backbone("bd_lru", bidirectional=False))
    forecaster.eval()
    x = torch.randn(1, 20, 1)
    made = forecaster.go_on(x, 6)
    for step in range(6):
        whole = torch.cat([x, made[:, :step]], dim=1)
        torch.testing.assert_close(forecaster(whole)[:, -1], made[:, step], rtol=1e-4, atol=1e-5)


def test_growth_that_never_changes_is_forecast_exactly(series):
    """Then the standardised growth has no deviation but rounding, and the forecast is the last year, grown."""
    past = np.exp(0.01 * np.arange(60)) * np.tile(1 + np.arange(12) / 12, 5)
    past = past * (1 + 1e-9 * np.random.default_rng(0).standard_normal(60))
    made = series.predict(past, "bd_lru", series.Forecast(d_model=8, parameters=500), 2, 1e-3, seed=0)
    assert made == pytest.approx(np.tile(past[-12:], 2) * np.exp(0.12 * np.repeat([1, 2], 12)), rel=1e-6)


def test_the_table_of_a_forecast_has_a_line_for_each_model(series):
    lines = series.forecast(series.Forecast(seeds=1, steps=3, d_model=8, parameters=500))
    assert [line[0].partition(",")[0] for line in lines[1:]] == ["as a year before", "AutoETS", "bd_lru", "gru"]
    passengers = np.asarray(series.load_airline())
    wrong = np.abs(passengers[-24:].reshape(2, 12) - passengers[-36:-24]).mean()
    assert lines[1][1] == f"{wrong:.1f}"
