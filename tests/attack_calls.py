"""Calls of the public functions with arguments that nobody should give: tries of attack.py.

A call is made of good arguments, of which up to two are then spoiled. What is accepted is compared with the same call
in float64, where scans are the loop over time.
"""

import copy
import json
import math
import random
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attack import Attack, End, judge
from helpers import SCANS, TOLERANCE
from torch import Tensor

from statemix import SequenceModel, TrainConfig, available_backends
from statemix.decoder import Decoder
from statemix.gates import NORMALIZATIONS, normalize
from statemix.generate import generate
from statemix.mixers import MIXERS, build_mixer
from statemix.scan import reference
from statemix.scan.problem import check_problem
from statemix.sizing import solve
from statemix.tasks import TASKS, build_task
from statemix.training.config import ModelConfig, OptimizerConfig

MEMORY = 8 << 30  # bytes of address space: what is larger must be refused, by us or by the system
# the largest error, over the largest entry, of a layer or a model, which round more than once
ROUNDINGS = 32
JUNK = (0, -1, 1.5, "3", "softmx", None, True, [3], (), {}, 2**31, 2**63, 2**64, -(2**70), math.nan, math.inf, b"x", 3j)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRONG_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)

Arguments = dict[str, Any]
Check = Callable[[Any], bool]


# ---- tensors

# each: the same numbers in another form, or None where it cannot be
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "from an offset": lambda x: torch.cat([x[:1], x], dim=0)[1:],
    "backwards twice": lambda x: x.flip(0).contiguous().flip(0),
    "negated": lambda x: torch._neg_view(-x),
    "imaginary": lambda x: torch.complex(torch.zeros_like(x.double()), x.double()).imag.to(x.dtype),
    "conjugate": lambda x: torch.complex(x.double(), -x.double()).conj().imag.to(x.dtype),
    "with gradients": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded in time": lambda x: x[:, :1].expand(x.shape),
    "infinite": lambda x: x.clone().index_fill(0, torch.tensor([0]), math.inf),
    "not numbers": lambda x: x.clone().index_fill(0, torch.tensor([0]), math.nan),
    "zeros": torch.zeros_like,
    "large": lambda x: x * 1e3,
    "tiny": lambda x: x * 1e-30,
}


def spoiled(x: Tensor, rng: random.Random) -> Any:
    """What no function takes, mostly."""
    shape = list(x.shape)
    how = rng.randrange(8)
    if how == 0:
        return x.to(rng.choice(WRONG_DTYPES))
    if how == 1 and x.is_floating_point():
        return x.to(rng.choice([dtype for dtype in DTYPES if dtype != x.dtype]))
    if how == 2:
        return x[..., None] if rng.random() < 0.5 else x[0]
    if how in (3, 4):
        axis = rng.randrange(len(shape))
        shape[axis] = rng.choice((0, 1, shape[axis] + 1, 2 * shape[axis]))
        return x.new_ones(shape)
    if how == 5:  # as long as can be, without memory
        axis = rng.randrange(len(shape))
        shape[axis] = rng.choice((2**31, 2**36, 2**44))
        return x.new_ones(()).expand(shape)
    if how == 6:
        return rng.choice((x.tolist(), x.double().numpy(), x.flatten().tolist(), str(x.shape), *JUNK))
    return x.to_sparse()


def any_tensor(x: Tensor, rng: random.Random, spoil: bool) -> tuple[str, Any]:
    """A good tensor in some form, or a spoiled one, and what it is."""
    if spoil:
        x = spoiled(x, rng)
        return f"{getattr(x, 'dtype', '')} {tuple(getattr(x, 'shape', ())) or repr(x)[:60]}", x
    if not x.is_floating_point() or rng.random() < 0.4:
        return "", x
    name = rng.choice(list(LAYOUTS))
    return name, LAYOUTS[name](x)


def is_near(actual: Any, expected: Any, dtype: torch.dtype, roundings: int = 1) -> bool:
    """Whether numbers are those of float64, wherever those are finite and the dtype can hold them."""
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.detach().double(), expected.detach().double()
    fits = expected.isfinite() & (expected.abs() < torch.finfo(dtype).max / 16)
    if not fits.any():
        return True
    scale = expected[fits].abs().max().clamp(min=torch.finfo(dtype).tiny)
    return bool(((actual - expected)[fits].abs().max() / scale) <= roundings * TOLERANCE[dtype])


def doubled(value: Any) -> Any:
    """Tensors of floats in float64."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().double() if value.is_floating_point() else value.detach()


# ---- calls: each gives the function, its arguments, and what must hold of a result


def scan(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    kind = rng.choice(list(SCANS))
    dtype = rng.choice(DTYPES)
    batch, length, order, blocks = (rng.choice(sizes) for sizes in ((1, 2, 3), (1, 2, 9, 70), (1, 2, 3, 5), (1, 3, 17)))
    rows = (order,) if kind == "block" else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    arguments: Arguments = {
        "raw_gates": normal(batch, length, *rows, order + 1, blocks),
        "values": normal(batch, length, *rows, blocks),
        "initial_state": normal(batch, order, blocks) if rng.random() < 0.6 else None,
        "normalization": rng.choice(list(NORMALIZATIONS)),
        "reset": torch.rand(batch, length, generator=generator) < 0.1 if rng.random() < 0.4 else None,
        "backend": rng.choice(("auto", *available_backends("cpu"))),
    }
    if arguments["normalization"] == "none":  # or it would grow beyond any dtype
        arguments["raw_gates"] = arguments["raw_gates"] / (2 * order + 2)

    def check(states: Tensor) -> bool:
        problem = check_problem(kind, **{name: value for name, value in arguments.items() if name != "backend"})
        exact, _ = reference.scan(problem)  # in float64
        return is_near(states, exact, arguments["values"].dtype)

    return SCANS[kind], arguments, check


SIZES: dict[str, dict[str, tuple]] = {
    "bd_lru": {"num_blocks": (1, 3, 17), "block_size": (1, 2, 5), "selective": (True, False)},
    "h_lru": {"num_channels": (1, 3, 17), "order": (1, 2, 5), "form": ("companion", "observer")},
    "lru": {"num_channels": (1, 5)},
    "gru": {"hidden_size": (1, 5)},
    "lstm": {"hidden_size": (1, 5)},
    "mlstm": {"head_dim": (4,), "num_heads": (1, 2), "chunk_size": (1, 4)},
    "mamba2": {"head_dim": (3,), "state_dim": (2, 5), "chunk_size": (1, 4)},
    "delta_net": {"head_dim": (4,), "num_heads": (1, 2), "chunk_size": (4,)},
    "gated_delta_net": {"head_dim": (3,), "num_heads": (1, 2), "chunk_size": (5,)},
    "delta_product": {"head_dim": (4,), "num_heads": (1, 2), "rank": (1, 2), "chunk_size": (4,)},
    # the one-hot form has jumps, at which half types and float64 part
    "pd_ssm": {"num_channels": (1, 3), "dictionary_size": (1, 2), "chunk_size": (1, 4), "one_hot": (False,)},
    "attention": {"head_dim": (4,), "num_heads": (1, 2), "context": (2, 5)},
}


def mixer_spec(rng: random.Random) -> Arguments:
    name = rng.choice(list(MIXERS))
    spec = {"name": name} | {option: rng.choice(values) for option, values in SIZES[name].items()}
    if name in ("bd_lru", "h_lru"):
        # with none states grow; silu of large negative gates is zero in float32, and not in float64
        spec["normalization"] = rng.choice([key for key in NORMALIZATIONS if key not in ("none", "silu")])
    return spec


def mixer_call(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    dtype, width = rng.choice(DTYPES[:3]), 6
    with warnings.catch_warnings(action="ignore"):
        mixer = build_mixer(mixer_spec(rng), width).to(dtype)
    batch, length = rng.choice((1, 2, 3)), rng.choice((1, 2, 9, 40))
    one_step = rng.random() < 0.3
    x = torch.randn(batch, length, width, generator=generator).to(dtype)
    with torch.no_grad():
        _, state = mixer(x[:, :1])
    arguments: Arguments = {"x": x[:, 0] if one_step else x, "state": state if rng.random() < 0.5 else None}
    if not one_step:
        arguments["reset"] = torch.rand(batch, length, generator=generator) < 0.1 if rng.random() < 0.4 else None
    with_gradients = rng.random() < 0.5

    def call(**given: Any) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(with_gradients):
            return (mixer.step if one_step else mixer)(**given)

    def check(result: tuple[Tensor, Tensor]) -> bool:
        exact = copy.deepcopy(mixer).double()
        if hasattr(exact, "backend"):
            exact.backend = "reference"
        wanted = (exact.step if one_step else exact)(**{name: doubled(value) for name, value in arguments.items()})
        return all(is_near(*pair, dtype, ROUNDINGS) for pair in zip(result, wanted, strict=True))

    return call, arguments, check


def model_call(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    size, dtype = rng.choice((2, 11)), rng.choice(DTYPES[:2])
    model = SequenceModel(size, 8, rng.choice((1, 2)), mixer_spec(rng)).to(dtype)
    batch, length = rng.choice((1, 2, 3)), rng.choice((1, 2, 40))
    tokens = torch.randint(size, (batch, length), generator=generator)
    with torch.no_grad():
        _, state = model(tokens[:, :1])
    way = rng.choice(("forward", "step", "Decoder"))
    if rng.random() < 0.1:
        tokens = tokens.clone()
        tokens[0, -1] = rng.choice((size, -1, -100, 2**31, -(2**63), 2**63 - 1))
    arguments: Arguments = {"tokens": tokens if way == "forward" else tokens[:, -1]}
    if way != "Decoder":
        arguments["state"] = rng.choice((None, state, list(state), state[:-1], (*state, state[0]), state[0], 3))
    exact = copy.deepcopy(model).double()

    def call(**given: Any) -> Any:
        with torch.set_grad_enabled(rng.random() < 0.5):
            if way == "Decoder":
                return Decoder(model, state).step(**given), None
            return (model.step if way == "step" else model)(**given)

    def check(result: tuple[Tensor, Any]) -> bool:
        wide = {"tokens": arguments["tokens"], "state": arguments.get("state", state)}
        wide["state"] = None if wide["state"] is None else tuple(part.double() for part in wide["state"])
        wanted, _ = (exact if way == "forward" else exact.step)(**wide)
        return is_near(result[0], wanted, dtype, ROUNDINGS)

    return call, arguments, check


def generate_call(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    model = SequenceModel(11, 8, 1, {"name": "bd_lru", "num_blocks": 3, "block_size": 2})
    prompts = [torch.randint(11, (rng.choice((1, 3, 9)),), generator=generator).tolist() for _ in range(2)]
    arguments: Arguments = {
        "prompts": rng.choice((prompts, tuple(prompts), [torch.tensor(prompt) for prompt in prompts])),
        "max_new_tokens": rng.choice((1, 5)),
        "temperature": rng.choice((0, 0.0, 1.0, 1)),
        "top_k": rng.choice((None, 1, 20)),
        "top_p": rng.choice((None, 0.5, 1)),
        "seed": rng.choice((0, 3)),
        "stop": rng.choice(((), [3], {4, 5})),
    }

    def check(rows: list[list[int]]) -> bool:
        """Each greedy token is the likeliest, or as likely as it in float32."""
        if arguments["temperature"] != 0:
            return all(token in range(11) for row in rows for token in row)
        exact = copy.deepcopy(model).double()
        for prompt, row in zip(prompts, rows, strict=True):
            logits = exact(torch.tensor([prompt + row]))[0][0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(row)[:, None])[:, 0]
            if (logits.amax(1) - chosen).max() > 1e-4:
                return False
        return True

    return lambda **given: generate(model, **given), arguments, check


def normalize_call(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    raw = torch.randn(2, 3, 4, generator=generator).to(rng.choice(DTYPES))
    arguments: Arguments = {"raw_gates": raw, "normalization": rng.choice(list(NORMALIZATIONS)), "dim": -2}

    def check(weights: Tensor) -> bool:
        exact = normalize(**arguments, dtype=torch.float64)
        return is_near(weights, exact, arguments["raw_gates"].dtype, ROUNDINGS)

    return normalize, arguments, check


def config_call(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    kind = rng.choice((TrainConfig, ModelConfig, OptimizerConfig))
    options = {name: copy.deepcopy(value) for name, value in vars(kind()).items()}
    names = rng.sample(list(options), k=rng.randrange(4))

    def check(config: Any) -> bool:
        return kind is not TrainConfig or TrainConfig.from_json(config.to_json()) == config

    return kind, {name: options[name] for name in names}, check


def spec_call(rng: random.Random, generator: torch.Generator) -> tuple[Callable, Arguments, Check]:
    """A mixer or a task of a spec, or a model or a width."""
    way = rng.choice(("mixer", "task", "model", "solve"))
    if way == "mixer":
        arguments = mixer_spec(rng) | {"d_model": 6}
        return lambda d_model, **spec: build_mixer(spec, d_model), arguments, lambda mixer: True
    if way == "model":
        options = {"vocab_size": 5, "d_model": 4, "num_layers": 1, "mixer": mixer_spec(rng), "dropout": 0.0}
        options |= {"mlp_size": None, "init_std": None, "tied_embedding": False}
        return SequenceModel, options, lambda model: True
    if way == "solve":
        arguments = {"mixer": rng.choice(list(MIXERS)), "d_model": 8, "budget": 4000, "what": "parameters"}
        return solve, arguments, lambda solution: solution.off < 1
    name = rng.choice([name for name in TASKS if name not in ("text", "word-problem")])
    task = build_task({"name": name})
    arguments = {option: getattr(task, option) for option in task.__dataclass_fields__}
    arguments |= {"split": "train", "batch_size": 2, "seed": 0, "index": 0}

    def sample(split: str, batch_size: int, seed: int, index: int, **own: Any) -> Any:
        return build_task({"name": name} | own).sample(split, batch_size, seed=seed, index=index)

    return sample, arguments, lambda batch: bool(((batch.targets < 2**31) & (batch.tokens >= 0)).all())


KINDS = (scan, scan, scan, mixer_call, mixer_call, model_call, generate_call, normalize_call, config_call, spec_call)


def make_calls(place: Path) -> None:
    """Nothing is needed but a limit of memory, which the processes inherit."""


def call(prepared: None, rng: random.Random, place: Path) -> End:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    torch.manual_seed(rng.randrange(2**32))
    kind = rng.choice(KINDS)
    function, arguments, check = kind(rng, generator)
    spoil = set(rng.sample(list(arguments), k=min(len(arguments), rng.choice((0, 1, 1, 2)))))
    what = [kind.__name__]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            said, arguments[name] = any_tensor(value, rng, name in spoil)
        elif name in spoil:
            endless = name in ("max_new_tokens", "num_layers")  # as many as are asked for
            arguments[name] = rng.choice([junk for junk in JUNK if not (endless and junk in (2**31, 2**63, 2**64))])
            said = repr(arguments[name])
        else:
            said = value if isinstance(value, str) else ""
        what += [f"{name}={said}"] if said else []
    told = " ".join(what)
    before = {name: snapshot_of(value) for name, value in arguments.items()}
    try:
        with warnings.catch_warnings(action="ignore"):
            result = function(**arguments)
    except Exception as error:
        if isinstance(error, MemoryError):
            return End("refused", f"{told}: {error!r}")
        return judge(told, error, re.findall(r"`[\w.]+(?:\[\d+\])?`|backend '", str(error)))
    if any(not same(snapshot_of(value), before[name]) for name, value in arguments.items()):
        return End("silently different", f"{told}: an argument was changed")
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if any(math.prod(tensor.shape) > 10**8 for tensor in tensors):
        return End("as before", f"{told}: not compared")  # the float64 loop would need too much memory
    with warnings.catch_warnings(action="ignore"):
        right = check(result)
    return End("as before" if right else "silently different", told)


def snapshot_of(value: Any) -> Any:
    """What a value is now."""
    if isinstance(value, Tensor):
        small = value.layout == torch.strided and math.prod(value.shape) < 10**6
        return value.detach().clone() if small else None
    return json.dumps(value, default=repr)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return np.array_equal(a.float().numpy(), b.float().numpy(), equal_nan=True)
    return a == b


CALLS = Attack("calls", 20_000, make_calls, call)
