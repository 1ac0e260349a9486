"""model.py: first weights by one rule for all mixers, the autoencoder, and how a folder tells the two models apart."""

import json
import re
from unittest import mock

import pytest
import torch
from model_helpers import MIXERS, D, T, V, assert_same, build, draw, each_mixer

import statemix
from statemix import SequenceModel
from statemix.model import AutoEncoder, load_model
from statemix.sizing import table


def seeded(mixer: str = "bd_lru", *, mixer_spec=None, cls=SequenceModel, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 48, "num_layers": 2, "mixer": mixer_spec or MIXERS[mixer]}
    return cls(**sizes | ({"seq_len": 8} if cls is AutoEncoder else {}) | options)


@each_mixer
def test_a_model_of_one_pair_starts_as_torch_makes_it(mixer):
    """The parts, built by hand in the order of the model, from the same random numbers."""
    model = seeded(mixer, num_layers=1, mlp_size=32)
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(64, 48)
    layer = statemix.backbone.Layer(48, MIXERS[mixer], 32)
    head = torch.nn.Linear(48, 64, bias=False)
    expected = {f"layers.0.{name}": weight for name, weight in layer.state_dict().items()}
    expected |= {"embedding.weight": embedding.weight, "head.weight": head.weight, "norm.weight": torch.ones(48)}
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


# all mixers there are, and those of the other tests
SPECS = [*MIXERS.values(), *(solution.spec for solution in table(48, 8_000))]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
each_class = pytest.mark.parametrize("cls", [SequenceModel, AutoEncoder])


@each_spec
@each_class
def test_the_branches_of_all_mixers_are_scaled_by_one_rule(spec, cls):
    """By default: the last map of a branch, and nothing else, is divided by sqrt(num_layers)."""
    for depth in (1, 4):
        options = {"mixer_spec": spec, "num_layers": depth, "cls": cls}
        with mock.patch.object(cls, "_initialise"):
            plain = seeded(**options).state_dict()
        for name, weight in seeded(**options).state_dict().items():
            last = re.fullmatch(r"layers\.\d+\.(mixer|mlp)\.output\.weight", name)
            assert torch.equal(weight, plain[name] / (depth**0.5 if last else 1)), name


@each_spec
@each_class
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_linear_maps_and_embeddings_have_the_scale_asked_for(spec, tied, cls):
    options = {"mixer_spec": spec, "cls": cls, "num_layers": 8, "init_std": 0.02, "tied_embedding": tied}
    model = seeded(**options)
    with mock.patch.object(cls, "_initialise"):
        plain = seeded(**options).state_dict()
    drawn = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    assert len(drawn) >= 8
    for name, weight in model.state_dict().items():
        if name not in drawn:  # biases, norms, constant gates, what a mixer sets up itself
            assert torch.equal(weight, plain[name]), name
            continue
        branch = name.endswith(("mixer.output.weight", "mlp.output.weight"))
        std = 0.02 / 4 if branch else 0.02  # 8 pairs are 16 branches
        # the standard error of a standard deviation of n numbers is std / sqrt(2 n), of their mean std / sqrt(n)
        assert abs(weight.std() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name
        assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5, name
    assert (model.head.weight is model.embedding.weight) == tied


# ---- the autoencoder


def build_autoencoder(generator: torch.Generator, mixer: str = "bd_lru", **options) -> AutoEncoder:
    model = AutoEncoder(V, D, 2, MIXERS[mixer], seq_len=T, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / D**0.5)
    return model.double()


@each_mixer
def test_the_autoencoder_predicts_every_token_from_the_last_position(generator, mixer):
    """The decoder, written out for one position at a time, on the residual stream of a SequenceModel's layers."""
    model, tokens = build_autoencoder(generator, mixer), draw(generator, 3, T)
    logits, state = model(tokens)
    assert logits.shape == (3, T, V)
    x = model.embedding(tokens)
    for layer, layer_state in zip(model.layers, state, strict=True):
        x, own_state = layer(x, None, None)
        assert_same(layer_state, own_state, "state")
    last = model.norm(x)[:, -1]
    first_map, second_map = model.decoder[0], model.decoder[2]
    for t in range(T):
        y = (last + model.positions.weight[t]) @ first_map.weight.T + first_map.bias
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        y = (y @ second_map.weight.T + second_map.bias) @ model.head.weight.T
        assert_same(logits[:, t], y, f"position {t}")
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    assert (model(changed)[0] != logits).any(2).all()  # the state has seen the first token, all positions read it


@pytest.mark.parametrize("tied", [False, True])
def test_an_autoencoder_is_saved_and_loaded_as_one(generator, tmp_path, tied):
    model, tokens = build_autoencoder(generator, tied_embedding=tied), draw(generator, 2, T)
    model.save(tmp_path)
    for loaded in (AutoEncoder.load(tmp_path), load_model(tmp_path)):
        assert type(loaded) is AutoEncoder
        assert loaded.config == model.config
        assert loaded.config["seq_len"] == T
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert loaded.num_parameters() - SequenceModel(V, D, 2, MIXERS["bd_lru"]).num_parameters() == (
        T * D + 2 * (D * D + D) - (V * D if tied else 0)
    )
    wrong = rf"^SequenceModel\.load: '{tmp_path / 'model.json'}' is of the kind 'AutoEncoder'\. Use load_model\.$"
    with pytest.raises(ValueError, match=wrong):
        SequenceModel.load(tmp_path)


def test_load_model_tells_the_kinds_apart(generator, tmp_path):
    build(generator).save(tmp_path)
    assert type(load_model(str(tmp_path))) is SequenceModel
    path = tmp_path / "model.json"
    config = json.loads(path.read_text())
    del config["kind"]  # as written before there was another kind
    path.write_text(json.dumps(config))
    assert type(load_model(tmp_path)) is SequenceModel
    path.write_text(json.dumps(config | {"kind": "Diffusion"}))
    kinds = r"^load_model: `kind` in '.*model\.json' must be one of \['AutoEncoder', 'Seq"
    with pytest.raises(ValueError, match=kinds):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"^load_model: '.*model\.json' is not a model config: .*No such file"):
        load_model(tmp_path)


def test_an_autoencoder_reads_sequences_of_its_length_only(generator):
    model = build_autoencoder(generator)
    for tokens, error, text in (
        (draw(generator, 2, T - 1), ValueError, rf"have shape \(B, L\) with L = {T}, got \(2, "),
        (draw(generator, 2, T + 1), ValueError, rf"have shape \(B, L\) with L = {T}, got \(2, "),
        (draw(generator, 0, T), ValueError, r"have shape \(B, T\) with B, T of at least 1"),
        (draw(generator, 2, T).float(), TypeError, r"be int64 or int32, got torch\.float32"),
    ):
        with pytest.raises(error, match=f"^AutoEncoder: `tokens` must {text}"):
            model(tokens)
    with pytest.raises(ValueError, match=r"^AutoEncoder: `seq_len` must be at least 1, got 0"):
        AutoEncoder(V, D, 1, MIXERS["bd_lru"], seq_len=0)
