"""SequenceModel: one function however it is called, causality, sizes, saving and loading without pickle, bad input."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from model_helpers import CLOSE, MIXERS, D, T, V, assert_same, build, draw, each_mixer
from safetensors.torch import load_file

import statemix
from statemix import SequenceModel
from statemix.backbone import Dropout
from statemix.mixers.base import onlooker

SHAPES = {"bd_lru": (3, 5), "bd_lru fixed": (3, 5), "h_lru": (3, 5), "observer": (3, 5), "lstm": (2, 7)}


# ---- one function


@each_mixer
def test_shapes(generator, mixer):
    model = build(generator, mixer)
    for batch, length in ((1, 1), (2, 1), (1, 5), (3, 4)):
        logits, state = model(draw(generator, batch, length))
        assert logits.shape == (batch, length, V)
        assert type(state) is tuple
        assert [tuple(s.shape) for s in state] == [(batch, *SHAPES[mixer])] * 3
    assert model.state_size == sum(s[0].numel() for s in state)


@each_mixer
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_call_equals_step_repeated(generator, mixer, dtype, grad, with_reset):
    model = build(generator, mixer, dtype=dtype)
    tokens, reset = draw(generator, 3, 3 * T), torch.rand(3, 3 * T, generator=generator) < 0.2
    _, state = model(draw(generator, 3, 4))  # a state to go on from
    logits, final = model(tokens, state, reset if with_reset else None)
    with torch.set_grad_enabled(grad):
        for t in range(3 * T):
            logits_t, state = model.step(tokens[:, t], state, reset[:, t] if with_reset else None)
            assert_same(logits_t, logits[:, t], f"logits at {t}")
        assert_same(state, final, "state")
        assert_same(model.step(tokens[:, 0])[0], model(tokens[:, :1])[0][:, 0], "from no state")


@each_mixer
@pytest.mark.parametrize("with_reset", [False, True])
def test_split_equals_the_whole(generator, mixer, with_reset):
    model, tokens = build(generator, mixer), draw(generator, 3, T)
    reset = torch.rand(3, T, generator=generator) < 0.3
    reset[0, 4] = True
    logits, final = model(tokens, reset=reset if with_reset else None)
    for cut in range(1, T):
        pieces, state = [], None
        for part in (slice(cut), slice(cut, None)):
            piece, state = model(tokens[:, part], state, reset[:, part] if with_reset else None)
            pieces.append(piece)
        assert_same((torch.cat(pieces, dim=1), *state), (logits, *final), f"cut at {cut}")


@each_mixer
def test_packed_sequences_equal_separate_ones(generator, mixer):
    """And not if any layer were deaf to the reset."""
    model, a, b = build(generator, mixer), draw(generator, 1, 5), draw(generator, 1, 7)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, [0, 5]] = True
    _, left_over = model(draw(generator, 1, 3))
    packed, state = model(torch.cat([a, b], dim=1), left_over, reset)
    assert_same(packed, torch.cat([model(a)[0], model(b)[0]], dim=1))
    assert_same(state, model(b)[1])
    for i, layer in enumerate(model.layers):
        deaf = layer.register_forward_pre_hook(lambda _, arguments: (*arguments[:2], None))
        with pytest.raises(AssertionError, match=rf"\[{i}\]: relative error"):
            assert_same(model(torch.cat([a, b], dim=1), left_over, reset)[1], model(b)[1])
        deaf.remove()


@each_mixer
@pytest.mark.parametrize("dtype", CLOSE)
def test_a_later_token_changes_no_earlier_bit(generator, mixer, dtype):
    model, tokens = build(generator, mixer, dtype=dtype), draw(generator, 2, T)
    logits, _ = model(tokens)
    for t in range(T):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        other, _ = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert (other[:, t:] != logits[:, t:]).any(dim=2).all()  # while it changes every later one


@each_mixer
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_gets_a_gradient(generator, mixer, tied):
    model = build(generator, mixer, tied_embedding=tied)
    model(draw(generator, 4, 2 * T))[0].logsumexp(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


# ---- a first layer's gates as a table


def gradients(model: SequenceModel, tokens, **options) -> list[torch.Tensor]:
    """Of all logits and states, weighted at random; the state and logits themselves come first."""
    model.zero_grad()
    logits, state = model(tokens, **options)
    weights = torch.Generator().manual_seed(1)
    results = [logits, *state]
    sum((r * torch.randn(r.shape, generator=weights).to(r)).sum() for r in results).backward()
    return [r.detach() for r in results] + [p.grad.clone() for p in model.parameters()]


def by_position(model: SequenceModel, tokens, monkeypatch, **options) -> list[torch.Tensor]:
    """As `gradients`, of a model that makes no table."""
    with monkeypatch.context() as patch:
        patch.setattr("statemix.model.POSITIONS_PER_TOKEN", 10**9)
        return gradients(model, tokens, **options)


@each_mixer
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", CLOSE)
def test_a_table_of_gates_changes_nothing(generator, mixer, layers, dtype, monkeypatch):
    model = build(generator, mixer, dtype=dtype, num_layers=layers)
    tokens = draw(generator, 5, 20)
    reset = torch.rand(5, 20, generator=generator) < 0.2
    assert (model._rows(tokens) is not None) == (mixer not in ("lstm", "bd_lru fixed"))
    found, wanted = gradients(model, tokens, reset=reset), by_position(model, tokens, monkeypatch, reset=reset)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a - b).abs().max() <= 5 * CLOSE[dtype] * b.abs().max(), i


def test_a_token_that_never_comes_has_no_part_in_a_table(generator):
    """Its row may be anything, also what would make a NaN of a gradient that is zero."""
    model = build(generator, num_layers=1)
    tokens = draw(generator, 5, 20).clamp(max=V - 2)
    wanted = gradients(model, tokens)
    with torch.no_grad():
        model.embedding.weight[V - 1] = torch.nan
    assert model._rows(tokens) is not None
    assert all(map(torch.equal, gradients(model, tokens), wanted))


def hook_that_halves(module, register: str):
    """A hook that halves what a module reads, or what it returns."""
    if register == "register_forward_pre_hook":
        return module.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2, *inputs[1:]))
    return module.register_forward_hook(
        lambda _, inputs, out: (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2
    )


BETWEEN = ["embedding", "layers.0", "layers.0.mixer_norm", "layers.0.mixer"]
BETWEEN += ["layers.0.mixer.raw_gates", "layers.0.mixer.values"]


@pytest.mark.parametrize("path", BETWEEN)
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_what_comes_between_tokens_and_gates_is_obeyed(generator, path, register, monkeypatch):
    model, tokens = build(generator), draw(generator, 5, 20)
    if (path, register) == ("embedding", "register_forward_pre_hook"):
        model.embedding.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(1),))
    else:
        hook_that_halves(model.get_submodule(path), register)
    assert model._rows(tokens) is None
    undisturbed = build(torch.Generator().manual_seed(0))
    undisturbed.load_state_dict(model.state_dict())
    found, wanted = gradients(model, tokens), by_position(model, tokens, monkeypatch)
    assert all(map(torch.equal, found, wanted))
    assert not torch.equal(found[0], gradients(undisturbed, tokens)[0])


def test_a_hook_that_only_looks_on_is_called(generator):
    model, tokens, seen = build(generator), draw(generator, 5, 20), []
    model.layers[0].mixer.register_forward_pre_hook(onlooker(lambda _, inputs: seen.append(inputs)))
    assert model._rows(tokens) is not None
    model(tokens)
    [(x, _, _, rows)] = seen
    assert torch.allclose(rows.table[rows.places], x, rtol=1e-12)


class Doubled(SequenceModel):
    def _embedded(self, tokens):
        return 2 * super()._embedded(tokens)


def no_table(model: SequenceModel, tokens) -> bool:
    return model._rows(tokens) is None


def test_where_a_table_does_not_serve(generator, monkeypatch):
    model, tokens = build(generator), draw(generator, 5, 20)
    assert no_table(model, torch.zeros(1, 31, dtype=torch.int64))  # a step, too
    assert not no_table(model, torch.zeros(1, 32, dtype=torch.int64))
    with torch.no_grad():
        assert not no_table(model, tokens)
    assert no_table(model, torch.arange(V)[None].repeat(1, 3))  # fewer positions than four a token
    assert not no_table(model, torch.arange(V)[None].repeat(1, 4))
    assert no_table(build(generator).bfloat16(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert no_table(model, tokens)
    double = Doubled(**build(generator).config)
    assert no_table(double, tokens)
    model.recompute = True
    assert no_table(model, tokens)


def test_where_the_kernels_read_no_table_it_is_as_long_as_the_sequence(generator, monkeypatch):
    model, tokens = build(generator), draw(generator, 5, 20)
    mixer = model.layers[0].mixer
    mixer.backend = "reference"
    with torch.no_grad():
        assert no_table(model, tokens)  # one operator is faster
    for mixer.recompute in (True, None):
        assert no_table(model, tokens) == (mixer.recompute is True)
    monkeypatch.setattr("statemix.kernels.KEPT_BYTES", 1000)
    assert no_table(model, tokens)
    mixer.recompute = False
    assert not no_table(model, tokens)
    for mixer.backend, mixer.recompute in (("auto", True), ("auto", None)):
        assert not no_table(model, tokens)


# ---- logits at some steps alone


@each_mixer
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_where_they_are_wanted(generator, mixer, layers, recompute):
    model = build(generator, mixer, num_layers=layers)
    model.recompute = recompute
    tokens, before = draw(generator, 5, 20), model(draw(generator, 5, 2))[1]
    reset = torch.rand(5, 20, generator=generator) < 0.2
    for share in (0.0, 0.3, 1.0):
        where = torch.rand(5, 20, generator=generator) < share
        model.zero_grad()
        logits, state = model(tokens, before, reset, where)
        (logits**2).sum().backward(retain_graph=True)
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        wanted, wanted_state = model(tokens, before, reset)
        (wanted[where] ** 2).sum().backward(retain_graph=True)
        assert logits.shape == (int(where.sum()), V)
        assert_same(state, wanted_state)
        if share > 0:
            assert_same(logits, wanted[where])
            scale = max(p.grad.abs().max() for p in model.parameters())
            for a, p in zip(found, model.parameters(), strict=True):
                assert (a - p.grad).abs().max() <= 1e-13 * scale


def test_logits_of_one_step_where_they_are_wanted(generator):
    model, tokens = build(generator), draw(generator, 3, 1)
    with torch.no_grad():
        where = torch.tensor([[True], [False], [True]])
        assert_same(model(tokens, where=where)[0], model(tokens)[0][[0, 2], 0])


BAD_WHERE = [
    (torch.ones(2, 5), TypeError, "SequenceModel: `where` must be a bool tensor, got torch.float32."),
    (torch.ones(2, 4, dtype=torch.bool), ValueError, "SequenceModel: `where` must have shape (B, T) = (2, 5), got "),
    ([[True]], TypeError, "SequenceModel: `where` must be a tensor, got list."),
]


@pytest.mark.parametrize(("where", "error", "text"), BAD_WHERE, ids=lambda v: str(v)[-20:])
def test_a_bad_where(generator, where, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        build(generator)(draw(generator, 2, 5), where=where)


@pytest.mark.parametrize(("d_model", "mlp_size"), [(128, 352), (768, 2048), (64, 192), (12, 32), (1, 32), (96, 256)])
def test_the_mlp_has_8_thirds_of_the_width_in_steps_of_32(d_model, mlp_size):
    with torch.device("meta"):
        model = SequenceModel(V, d_model, 1, MIXERS["bd_lru"])
    assert model.config["mlp_size"] == mlp_size
    assert model.layers[0].mlp.output.weight.shape == (d_model, mlp_size)


PAPER = [  # mixer, parameters but for embedding and head
    ({"name": "bd_lru", "block_size": 1, "num_blocks": 2112}, 134_549_760),
    ({"name": "bd_lru", "block_size": 2, "num_blocks": 844}, 134_486_112),
    ({"name": "bd_lru", "block_size": 4, "num_blocks": 302}, 134_645_280),
    ({"name": "bd_lru", "block_size": 8, "num_blocks": 96}, 134_582_016),
    ({"name": "bd_lru", "block_size": 16, "num_blocks": 28}, 135_180_288),
    ({"name": "h_lru", "order": 16, "num_channels": 242}, 132_520_920),
]


@pytest.mark.parametrize(("mixer", "parameters"), PAPER)
def test_language_models_of_the_paper_have_its_parameter_counts(mixer, parameters):
    vocab = 50_280 * 768
    for tied in (False, True):
        with torch.device("meta"):
            model = SequenceModel(50_280, 768, 12, mixer, mlp_size=2048, tied_embedding=tied)
        outside = {"embedding.weight", "head.weight"}
        assert sum(p.numel() for name, p in model.named_parameters() if name not in outside) == parameters
        assert model.num_parameters() == parameters + (vocab if tied else 2 * vocab)
        assert model.state_size == 12 * mixer.get("block_size", 16) * mixer.get("num_blocks", 242)


def test_a_tied_head_is_the_embedding(generator):
    tied, untied = build(generator, tied_embedding=True), build(generator)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == V * D
    for twin in (copy.deepcopy(tied), tied.float()):
        assert twin.head.weight is twin.embedding.weight


# ---- save and load


@each_mixer
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", CLOSE)
def test_what_was_saved_is_loaded(generator, tmp_path, mixer, tied, dtype):
    options = {"dtype": dtype, "tied_embedding": tied}
    model, tokens = build(generator, mixer, **options), draw(generator, 2, T)
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert ("head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)  # a tied one is stored once
    loaded = SequenceModel.load(tmp_path)
    assert loaded.config == model.config
    assert json.loads((tmp_path / "model.json").read_text()) == {"kind": "SequenceModel"} | model.config
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert loaded.head.weight.dtype == dtype
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    again = build(generator, mixer, **options)
    again.load_weights(str(tmp_path))
    assert torch.equal(again(tokens)[0], model(tokens)[0])


def assert_refused(model: SequenceModel, folder: Path, text: str) -> None:
    """Loading raises the message (which is of the form `... path ... text`), and the model stays as it was."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(f"'{folder / 'model.safetensors'}' {text}")):
        model.load_weights(folder)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_cut_or_missing_weights_are_refused(generator, tmp_path):
    model = build(generator)
    assert_refused(model, tmp_path / "nowhere", "cannot be read: ")
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert_refused(build(generator), tmp_path, "cannot be read: ")
        with pytest.raises(ValueError, match=re.escape(f"'{weights}' cannot be read: ")):
            SequenceModel.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=re.escape(f"'{weights}' cannot be read: ")):
        SequenceModel.load(tmp_path)


GATES = "layers.0.mixer.raw_gates"
OTHERS = [  # the model that loads, the one that was saved, what is wrong first by name
    ({}, {"mixer": "lstm"}, "`layers.0.mixer.lstm.bias_hh_l0` must have shape None, got (28,)."),
    ({}, {"mixer": "bd_lru fixed"}, f"`{GATES}.constant` must have shape None, got (3, 4, 5)."),
    ({}, {"mixer": "h_lru"}, f"`{GATES}.projection.bias` must have shape (60,), got (20,)."),
    ({}, {"mlp_size": 64}, "`layers.0.mlp.gate_and_input.weight` must have shape (64, 12), got (128, 12)."),
    ({}, {"num_layers": 2}, "`layers.2.mixer.output.weight` must have shape (12, 15), got None."),
    ({"num_layers": 2}, {}, "`layers.2.mixer.output.weight` must have shape None, got (12, 15)."),
    ({}, {"tied_embedding": True}, "`head.weight` must have shape (11, 12), got None."),
    ({"tied_embedding": True}, {}, "`head.weight` must have shape None, got (11, 12)."),
]


@pytest.mark.parametrize(("mine", "theirs", "text"), OTHERS, ids=lambda v: str(v)[:40])
def test_weights_of_another_model_are_refused(generator, tmp_path, mine, theirs, text):
    build(generator, **theirs).save(tmp_path)
    assert_refused(build(generator, **mine), tmp_path, f"is of another model: {text}")


def config_with(**changes) -> str:
    sizes = {"vocab_size": V, "d_model": D, "num_layers": 1, "mixer": MIXERS["bd_lru"]}
    return json.dumps(sizes | changes)


BAD_CONFIGS = [
    (None, "No such file"),
    ("", "it is not JSON at line 1, column 1"),
    ("{", "it is not JSON at line 1, column 2"),
    ("[]", "`the content` must be an object, got []"),
    ("null", "`the content` must be an object, got None"),
    ('{"vocab_size": 7}', "`d_model` is missing"),
    (config_with(kind=3), "`kind` must be a text, got 3"),
    (config_with(layer_drop=0.1), "`layer_drop` is not an option, there are ['d_model', "),
    (config_with(num_layers=10**9), "`num_layers` must be 3, as in model.safetensors, got 1000000000"),
    (config_with(d_model=2**60), "it is too large"),
    (config_with(d_model=10**400), "`d_model` must be an int, got inf"),
    (config_with(vocab_size="11"), "`vocab_size` must be an int, got '11'"),
    (config_with(num_layers=0), "`num_layers` must be at least 1, got 0"),
    (config_with(mixer={"name": "bd_lru", "num_blocks": 5}), "'bd_lru' needs the option `block_size`"),
    (config_with(mixer={**MIXERS["bd_lru"], "widht": 5}), "`widht` is not an option of 'bd_lru'"),
    (config_with(mixer={"name": "mamba3"}), "`name` must be one of "),
    (config_with(mixer="bd_lru"), "mixer"),
    (config_with(mixer=None), "mixer"),
]


@pytest.mark.parametrize(("text", "cause"), BAD_CONFIGS)
def test_bad_configs_are_refused(generator, tmp_path, text, cause):
    build(generator).save(tmp_path)
    path = tmp_path / "model.json"
    path.unlink() if text is None else path.write_text(text)
    start, cause = re.escape(f"SequenceModel.load: '{path}' is not a model config: "), re.escape(cause)
    with pytest.raises(ValueError, match=f"^{start}.*{cause}"):
        SequenceModel.load(tmp_path)


def unsafe_uses(source: str) -> list[str]:
    """Names in Python source that read or write pickles: the modules, and torch's and accelerate's own."""
    modules = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"}
    calls = {"torch.load", "torch.save", "torch.serialization", "load_state", "save_state", "allow_pickle"}
    names = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names += [alias.name for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases):
                names += [str(module), *(f"{module}.{alias.name}" for alias in aliases)]
            case ast.Attribute(value=value, attr=attribute):
                names += [attribute, f"{ast.unparse(value)}.{attribute}"]
            case ast.Name(id=name) | ast.keyword(arg=str(name)):
                names.append(name)
            case ast.Constant(value=str(text)) if text in modules:  # import_module("pickle")
                names.append(text)
    return [name for name in names if name in calls or name.split(".")[0] in modules]


def test_no_pickle_anywhere():
    sources = sorted(Path(statemix.__file__).parent.rglob("*.py"))
    assert Path(statemix.__file__).parent / "training" / "checkpoint.py" in sources
    assert {path.name: found for path in sources if (found := unsafe_uses(path.read_text()))} == {}


PICKLES = ["import pickle", "from pickle import dumps", "import torch; torch.load('x')", "from torch import save"]
PICKLES += ["torch.serialization.load(f)", "np.load(f, allow_pickle=True)", "import_module('pickle')"]
PICKLES += ["accelerator.save_state(path)", "import dill as p", "f = torch.save"]


@pytest.mark.parametrize("source", PICKLES)
def test_pickle_would_be_found(source):
    assert unsafe_uses(source) != []


# ---- bad input


@pytest.mark.parametrize("std", [0, -0.1, float("nan"), float("inf"), True, "0.02"])
def test_a_bad_scale_of_the_first_weights(std):
    with pytest.raises(ValueError, match=r"^SequenceModel: `init_std` must be a finite number above 0, or None, got "):
        SequenceModel(V, D, 2, MIXERS["bd_lru"], init_std=std)


STATES = "SequenceModel: `state` must have one tensor per layer = 3, got "


def test_bad_calls(generator):
    """What no model reads at all is in tests/test_arguments.py."""
    model, tokens = build(generator), draw(generator, 2, 4)
    for shape in ((4,), (2, 4, 1), (), (2, 0), (0, 4)):
        text = f"SequenceModel: `tokens` must have shape (B, T) with B, T of at least 1, got {shape}."
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            model(torch.zeros(shape, dtype=torch.int64))
    _, state = model(tokens)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for call, text in (
        (
            lambda: model.step(tokens),
            "SequenceModel.step: `tokens` must have shape (B,) with B of at least 1, got (2, 4).",
        ),
        (lambda: model(tokens, state[:2]), STATES + "2."),
        (lambda: model(tokens, (*state, state[0])), STATES + "4."),
        (lambda: model(tokens[:1], state), "BDLRU: `state` must have shape (B, M, N) = (1, 3, 5), got (2, 3, 5)."),
        (lambda: model(tokens, None, mask[:, :3]), "BDLRU: `reset` must have shape (B, T) = (2, 4), got (2, 3)."),
        (
            lambda: model.step(tokens[:, 0], None, mask),
            "SequenceModel.step: `reset` must have shape (B,) = (2,), got (2, 4).",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call()


# ---- dropout


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, requires_grad=True)
    y = Dropout(p)(x)
    kept, count = y != 0, x.numel()
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / count) ** 0.5 + 2**-17
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    assert abs(y.mean().item() - 1) < 4 * (p / (1 - p) / count) ** 0.5
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    for shift in (1, 2, 3, 4, 1003):  # four numbers share what is drawn at once
        flat = kept.flatten().float()
        together = (flat[shift:] * flat[:-shift]).mean().item()
        assert abs(together - (1 - p) ** 2) < 6 / count**0.5


def test_a_seed_says_what_is_dropped():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5)(torch.ones(7, 9, 5)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_nothing_is_dropped_in_evaluation_or_at_zero(generator):
    x = torch.randn(5, 7, generator=generator)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)


def test_nearly_all_are_dropped_without_an_error():
    y = Dropout(1 - 1e-9)(torch.ones(10**5))
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype):
    assert Dropout(0.25)(torch.ones(8, dtype=dtype)).dtype == dtype
