"""The baselines against loops over time written from their equations, and against published code if installed."""

import importlib.util
import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, assert_close, relative_error
from mixer_helpers import D, build, normal, random_reset, start
from torch import Tensor

from statemix.mixers import LRU, MLSTM, PDSSM, Attention, DeltaNet, DeltaProduct, GatedDeltaNet, Mamba2, Mixer
from statemix.mixers.chunks import delta_scan

Arrays = dict[str, np.ndarray]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def weights_of(mixer: Mixer) -> Arrays:
    return {name: tensor.detach().double().numpy() for name, tensor in mixer.named_parameters()}


def run(oracle, mixer: Mixer, x: Tensor, state, reset, **options) -> tuple[Tensor, Tensor]:
    """y and the final state, one sequence at a time: oracle(weights, x (T, D), state (M, N), reset (T,), **options)."""
    if state is None:
        state = torch.zeros(x.shape[0], *mixer.state_shape)
    if reset is None:
        reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    rows = zip(x.double().numpy(), state.double().numpy().copy(), reset.numpy(), strict=True)  # it is written to
    pairs = [oracle(weights_of(mixer), *row, **options) for row in rows]
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))


def convolved(weights: Arrays, inputs: np.ndarray, recent: np.ndarray, reset: np.ndarray):
    """silu of the short convolution of inputs (T, C), and the last K - 1 inputs; silu alone if there are no weights."""
    if "convolution.weight" not in weights:
        return silu(inputs), recent
    taps, out = weights["convolution.weight"], []
    for now, clear in zip(inputs, reset, strict=True):
        recent = np.concatenate([0 * recent if clear else recent, now[None]])
        y = weights.get("convolution.bias", 0)
        for lag, tap in enumerate(taps):
            y = y + tap * recent[len(recent) - 1 - lag]
        out.append(silu(y))
        recent = recent[1:]
    return np.stack(out), recent


def lru(weights: Arrays, x, state, reset):
    h = state[0] + 1j * state[1]
    eigenvalues = np.exp(-np.exp(weights["log_nu"]) + 1j * np.exp(weights["log_theta"]))
    b, c = weights["values.weight"], weights["output.weight"]
    n = len(h)
    b, c = b[:n] + 1j * b[n:], c[:, :n] - 1j * c[:, n:]
    ys = []
    for x_t, clear in zip(x, reset, strict=True):
        h = eigenvalues * (0 if clear else h) + np.exp(weights["log_gamma"]) * (b @ x_t)
        ys.append((c @ h).real + weights["skip"] * x_t)
    return np.stack(ys), np.stack([h.real, h.imag])


def mlstm(weights: Arrays, x, state, reset, heads, width, taps):
    """Without the scale m: its exponential is put back into the state, and taken out at the end."""
    inner = heads * width
    memory, scale, recent = np.split(state[0], np.cumsum([inner * (width + 1), heads]))
    memory, recent = memory.reshape(heads, width, width + 1), recent.reshape(taps - 1, inner)
    memory = memory * np.exp(scale)[:, None, None]
    u, z = np.split(x @ weights["inputs.weight"].T, 2, axis=1)
    c, recent = convolved(weights, u, recent, reset)
    ys = []
    for t in range(len(x)):
        blocks = np.stack([a.reshape(-1, 4) for a in (c[t], c[t], u[t])])
        q, k, v = np.einsum("sni,snoi->sno", blocks, weights["blocks"]).reshape(3, inner)
        raw = weights["gates.weight"] @ np.concatenate([q, k, v]) + weights["gates.bias"]
        write, forget = np.exp(raw[:heads]), sigmoid(raw[heads:])
        if reset[t]:
            memory, scale = np.zeros_like(memory), np.zeros_like(scale)
        scale = np.maximum(scale + np.log(forget), raw[:heads])
        h = np.zeros((heads, width))
        for n, (query, key, value) in enumerate(zip(*(part.reshape(heads, width) for part in (q, k, v)), strict=True)):
            written = np.outer(key / np.sqrt(width), np.append(value, 1))
            memory[n] = forget[n] * memory[n] + write[n] * written
            *read, normaliser = query @ memory[n]
            h[n] = np.array(read) / (max(abs(normaliser), 1) + 1e-6 * np.exp(scale[n]))
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
        y = (h.ravel() * weights["norm_weight"] + weights["skip"] * c[t]) * silu(z[t])
        ys.append(weights["output.weight"] @ y)
    memory = memory / np.exp(scale)[:, None, None]
    return np.stack(ys), np.concatenate([memory.ravel(), scale, recent.ravel()])[None]


def mamba2(weights: Arrays, x, state, reset, heads, width, rows, groups, taps):
    inner, shared = heads * width, groups * rows
    memory, recent = np.split(state[0], [heads * rows * width])
    memory, recent = memory.reshape(heads, rows, width), recent.reshape(taps - 1, inner + 2 * shared)
    gate, mixed, raw = np.split(x @ weights["inputs.weight"].T, [inner, 2 * inner + 2 * shared], axis=1)
    mixed, recent = convolved(weights, mixed, recent, reset)
    ys = []
    for t in range(len(x)):
        values, b, c = np.split(mixed[t], [inner, inner + shared])
        y = np.zeros((heads, width))
        for h in range(heads):
            group = h // (heads // groups)
            keys, queries = (part.reshape(groups, rows)[group] for part in (b, c))
            value = values.reshape(heads, width)[h]
            step = np.logaddexp(0, raw[t, h] + weights["decay.bias"][h])
            decay = 0 if reset[t] else np.exp(-np.exp(weights["decay.rate"][h]) * step)
            memory[h] = decay * memory[h] + step * np.outer(keys, value)
            y[h] = queries @ memory[h] + weights["skip"][h] * value
        y = (y.ravel() * silu(gate[t])).reshape(groups, -1)
        y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5)
        ys.append(weights["output.weight"] @ (y.ravel() * weights["norm_weight"]))
    return np.stack(ys), np.concatenate([memory.ravel(), recent.ravel()])[None]


def delta(weights: Arrays, x, state, reset, heads, width, columns, rank, top):
    sizes = [heads * width, heads * rank * width, heads * rank * columns]
    memory, recent = np.split(state[0], [heads * width * columns])
    memory, recent = memory.reshape(heads, width, columns), recent.reshape(-1, sum(sizes))
    mixed, recent = convolved(weights, x @ weights["inputs.weight"].T, recent, reset)
    ys = []
    for t in range(len(x)):
        q, k, v = np.split(mixed[t], np.cumsum(sizes)[:2])
        q, k, v = q.reshape(heads, width), k.reshape(heads, rank, width), v.reshape(heads, rank, columns)
        beta = top * sigmoid(weights["beta.weight"] @ x[t]).reshape(heads, rank)
        y = np.zeros((heads, columns))
        for h in range(heads):
            s = memory[h]
            if "decay.rate" in weights:
                step = np.logaddexp(0, weights["raw_steps.weight"][h] @ x[t] + weights["decay.bias"][h])
                s = np.exp(-np.exp(weights["decay.rate"][h]) * step) * s
            if reset[t]:
                s = np.zeros_like(s)
            for r in range(rank):
                key = k[h, r] / np.sqrt((k[h, r] ** 2).sum() + 1e-6)
                s = (np.eye(width) - beta[h, r] * np.outer(key, key)) @ s + beta[h, r] * np.outer(key, v[h, r])
            memory[h] = s
            y[h] = q[h] / np.sqrt((q[h] ** 2).sum() + 1e-6) / np.sqrt(width) @ s
        y = (y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5) * weights["norm_weight"]).ravel()
        if "gate.weight" in weights:
            y = y * silu(weights["gate.weight"] @ x[t])
        ys.append(weights["output.weight"] @ y)
    return np.stack(ys), np.concatenate([memory.ravel(), recent.ravel()])[None]


def pd_ssm(weights: Arrays, x, state, reset, one_hot):
    """Component by component: where the column of each is largest it is added, or everywhere by its softmax."""
    h = state[0] + 1j * state[1]
    n = len(h)

    def network(name, row):
        inner = weights[f"{name}.0.weight"] @ row + weights[f"{name}.0.bias"]
        inner = inner * (1 + np.array([math.erf(z / math.sqrt(2)) for z in inner])) / 2
        return sigmoid(weights[f"{name}.2.weight"] @ inner + weights[f"{name}.2.bias"])

    b = weights["values.weight"][:n] + 1j * weights["values.weight"][n:]
    ys = []
    for x_t, clear in zip(x, reset, strict=True):
        chosen = np.exp(weights["selector.weight"] @ x_t)
        matrix = sum(w * each for w, each in zip(chosen / chosen.sum(), weights["dictionary"], strict=True))
        turned = network("magnitude", x_t) * np.exp(2j * np.pi * network("phase", x_t)) * (0 if clear else h)
        h = b @ x_t
        for j in range(n):
            if one_hot:
                h[matrix[:, j].argmax()] += turned[j]
            else:
                h += np.exp(matrix[:, j]) / np.exp(matrix[:, j]).sum() * turned[j]
        ys.append(weights["output.weight"] @ np.concatenate([h.real, h.imag]) + weights["skip"] * x_t)
    return np.stack(ys), np.stack([h.real, h.imag])


def attention(weights: Arrays, x, state, reset, heads, window):
    """The window as a list; a rotated pair of numbers is a complex one, turned by its age."""
    width = weights["output.weight"].shape[1] // heads
    q, k, v = np.split(x @ weights["inputs.weight"].T, 3, axis=1)
    slots = [np.split(row[:-1], 2) if row[-1] > 0.5 else None for row in state]
    rates = 10_000.0 ** (-2 * np.arange(width // 2) / width)

    def paired(vector):
        halves = vector.reshape(heads, 2, width // 2)
        return halves[:, 0] + 1j * halves[:, 1]

    ys = []
    for t in range(len(x)):
        slots = [None] * window if reset[t] else slots
        slots = [*slots, (k[t], v[t])][-window:]
        y = np.zeros((heads, width))
        for h in range(heads):
            scores, values = [], []
            for age, slot in enumerate(reversed(slots)):
                if slot is not None:
                    turned = paired(slot[0])[h] * np.exp(-1j * rates * age)
                    scores.append((np.conj(paired(q[t])[h]) * turned).real.sum() / np.sqrt(width))
                    values.append(slot[1].reshape(heads, width)[h])
            y[h] = np.exp(scores) @ np.stack(values) / np.exp(scores).sum()
        ys.append(weights["output.weight"] @ y.ravel())
    rows = [np.zeros(state.shape[1]) if slot is None else np.concatenate([*slot, [1]]) for slot in slots]
    return np.stack(ys), np.stack(rows)


ORACLES = {  # name in SPECS of test_mixers: loop, its options
    "lru": (lru, {}),
    "mlstm": (mlstm, {"heads": 2, "width": 6, "taps": 4}),
    "mamba2": (mamba2, {"heads": 4, "width": 3, "rows": 5, "groups": 1, "taps": 4}),
    "mamba2 groups": (mamba2, {"heads": 6, "width": 5, "rows": 3, "groups": 3, "taps": 1}),
    "delta_net": (delta, {"heads": 2, "width": 8, "columns": 8, "rank": 1, "top": 1}),
    "gated_delta_net": (delta, {"heads": 2, "width": 3, "columns": 6, "rank": 1, "top": 1}),
    "delta_product": (delta, {"heads": 2, "width": 8, "columns": 8, "rank": 3, "top": 2}),
    "delta_product gated": (delta, {"heads": 1, "width": 8, "columns": 8, "rank": 2, "top": 2}),
    "pd_ssm": (pd_ssm, {"one_hot": True}),
    "pd_ssm soft": (pd_ssm, {"one_hot": False}),
    "attention": (attention, {"heads": 2, "window": 5}),
    "attention W=2": (attention, {"heads": 3, "window": 2}),
    "attention W=30": (attention, {"heads": 3, "window": 30}),
}
# one step, less than a chunk or window, and several that do not divide the length; the last have those of 64 and 30
CASES = [
    *itertools.product(ORACLES, (1, 3, 14)),
    *itertools.product(("mamba2 groups", "delta_product gated", "attention W=30"), (70,)),
]


@pytest.mark.parametrize(("name", "length"), CASES)
def test_a_mixer_computes_its_equation(generator, name, length):
    oracle, options = ORACLES[name]
    mixer, x = build(name, generator), normal(generator, 3, length, D)
    state = start(mixer, generator)
    if isinstance(mixer, Attention):
        state = state.masked_fill(state[..., -1:] == 0, 0)
    for given, reset in itertools.product((None, state), (None, random_reset(generator, 3, length))):
        expected = run(oracle, mixer, x, given, reset, **options)
        for actual, wanted, what in zip(mixer(x, given, reset), expected, ("y", "state"), strict=True):
            assert_close(actual, wanted, f"{what}, state {given is not None}, reset {reset is not None}")


@pytest.mark.parametrize("name", ORACLES)
def test_an_oracle_notices_a_reset_one_step_late(generator, name):
    oracle, options = ORACLES[name]
    mixer, x, reset = build(name, generator), normal(generator, 2, 9, D), torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    y = mixer(x, None, reset)[0]
    assert relative_error(y, run(oracle, mixer, x, None, reset.roll(1, dims=1), **options)[0]) > 1e-4


CONSTRUCTED = [(Mamba2, (8,)), (DeltaNet, (16,)), (GatedDeltaNet, (8,)), (DeltaProduct, (16,))]
CONSTRUCTED += [(LRU, (16,)), (PDSSM, (16,)), (Attention, (8, 40))]


@pytest.mark.parametrize(("cls", "sizes"), CONSTRUCTED)
def test_as_constructed_single_precision_keeps_to_double(generator, cls, sizes):
    """Over 300 steps from the first weights, with the chunks of the default: no decay or key makes it drift."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = cls(16, *sizes)
    x = normal(generator, 2, 300, 16, dtype=torch.float32)
    single, double = mixer(x), mixer.double()(x.double())
    assert_close(single[0], double[0], "y")
    assert_close(single[1], double[1], "state")


RANK_1 = [  # a mixer, its options, and those of the same as a delta_product
    (DeltaNet, {}, {"negative_eigenvalues": False}),
    (DeltaNet, {"negative_eigenvalues": True}, {}),
    (DeltaNet, {"conv_size": 0, "chunk_size": 5, "num_heads": 1}, {"negative_eigenvalues": False}),
    (GatedDeltaNet, {}, {"negative_eigenvalues": False, "gated": True, "expand_values": 2}),
]


@pytest.mark.parametrize(("cls", "options", "others"), RANK_1)
def test_delta_product_of_rank_1_is_a_delta_net(generator, cls, options, others):
    x, reset = normal(generator, 2, 23, D), random_reset(generator, 2, 23)
    net = cls(D, 3, **options).double()
    product = DeltaProduct(D, 3, rank=1, **options | others).double()
    product.load_state_dict(net.state_dict())
    for ours, theirs in zip(product(x, None, reset), net(x, None, reset), strict=True):
        assert torch.equal(ours, theirs)


def test_the_gradient_of_pd_ssm_is_that_of_the_columns_softmax(generator):
    """The states are those of one-hot columns; what a softmax in their place would change is what it learns from."""
    mixer, x = build("pd_ssm", generator), normal(generator, 3, 9, D)
    state = start(mixer, generator)
    soft = torch.softmax(torch.einsum("btk,kij->btij", mixer.selector(x).softmax(-1), mixer.dictionary), dim=2)
    hard = torch.nn.functional.one_hot(soft.argmax(2), 5).mT.double()
    columns = soft + (hard - soft).detach()
    magnitude, phase = (torch.sigmoid(part(x)) for part in (mixer.magnitude, mixer.phase))
    transition = columns * torch.polar(magnitude, 2 * math.pi * phase)[:, :, None]
    h, ys = torch.complex(state[:, 0], state[:, 1]), []
    for t in range(x.shape[1]):
        values = mixer.values(x[:, t])
        h = (transition[:, t] @ h[..., None])[..., 0] + torch.complex(values[:, :5], values[:, 5:])
        ys.append(mixer.output(torch.cat([h.real, h.imag], dim=1)) + mixer.skip * x[:, t])
    weights, wanted = list(mixer.parameters()), torch.stack(ys, dim=1)
    y = mixer(x, state)[0]
    assert_close(y, wanted)
    seed = normal(generator, *y.shape)
    pairs = zip(*(torch.autograd.grad((out * seed).sum(), weights) for out in (y, wanted)), strict=True)
    for (name, _), (actual, expected) in zip(mixer.named_parameters(), pairs, strict=True):
        assert_close(actual, expected, name)
        assert (expected != 0).any(), name


def test_pd_ssm_follows_an_automaton_that_no_permutation_does(generator):
    """Token 0 takes every state to the second, token 1 turns three of them: an exact one-hot vector of the state."""
    mixer = PDSSM(2, 3, dictionary_size=2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.selector.weight.copy_(100 * torch.eye(2))
        mixer.magnitude[-1].bias.fill_(30)  # |d| = 1 in float32
        mixer.phase[-1].bias.fill_(-200)
        mixer.dictionary[0, 1] = 1
        mixer.dictionary[1].copy_(torch.eye(3).roll(1, dims=0))
    state, place = torch.eye(3)[:1, None] * torch.tensor([1.0, 0.0])[:, None], 0
    for token in torch.randint(2, (200,), generator=generator).tolist():
        _, state = mixer.step(torch.eye(2)[token : token + 1], state)
        place = 1 if token == 0 else (place + 1) % 3
        assert state[0].tolist() == [torch.eye(3)[place].tolist(), [0.0] * 3]


@pytest.mark.parametrize(("name", "cls"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_lstm_and_gru_are_those_of_torch(generator, name, cls):
    mixer = build(name, generator)
    x, state = normal(generator, 3, 9, D), start(mixer, generator)
    alone = cls(D, 7, batch_first=True, dtype=torch.float64)
    alone.load_state_dict(getattr(mixer, name).state_dict())
    h, *c = (part[None].contiguous() for part in state.unbind(1))  # a GRU has no c
    for given, theirs in ((None, None), (state, (h, *c) if c else h)):
        hidden, last = alone(x, theirs)
        y, final = mixer(x, given)
        assert torch.equal(y, hidden @ mixer.output.weight.T)
        assert torch.equal(final, torch.cat(last if c else [last]).transpose(0, 1))


# ---- published code, where it is installed

published = pytest.mark.filterwarnings("default")  # their warnings are theirs


@published
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_the_one_of_transformers(generator, groups):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "expand": 2, "n_groups": groups}
    config = Mamba2Config(**sizes, conv_kernel=4, chunk_size=16, num_hidden_layers=1)
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    ours = Mamba2(32, 8, num_heads=8, state_dim=16, num_groups=groups)
    with torch.no_grad():
        ours.inputs.weight.copy_(theirs.in_proj.weight)
        ours.convolution.weight.copy_(theirs.conv1d.weight[:, 0].flip(1).T)
        ours.convolution.bias.copy_(theirs.conv1d.bias)
        ours.decay.rate.copy_(theirs.A_log)
        ours.decay.bias.copy_(theirs.dt_bias)
        ours.skip.copy_(theirs.D)
        ours.norm_weight.copy_(theirs.norm.weight)
        ours.output.weight.copy_(theirs.out_proj.weight)
        x = normal(generator, 2, 50, 32, dtype=torch.float32)
        expected = theirs(x)
    assert relative_error(ours(x)[0], (expected[0] if isinstance(expected, tuple) else expected).double()) < 1e-5


@published
def test_mlstm_is_the_one_of_xlstm(generator):
    pytest.importorskip("xlstm", reason="xlstm is not installed")
    from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

    theirs = mLSTMLayer(mLSTMLayerConfig(embedding_dim=32, context_length=50, num_heads=4, proj_factor=2.0))
    ours = MLSTM(32, 16)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(normal(generator, *parameter.shape) / 4)
        cell = theirs.mlstm_cell
        ours.inputs.weight.copy_(theirs.proj_up.weight)
        ours.convolution.weight.copy_(theirs.conv1d.conv.weight[:, 0].flip(1).T)
        ours.convolution.bias.copy_(theirs.conv1d.conv.bias)
        ours.blocks.copy_(torch.stack([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.gates.weight.copy_(torch.cat([cell.igate.weight, cell.fgate.weight]))
        ours.gates.bias.copy_(torch.cat([cell.igate.bias, cell.fgate.bias]))
        ours.norm_weight.copy_(1 + cell.outnorm.weight)
        ours.skip.copy_(theirs.learnable_skip)
        ours.output.weight.copy_(theirs.proj_down.weight)
        x = normal(generator, 2, 50, 32, dtype=torch.float32)
        assert relative_error(ours(x)[0], theirs(x).double()) < 1e-5


@published
@pytest.mark.parametrize(("rank", "gated"), [(1, False), (1, True), (3, False), (2, True)])
def test_delta_scan_is_the_one_of_flash_linear_attention(generator, rank, gated):
    pytest.importorskip("einops", reason="einops is not installed")
    if (package := importlib.util.find_spec("fla")) is None:
        pytest.skip("flash-linear-attention is not installed")
    name = "gated_delta_rule" if rank == 1 else "gated_delta_product"
    # the file alone: to import the package takes triton
    file = Path(package.submodule_search_locations[0]) / "ops" / name / "naive.py"
    theirs = runpy.run_path(str(file))[f"naive_recurrent_{name}"]
    q, k, v = (normal(generator, 2, 23, *shape) for shape in ((3, 4), (3, rank, 4), (3, rank, 5)))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, state = 2 * torch.sigmoid(normal(generator, 2, 23, 3, rank)), normal(generator, 2, 3, 4, 5)
    logarithms = -normal(generator, 2, 23, 3).exp() if gated else torch.zeros(2, 23, 3, dtype=torch.float64)
    y, final = delta_scan(q * 4**-0.5, k, v, beta, logarithms, state, 8)
    k, v, beta = (part.transpose(2, 3).flatten(1, 2) for part in (k, v, beta))  # (B, T R, H, ...)
    options = {"g": logarithms, "beta": beta, "scale": 4**-0.5} | ({} if rank == 1 else {"num_householder": rank})
    expected = theirs(q, k, v, initial_state=state.float(), output_final_state=True, **options)
    assert relative_error(y, expected[0].double()) < TOLERANCE[torch.float32]  # theirs is in float32
    assert relative_error(final, expected[1].double()) < TOLERANCE[torch.float32]
