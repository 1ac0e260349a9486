"""Specs: what `complete` fills in and refuses, and what the mixers refuse to be built from."""

import json
import re
from types import MappingProxyType

import pytest

from statemix import BDLRU, HLRU, LSTM, SequenceModel
from statemix.gates import NORMALIZATIONS
from statemix.mixers import MIXERS, build_mixer, complete_mixer
from statemix.scan import BACKENDS
from statemix.sizing import solve
from statemix.specs import Registry, complete, options
from statemix.tasks import TASKS, build_task, complete_task


class Filter:
    def __init__(self, width, taps, *, gain=1.0, taper=None):
        self.given = (width, taps, gain, taper)


class Plain:
    pass


CLASSES = Registry("thing", object, {"filter": Filter, "plain": Plain})
GOOD = [  # spec, completed
    ({"name": "filter", "taps": 3}, {"name": "filter", "taps": 3, "gain": 1.0, "taper": None}),
    ({"taper": "hann", "taps": 0, "name": "filter"}, {"name": "filter", "taps": 0, "gain": 1.0, "taper": "hann"}),
    ({"name": "filter", "taps": None}, {"name": "filter", "taps": None, "gain": 1.0, "taper": None}),
    (MappingProxyType({"name": "filter", "taps": 3}), {"name": "filter", "taps": 3, "gain": 1.0, "taper": None}),
    ({"name": "plain"}, {"name": "plain"}),
]
NAMES, OPTIONS = "thing: `name` must be one of ['filter', 'plain'], got ", "['gain', 'taper', 'taps']"
BAD = [  # spec, the whole message
    ({}, NAMES + "None."),
    ({"taps": 3}, NAMES + "None."),
    ({"name": "fliter", "taps": 3}, NAMES + "'fliter'."),
    ({"name": "Filter", "taps": 3}, NAMES + "'Filter'."),
    ({"name": None}, NAMES + "None."),
    ({"name": 3}, NAMES + "3."),
    ({"name": ["filter"]}, NAMES + "['filter']."),  # a list has no hash
    ({"name": "filter", "taps": 3, "gian": 2.0}, f"thing: `gian` is not an option of 'filter', which has {OPTIONS}."),
    ({"name": "filter", "taps": 3, 7: 2.0}, f"thing: `7` is not an option of 'filter', which has {OPTIONS}."),
    ({"name": "filter", "taps": 3, "width": 8}, f"thing: `width` is not an option of 'filter', which has {OPTIONS}."),
    ({"name": "filter", "taps": 3, "self": 8}, f"thing: `self` is not an option of 'filter', which has {OPTIONS}."),
    ({"name": "plain", "taps": 3}, "thing: `taps` is not an option of 'plain', which has []."),
    ({"name": "filter"}, "thing: 'filter' needs the option `taps`, got {'name': 'filter'}."),
    ({"name": "filter", "gain": 2}, "thing: 'filter' needs the option `taps`, got {'name': 'filter', 'gain': 2}."),
]


@pytest.mark.parametrize(("spec", "completed"), GOOD)
def test_good_specs(spec, completed):
    before = dict(spec)
    assert complete(CLASSES, spec, given=("width",)) == completed
    assert dict(spec) == before
    assert complete(CLASSES, completed, given=("width",)) == completed


@pytest.mark.parametrize(("spec", "text"), BAD)
def test_bad_specs(spec, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        complete(CLASSES, spec, given=("width",))


def test_what_is_not_given_is_an_option():
    with pytest.raises(ValueError, match="needs the option `width`"):
        complete(CLASSES, {"name": "filter", "taps": 3})
    spec = {"name": "filter", "taps": 3, "width": 8}
    assert complete(CLASSES, spec) == {**spec, "gain": 1.0, "taper": None}
    assert [p.name for p in options(Filter, given=("width",))] == ["taps", "gain", "taper"]


# A spec read from JSON or a command line may be anything; the docstrings promise a TypeError or ValueError.
@pytest.mark.parametrize("spec", ["bd_lru", ["bd_lru"], None, 3], ids=repr)
def test_a_spec_that_is_no_mapping_is_refused(spec):
    with pytest.raises((TypeError, ValueError), match=r"^mixer: "):
        build_mixer(spec, 4)
    with pytest.raises((TypeError, ValueError), match=r"^mixer: "):
        SequenceModel(5, 4, 1, spec)
    with pytest.raises((TypeError, ValueError), match=r"^task: "):
        build_task(spec)


# ---- the registered classes

MIXER_SPECS = {
    "bd_lru": {"num_blocks": 3, "block_size": 2},
    "h_lru": {"num_channels": 3, "order": 2},
    "lru": {"num_channels": 3},
    "gru": {"hidden_size": 3},
    "lstm": {"hidden_size": 3},
    "mlstm": {"head_dim": 3},
    "mamba2": {"head_dim": 3},
    "delta_net": {"head_dim": 3},
    "gated_delta_net": {"head_dim": 3},
    "delta_product": {"head_dim": 3},
    "pd_ssm": {"num_channels": 3},
    "attention": {"head_dim": 2, "context": 3},
}


def test_every_mixer_is_tried():
    assert MIXERS.keys() == MIXER_SPECS.keys()
    assert MIXERS.items() >= {"bd_lru": BDLRU, "h_lru": HLRU, "lstm": LSTM}.items()


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_specs(name):
    spec = {"name": name, **MIXER_SPECS[name]}
    completed = complete_mixer(spec)
    assert completed.items() >= spec.items()
    assert json.loads(json.dumps(completed)) == completed
    mixer = build_mixer(spec, 4)
    assert type(mixer) is MIXERS[name]
    assert mixer.d_model == 4
    assert build_mixer(completed, 4).state_shape == mixer.state_shape
    for key in MIXER_SPECS[name]:
        short = {k: v for k, v in spec.items() if k != key}
        with pytest.raises(ValueError, match=f"^mixer: '{name}' needs the option `{key}`"):
            build_mixer(short, 4)
    for key in ("d_model", "widht"):
        with pytest.raises(ValueError, match=f"^mixer: `{key}` is not an option of '{name}'"):
            build_mixer({**spec, key: 4}, 4)


def test_mixer_options_reach_the_mixer():
    spec = {"name": "h_lru", "num_channels": 5, "order": 2, "normalization": "tanh", "form": "observer"}
    mixer = build_mixer({**spec, "selective": False, "backend": "reference"}, 4)
    assert mixer.state_shape == (2, 5)
    assert (mixer.normalization, mixer.form, mixer.backend) == ("tanh", "observer", "reference")
    assert mixer.raw_gates.projection is None


def test_defaults_are_those_of_the_paper():
    assert complete_mixer({"name": "bd_lru", **MIXER_SPECS["bd_lru"]}) == {
        "name": "bd_lru",
        "num_blocks": 3,
        "block_size": 2,
        "normalization": "softmax",
        "selective": True,
        "backend": "auto",
        "recompute": None,
        "gate_half_life": None,
    }
    assert complete_mixer({"name": "h_lru", **MIXER_SPECS["h_lru"]})["form"] == "companion"


@pytest.mark.parametrize("name", [name for name in TASKS if name != "word-problem"])  # which needs a path
def test_task_specs(name):
    completed = complete_task({"name": name})
    assert json.loads(json.dumps(completed)) == completed
    length = 2 * completed["seq_len"]  # even, and long enough for every task
    task = build_task({"name": name, "seq_len": length})
    assert type(task) is TASKS[name]
    assert task.seq_len == length
    with pytest.raises(ValueError, match=f"^task: `length` is not an option of '{name}'"):
        build_task({"name": name, "length": 7})


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=re.escape(f"task: `name` must be one of {sorted(TASKS)}, got 'parity?'.")):
        build_task({"name": "parity?"})


# ---- bad options of mixers and models

BLOCKS = {"name": "bd_lru", "num_blocks": 4, "block_size": 4}
SIZES = {  # of a class, and what else it needs
    BDLRU: (("d_model", "num_blocks", "block_size"), {}),
    HLRU: (("d_model", "num_channels", "order"), {}),
    LSTM: (("d_model", "hidden_size"), {}),
    SequenceModel: (("vocab_size", "d_model", "num_layers", "mlp_size"), {"mixer": BLOCKS}),
}
BAD_SIZES = [
    (0, ValueError, "must be at least 1, got 0."),
    (-3, ValueError, "must be at least 1, got -3."),
    (2.0, TypeError, "must be an int, got 2.0."),
    (8.5, TypeError, "must be an int, got 8.5."),
    (True, TypeError, "must be an int, got True."),
    ("4", TypeError, "must be an int, got '4'."),
    (None, TypeError, "must be an int, got None."),
]


@pytest.mark.parametrize(("value", "error", "text"), BAD_SIZES)
@pytest.mark.parametrize(("cls", "size"), [(cls, size) for cls, (sizes, _) in SIZES.items() for size in sizes])
def test_bad_sizes(cls, size, value, error, text):
    if (size, value) == ("mlp_size", None):
        pytest.skip("None is the usual size")
    sizes, others = SIZES[cls]
    with pytest.raises(error, match=f"^{re.escape(f'{cls.__name__}: `{size}` {text}')}$"):
        cls(**dict.fromkeys(sizes, 4) | others | {size: value})


CHOICES = {
    "normalization": sorted(NORMALIZATIONS),
    "backend": sorted(("auto", *BACKENDS)),
    "form": ["companion", "observer"],
}


@pytest.mark.parametrize(
    ("mixer", "option"),
    [(BDLRU, "normalization"), (BDLRU, "backend"), (HLRU, "normalization"), (HLRU, "backend"), (HLRU, "form")],
)
@pytest.mark.parametrize("value", ["softmx", "", None, ["softmax"]], ids=repr)
def test_bad_choices(mixer, option, value):
    text = f"{mixer.__name__}: `{option}` must be one of {CHOICES[option]}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        mixer(4, 4, 4, **{option: value})


@pytest.mark.parametrize("name", [{}, [3], {"bd_lru"}, 3, None, b"bd_lru"], ids=str)
@pytest.mark.parametrize(
    "ask", [MIXERS.__getitem__, lambda name: build_mixer({"name": name}, 4), lambda name: solve(name, 4, budget=9)]
)
def test_a_name_that_is_no_text_is_an_unknown_one(name, ask):
    text = f"mixer: `name` must be one of {sorted(MIXERS)}, got {name!r}."
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        ask(name)
