"""The examples: each runs, goes on where it was, and does what its page says. They need their extras."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("popgym", reason="popgym is not installed: pip install 'statemix[rl]'")

EXAMPLE = Path(__file__).parents[1] / "examples" / "popgym_ppo.py"


@pytest.fixture(scope="module")
def ppo() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE), run_name="popgym_ppo"))


def config(ppo, **options):
    """Two environments, and episodes that begin and end within a rollout."""
    small = {"num_envs": 3, "rollout": 60, "minibatches": 2, "d_model": 8, "parameters": 500, "epochs": 2}
    return ppo.Config(**small | options)


def start(ppo, options):
    """An agent, its games, and the state and resets before the first step."""
    torch.manual_seed(0)
    games = ppo.Games(options.env, options.num_envs)
    games.begin(options.seed)
    agent = ppo.Agent(games.input_size, games.num_actions, options)
    reset = torch.zeros(options.num_envs, dtype=torch.bool)
    return agent, games, agent.core.initial_state(options.num_envs), reset


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 250


@pytest.mark.parametrize("mixer", ["bd_lru", "h_lru", "gru", "lstm", "attention"])
def test_learning_sees_what_acting_saw(ppo, mixer):
    """The chances of the actions, from the state that a rollout began with and its resets: also in a second rollout."""
    options = config(ppo, mixer=mixer)
    agent, games, state, reset = start(ppo, options)
    for _ in range(2):
        rollout, state, reset = ppo.play(agent, games, state, reset, options)
        assert rollout.resets.any()
        assert rollout.resets.shape == (3, 60)
        logits, values = agent(rollout.observations, rollout.state, rollout.resets)
        chances = logits.log_softmax(-1).gather(2, rollout.actions[..., None])[..., 0]
        torch.testing.assert_close(chances, rollout.chances, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, rollout.targets - rollout.advantages, rtol=1e-4, atol=1e-4)
        other = torch.zeros_like(rollout.resets)
        wrong, _ = agent(rollout.observations, rollout.state, other)
        assert (wrong - logits).abs().max() > 1e-5  # the resets matter


class Scripted:
    """Two environments that do as they are told: rewards, and where an episode is over or cut, (B, T)."""

    def __init__(self, rewards, over, cut) -> None:
        self.rewards, self.over, self.cut, self.time = rewards, over, cut, 0

    def observations(self):
        return torch.full((2, 3), float(self.time))

    def act(self, actions):
        t, self.time = self.time, self.time + 1
        return self.rewards[:, t], torch.full((2, 3), 100.0), self.over[:, t], self.cut[:, t]


def test_advantages_are_sums_of_discounted_surprises(ppo):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to the end of the episode, by the definition, step by step."""
    options = config(ppo, num_envs=2, rollout=6)
    over, cut = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    over[0, 2] = cut[1, 3] = True
    rewards = torch.arange(12.0).view(2, 6) / 10
    torch.manual_seed(0)
    agent = ppo.Agent(3, 2, options)
    state, reset = agent.core.initial_state(2), torch.zeros(2, dtype=torch.bool)
    rollout, after, last = ppo.play(agent, Scripted(rewards, over, cut), state, reset, options)
    assert rollout.resets.int().tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert not last.any()
    values = (rollout.targets - rollout.advantages).tolist()
    _, beyond, _ = agent.step(torch.full((2, 3), 6.0), after, last)
    _, states = agent.core(agent.input(rollout.observations[:, :4]))  # of row 1 where it is cut
    _, at_cut, _ = agent.step(torch.full((2, 3), 100.0), states, torch.zeros(2, dtype=torch.bool))
    for row in range(2):
        for t in range(6):
            advantage = 0.0
            for later in range(t, 6):
                ended = bool(over[row, later] or cut[row, later])
                following = values[row][later + 1] if later < 5 else beyond[row].item()
                if over[row, later]:
                    following = 0.0
                if cut[row, later]:  # what the agent thinks of what it saw there
                    following = at_cut[row].item()
                surprise = rewards[row, later].item() + 0.99 * following - values[row][later]
                advantage += (0.99 * 0.95) ** (later - t) * surprise
                if ended:
                    break
            assert rollout.advantages[row, t].item() == pytest.approx(advantage, abs=1e-5)


def test_it_goes_on_from_its_checkpoint(ppo, tmp_path):
    options = config(ppo, out=tmp_path / "run", steps=540)
    progress = list(ppo.train(options))
    assert [now.steps for now in progress] == [180, 360, 540]
    assert all(now.steps_per_second > 0 for now in progress)
    assert -1 <= progress[-1].mean_return <= 1
    assert list(ppo.train(options)) == []
    agent, *_ = start(ppo, options)
    fresh = {name: weight.clone() for name, weight in agent.state_dict().items()}
    optimizer = torch.optim.AdamW(agent.parameters(), options.learning_rate, weight_decay=0)
    more = config(ppo, out=tmp_path / "run", steps=720)
    assert [now.steps for now in ppo.train(more)] == [720]
    with pytest.raises(ValueError, match=r"^train: '.*agent\.safetensors' was made with .*\. Use another --out\.$"):
        next(ppo.train(config(ppo, out=tmp_path / "run", steps=720, env="RepeatFirstEasy")))
    recorded = str(ppo.safe_open(tmp_path / "run" / "agent.safetensors", framework="pt").metadata()["config"])
    assert ppo.load_checkpoint(tmp_path / "run" / "agent.safetensors", agent, optimizer, recorded) == 720
    assert all((weight != fresh[name]).any() for name, weight in agent.state_dict().items())
    assert {int(moments["step"]) for moments in optimizer.state_dict()["state"].values()} == {4 * 2 * 2}


def test_the_experiment_makes_the_runs_that_are_missing(tmp_path, capsys, monkeypatch):
    experiment = runpy.run_path(str(EXAMPLE.parents[1] / "experiments" / "agents.py"), run_name="agents")
    main, names = experiment["main"], experiment["main"].__globals__
    monkeypatch.setitem(names["BUDGETS"], "smoke", names["Budget"](2_048, ["RepeatPreviousEasy"], [0]))
    monkeypatch.setitem(names, "CORES", ["bd_lru", "gru"])
    monkeypatch.setattr("sys.argv", ["agents.py", "--budget", "smoke", "--out", str(tmp_path)])
    main()
    rows = names["read"](tmp_path / "agents_smoke.csv")
    assert [(row["mixer"], row["seed"], row["steps"]) for row in rows] == [("bd_lru", 0, 2_048), ("gru", 0, 2_048)]
    assert capsys.readouterr().out.count("RepeatPreviousEasy") == 3  # a line for each run, and one of the table
    names["write_table"](rows[1:], tmp_path, "agents_smoke")
    main()
    again = names["read"](tmp_path / "agents_smoke.csv")
    assert again[0] == rows[1]
    assert again[1]["mean_return"] == rows[0]["mean_return"]  # the same seed, the same agent
    assert "bd_lru 0" in capsys.readouterr().out


def test_the_table_of_the_experiment_has_the_interval_of_its_seeds():
    experiment = runpy.run_path(str(EXAMPLE.parents[1] / "experiments" / "agents.py"), run_name="agents")
    rows = [
        {"game": "A", "mixer": mixer, "seed": seed, "mean_return": seed / 10, "steps_per_cpu_second": 1000.0 * seed}
        for mixer in ("bd_lru", "gru")
        for seed in (1, 2, 3)
    ]
    rows.append(rows[0] | {"game": "B"})
    assert experiment["table"](rows) == [
        ["game"] + [f"{mixer}, {what}" for what in ("return", "steps per CPU-s") for mixer in ("bd_lru", "gru")],
        ["A", "0.200 ± 0.248", "0.200 ± 0.248", "2,000 ± 2,484", "2,000 ± 2,484"],  # 4.303 s / sqrt(3)
        ["B", "0.100", "-", "1,000", "-"],
    ]


def test_an_unknown_game_is_refused(ppo):
    with pytest.raises(ValueError, match=r"^Games: `env` must be one of \['AutoencodeEasy', .*got 'Tetris'\.$"):
        ppo.Games("Tetris", 1)
