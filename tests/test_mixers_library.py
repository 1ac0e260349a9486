"""mixers/library.py: the kernels of other packages, by functions with their signatures, and on a card themselves."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from mixer_helpers import everything, normal
from run_helpers import run, small_config

from statemix.mixers import build_mixer, library

HEADS = {"head_dim": 16, "num_heads": 2}
MIXERS = {
    "delta_net": HEADS | {"name": "delta_net"},
    "delta_net, negative eigenvalues": HEADS | {"name": "delta_net", "negative_eigenvalues": True},
    "gated_delta_net": HEADS | {"name": "gated_delta_net"},
    "delta_product": HEADS | {"name": "delta_product", "rank": 2},
    "delta_product, gated": HEADS | {"name": "delta_product", "rank": 3, "gated": True},
    "mamba2": {"name": "mamba2", "head_dim": 16, "num_heads": 4, "state_dim": 16},
    "mamba2, groups": {"name": "mamba2", "head_dim": 16, "num_heads": 4, "state_dim": 16, "num_groups": 2},
}
each_mixer = pytest.mark.parametrize("spec", MIXERS.values(), ids=MIXERS)


# ---- loops over time with the signatures and the definitions of the packages


def delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, num_householder=1):
    """q (B, T, H, K), k and v (B, T R, H, ...), beta (B, T R, H), g (B, T, H) logarithms, the state (B, H, K, V)."""
    assert output_final_state
    outputs, state = [], initial_state
    for t in range(q.shape[1]):
        if g is not None:
            state = g[:, t].exp()[..., None, None] * state
        for r in range(t * num_householder, (t + 1) * num_householder):
            error = v[:, r] - torch.einsum("bhk,bhkv->bhv", k[:, r], state)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, r], beta[:, r, :, None] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state))
    return torch.stack(outputs, dim=1), state


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    return delta_rule(q, k, v, None, beta, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    return delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state)


def chunk_gated_delta_product(
    q, k, v, g, beta, num_householder, scale=None, initial_state=None, output_final_state=False
):
    return delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, num_householder)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, *, initial_states, return_final_states):
    """x (B, T, H, P), dt (B, T, H), A (H), B and C (B, T, G, N); the state is (B, H, P, N)."""
    assert return_final_states
    assert chunk_size == 256
    outputs, state = [], initial_states
    shared = x.shape[2] // B.shape[2]
    for t in range(x.shape[1]):
        b, c = (part[:, t].repeat_interleave(shared, dim=1) for part in (B, C))
        written = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], b)
        state = (dt[:, t] * A).exp()[..., None, None] * state + written
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c))
    return torch.stack(outputs, dim=1), state


@pytest.fixture
def packages(monkeypatch):
    """The packages are installed, serve every call, and keep its dtype."""
    modules = {
        "fla": SimpleNamespace(__version__="0.6.0"),
        "fla.ops.delta_rule": SimpleNamespace(chunk_delta_rule=chunk_delta_rule),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule),
        "fla.ops.gated_delta_product": SimpleNamespace(chunk_gated_delta_product=chunk_gated_delta_product),
        "mamba_ssm": SimpleNamespace(__version__="2.2.4"),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined),
    }
    folders = dict.fromkeys(("fla.ops", "mamba_ssm.ops", "mamba_ssm.ops.triton"), SimpleNamespace())
    for name, module in (folders | modules).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(library, "unserved", lambda *_: None)


@each_mixer
def test_a_mixer_is_the_same_with_kernels_of_this_signature(generator, spec, packages):
    torch.manual_seed(0)
    theirs = build_mixer(spec, 24).double()
    own = build_mixer(spec | {"backend": "torch"}, 24).double()
    own.load_state_dict(theirs.state_dict())
    x, state = normal(generator, 2, 37, 24), normal(generator, 2, *theirs.state_shape)
    expected = everything(own, x, state)
    for what, actual in everything(theirs, x, state).items():
        assert relative_error(actual, expected[what]) < 1e-12, what
    assert library.describe_kernels([theirs]) == {"m": "mamba_ssm 2.2.4"}.get(spec["name"][0], "fla 0.6.0")
    assert library.describe_kernels([own]) == "own"
    assert library.describe_kernels([own, theirs]).startswith("own, ")


@pytest.mark.parametrize(("backend", "kernels"), [("auto", "fla 0.6.0"), ("torch", "own")])
def test_a_run_says_whose_kernels_it_used(tmp_path, packages, backend, kernels):
    mixer = {"name": "delta_net", "head_dim": 4, "num_heads": 1, "backend": backend}
    result = run(tmp_path / "run", small_config(mixer=mixer, steps=1))
    assert result.summary["kernels"] == {"delta_net": kernels}


def test_kernels_get_the_dtype_of_products_and_the_state_stays_wide(generator, packages, monkeypatch):
    dtypes = []

    def rule(q, k, v, g, beta, scale, initial_state, output_final_state):
        dtypes.append([part.dtype for part in (q, k, v, g, beta, initial_state)])
        return v, initial_state

    monkeypatch.setattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule", rule)
    mixer = build_mixer(MIXERS["gated_delta_net"], 24)
    with torch.autocast("cpu", torch.bfloat16):
        mixer(torch.randn(2, 5, 24, generator=generator))
    half, wide = torch.bfloat16, torch.float32
    assert dtypes == [[half, half, half, wide, half, wide]]


class TestTheRule:
    def test_a_call_of_a_cpu_is_our_own(self, generator):
        mixer = build_mixer(MIXERS["delta_net"], 24)
        mixer(torch.randn(1, 3, 24, generator=generator))
        assert mixer.kernels == ("own",)
        knows_no_others = build_mixer({"name": "lstm", "hidden_size": 4}, 8)
        assert library.describe_kernels([knows_no_others]) == "own"

    @pytest.mark.parametrize(
        ("dtype", "reset", "installed", "problem"),
        [
            (torch.bfloat16, None, True, None),
            (torch.float32, None, True, "it serves bfloat16 and float16, got torch.float32."),
            (torch.float16, torch.ones(1, 1, dtype=torch.bool), True, "it knows no reset."),
            (torch.float16, None, False, "it is not installed: pip install flash-linear-attention."),
        ],
    )
    def test_what_is_served_on_a_card(self, monkeypatch, dtype, reset, installed, problem):
        monkeypatch.setattr(library, "_is_installed", lambda module: installed)
        x = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
        assert library.unserved("fla", x, reset) == problem

    @pytest.mark.parametrize("name", ["delta_net", "mamba2"])
    def test_a_named_package_that_cannot_serve_raises(self, generator, name):
        module = {"mamba2": "mamba_ssm"}.get(name, "fla")
        mixer = build_mixer(MIXERS[name] | {"backend": module}, 24)
        told = r"cannot be used: it needs CUDA tensors, got device cpu\. Use backend='auto'\."
        with pytest.raises(RuntimeError, match=rf"^\w+: backend '{module}' {told}$"):
            mixer(torch.randn(1, 3, 24, generator=generator))

    @pytest.mark.parametrize("name", ["delta_net", "mamba2"])
    def test_an_unknown_backend_is_refused(self, name):
        with pytest.raises(ValueError, match=r"`backend` must be one of \['auto', .*\], got 'triton'"):
            build_mixer(MIXERS[name] | {"backend": "triton"}, 24)

    def test_whether_a_package_is_there_is_seen_without_an_import(self):
        assert library._is_installed("torch")
        assert not library._is_installed("no_such_package")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
@each_mixer
def test_kernels_on_a_card_are_our_own_form_rounded(spec):
    module = {"mamba2": "mamba_ssm"}.get(spec["name"], "fla")
    try:
        importlib.import_module({"fla": "fla.ops", "mamba_ssm": "mamba_ssm.ops.triton.ssd_combined"}[module])
    except Exception as error:  # an import of many packages fails in many ways
        pytest.skip(f"{module} cannot be imported: {error}")
    torch.manual_seed(0)
    mixer = build_mixer(spec | {"backend": module}, 64).cuda()
    own = build_mixer(spec | {"backend": "torch"}, 64).cuda()
    own.load_state_dict(mixer.state_dict())
    x, state = torch.randn(2, 200, 64, device="cuda"), torch.zeros(2, *mixer.state_shape, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = everything(mixer, x, state), everything(own, x, state)
    for what, actual in found.items():
        assert relative_error(actual, expected[what].float()) < 3e-2, what  # of products in bfloat16, of two orders
