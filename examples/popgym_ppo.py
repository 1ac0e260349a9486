"""PPO on popgym's games of memory, with a recurrent core of any mixer: how a state goes through an agent's life.

    pip install 'statemix[rl]'
    python examples/popgym_ppo.py --env RepeatPreviousEasy --mixer bd_lru --out runs/repeat-bd
    python examples/popgym_ppo.py --env RepeatPreviousEasy --mixer gru --out runs/repeat-gru       # as many parameters

Acting is a step at a time; learning goes over whole rollouts in parallel, from the state that each began with and with
the same resets (docs/agents.md). The same command, given again, goes on from its checkpoint.
"""

import dataclasses
import json
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import popgym.envs
import torch
import tyro
from popgym.wrappers import Antialias, DiscreteAction, Flatten, PreviousAction
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from statemix import Backbone
from statemix.backbone import State
from statemix.files import write_whole
from statemix.mixers import MIXERS
from statemix.sizing import solve


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    Args:
        env: a game of popgym with discrete actions.
        mixer: of the core, a name in statemix.mixers.MIXERS.
        out: folder of the checkpoint.
        steps: of all environments together.
        seed: of weights, games and actions.
        parameters: of one mixer; its width follows.
        d_model: width of the core.
        num_layers: pairs of mixer and SwiGLU in the core.
        num_envs: environments side by side, a row of the batch each.
        rollout: steps of each environment between two updates.
        epochs: times that a rollout is learnt from.
        minibatches: parts of the environments, one after the other.
        learning_rate: of AdamW.
        discount: gamma.
        trace: lambda of the generalised advantage estimate.
        clip: of the ratio of probabilities.
        entropy: weight of the bonus for indecision.
    """

    env: str = "RepeatPreviousEasy"
    mixer: str = "bd_lru"
    out: Path = Path("runs/popgym")
    steps: int = 200_000
    seed: int = 0
    parameters: int = 25_000
    d_model: int = 64
    num_layers: int = 1
    num_envs: int = 16
    rollout: int = 128
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-3
    discount: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01


class Agent(nn.Module):
    """Observations to logits of the actions and a value, with a state."""

    def __init__(self, input_size: int, num_actions: int, config: Config) -> None:
        super().__init__()
        fixed = MIXERS[config.mixer].table_options
        mixer = solve(config.mixer, config.d_model, budget=config.parameters, **fixed).spec
        self.input = nn.Linear(input_size, config.d_model)
        self.core = Backbone(config.d_model, config.num_layers, mixer)
        self.policy, self.value = nn.Linear(config.d_model, num_actions), nn.Linear(config.d_model, 1)
        with torch.no_grad():
            self.policy.weight.mul_(0.01)  # all actions are tried at first

    def forward(self, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, Tensor]:
        """A rollout, x (B, T, F) from the state before it, to logits (B, T, A) and values (B, T)."""
        y, _ = self.core(self.input(x), state, reset)
        return self.policy(y), self.value(y)[..., 0]

    @torch.no_grad()
    def step(self, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, Tensor, State]:
        """One step, x (B, F), to logits (B, A), values (B,) and the next state."""
        y, state = self.core.step(self.input(x), state, reset)
        return self.policy(y), self.value(y)[:, 0], state


class Games:
    """B environments. One whose episode ends begins anew at once: what is seen next is of the new episode."""

    def __init__(self, name: str, count: int) -> None:
        known = {game.__name__: game for game in popgym.envs.ALL}
        if name not in known:
            raise ValueError(f"Games: `env` must be one of {sorted(known)}, got {name!r}.")
        self.games = [DiscreteAction(Flatten(Antialias(PreviousAction(known[name]())))) for _ in range(count)]
        self.input_size, self.num_actions = self.games[0].observation_space.shape[0], self.games[0].action_space.n
        self.sums, self.returns = [0.0] * count, deque[float](maxlen=100)  # of the last episodes

    def begin(self, seed: int) -> None:
        """New episodes."""
        self.seen = [game.reset(seed=seed + row)[0] for row, game in enumerate(self.games)]

    def observations(self) -> Tensor:
        """(B, F)."""
        return torch.tensor([list(map(float, seen)) for seen in self.seen])

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions (B,) to rewards (B,), what was seen then (B, F), and whether the episode is over, or was cut (B,)."""
        results = [game.step(action)[:4] for game, action in zip(self.games, actions.tolist(), strict=True)]
        self.seen, rewards, over, cut = map(list, zip(*results, strict=True))
        last = self.observations()
        for row, game in enumerate(self.games):
            self.sums[row] += float(rewards[row])
            if over[row] or cut[row]:
                self.returns.append(self.sums[row])
                self.sums[row], self.seen[row] = 0.0, game.reset()[0]
        return torch.tensor(rewards, dtype=torch.float32), last, torch.tensor(over), torch.tensor(cut)


class Rollout(NamedTuple):
    """What B environments did in T steps, (B, T, ...), from the state before the first, one (B, M, N) per pair."""

    state: State
    observations: Tensor
    resets: Tensor  # True: an episode begins at that step
    actions: Tensor
    chances: Tensor  # logarithms, of the actions that were taken
    advantages: Tensor
    targets: Tensor  # of the values


class Progress(NamedTuple):
    """Where a run is. The speed is that of this process, the return the mean of the last 100 episodes."""

    steps: int
    steps_per_second: float
    steps_per_cpu_second: float
    mean_return: float


def play(agent: Agent, games: Games, state: State, reset: Tensor, config: Config) -> tuple[Rollout, State, Tensor]:
    """A rollout with its advantages, from the state so far and where an episode begins; and these two behind it."""
    before, steps = state, []
    for _ in range(config.rollout):
        x = games.observations()
        logits, value, state = agent.step(x, state, reset)
        action = torch.multinomial(logits.softmax(1), 1)
        chance = logits.log_softmax(1).gather(1, action)[:, 0]
        reward, last, over, cut = games.act(action[:, 0])
        if cut.any():  # by the limit of time alone: what would have come is worth what the agent thinks it is
            _, beyond, _ = agent.step(last, state, torch.zeros_like(cut))
            reward = reward + config.discount * torch.where(cut & ~over, beyond, 0)
        steps.append((x, reset, action[:, 0], chance, value, reward))
        reset = over | cut
    _, value, _ = agent.step(games.observations(), state, reset)
    x, resets, actions, chances, values, rewards = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    following = torch.cat([values[:, 1:], value[:, None]], dim=1)
    ends = torch.cat([resets[:, 1:], reset[:, None]], dim=1)  # the episode ends with that step
    surprise = rewards + config.discount * torch.where(ends, 0, following) - values
    advantages, sums = torch.empty_like(values), torch.zeros(len(values))
    for t in reversed(range(config.rollout)):
        sums = surprise[:, t] + config.discount * config.trace * torch.where(ends[:, t], 0, sums)
        advantages[:, t] = sums
    return Rollout(before, x, resets, actions, chances, advantages, advantages + values), state, reset


def learn(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config) -> None:
    """Epochs of clipped policy gradients. Each row of a part is a whole rollout, with the state that it began with."""
    for _ in range(config.epochs):
        for rows in torch.randperm(config.num_envs).chunk(config.minibatches):
            state, (x, resets, actions, chances, advantages, targets) = rollout[0], (part[rows] for part in rollout[1:])
            logits, values = agent(x, tuple(part[rows] for part in state), resets)
            logarithms = logits.log_softmax(-1)
            ratio = (logarithms.gather(2, actions[..., None])[..., 0] - chances).exp()
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - config.clip, 1 + config.clip) * advantages).mean()
            indecision = -(logarithms.exp() * logarithms).sum(-1).mean()
            loss = 0.5 * (values - targets).square().mean() - gain - config.entropy * indecision
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def save_checkpoint(path: Path, agent: Agent, optimizer: torch.optim.Optimizer, steps: int, config: str) -> None:
    """Replace the checkpoint, of weights and the moments of AdamW, as a whole."""
    tensors = {f"agent.{name}": weight for name, weight in agent.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": moment for name, moment in moments.items()}
    write_whole(path, save(tensors, metadata={"steps": str(steps), "config": config}))


def load_checkpoint(path: Path, agent: Agent, optimizer: torch.optim.Optimizer, config: str) -> int:
    """Take up what `save_checkpoint` wrote; the number of its steps."""
    moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.offset_keys()}, file.metadata()
    if metadata["config"] != config:
        raise ValueError(f"train: '{path}' was made with {metadata['config']}, this is {config}. Use another --out.")
    for key in (key for key in tensors if key.startswith("optimizer.")):
        _, number, name = key.split(".")
        moments[int(number)][name] = tensors[key]
    agent.load_state_dict({key[6:]: tensor for key, tensor in tensors.items() if key.startswith("agent.")})
    optimizer.load_state_dict({"state": dict(moments), "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["steps"])


def train(config: Config) -> Iterator[Progress]:
    """Train from the checkpoint in the folder, if there is one; where the run is, after each update."""
    torch.manual_seed(config.seed)
    path, done = config.out / "agent.safetensors", 0
    options = json.dumps(dataclasses.asdict(config) | {"steps": None, "out": None})  # which may differ
    games = Games(config.env, config.num_envs)
    agent = Agent(games.input_size, games.num_actions, config)
    optimizer = torch.optim.AdamW(agent.parameters(), config.learning_rate, weight_decay=0)
    if path.exists():
        done = load_checkpoint(path, agent, optimizer, options)
        torch.manual_seed(config.seed + done)  # with other chances, and in other games
    games.begin(config.seed + done)
    config.out.mkdir(parents=True, exist_ok=True)
    first, began, cpu = done, time.perf_counter(), time.process_time()
    state, reset = agent.core.initial_state(config.num_envs), torch.zeros(config.num_envs, dtype=torch.bool)
    while done < config.steps:
        rollout, state, reset = play(agent, games, state, reset, config)
        learn(agent, optimizer, rollout, config)
        done += config.num_envs * config.rollout
        save_checkpoint(path, agent, optimizer, done, options)
        mean = sum(games.returns) / len(games.returns) if games.returns else float("nan")
        spent = time.perf_counter() - began, time.process_time() - cpu
        yield Progress(done, (done - first) / spent[0], (done - first) / spent[1], mean)


if __name__ == "__main__":
    torch.set_num_threads(1)  # of products this small, threads would only wait for each other
    for now in train(tyro.cli(Config)):
        print(f"{now.steps:9,} steps {now.steps_per_second:7,.0f} steps/s   return {now.mean_return:6.3f}", flush=True)
