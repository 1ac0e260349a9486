"""The GPU kernels of other packages, in place of the scans of chunks.py: flash-linear-attention's and mamba-ssm's.

They are in Triton, are imported by the first call that they run, and take bfloat16 or float16: float32 they multiply in
fewer digits. They keep the state in float32.
"""

import functools
import importlib.util
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from statemix.mixers.base import Mixer

PACKAGES = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}  # of a module: what pip calls it
MAMBA_CHUNK = 256  # steps, as in its own layer


def unserved(module: str, x: Tensor, reset: Tensor | None) -> str | None:
    """Why the kernels of a package do not serve a mixer's call, in a sentence; None if they do."""
    if not x.is_cuda:
        return f"it needs CUDA tensors, got device {x.device}."
    if kernel_dtype(x) not in (torch.bfloat16, torch.float16):
        return f"it serves bfloat16 and float16, got {kernel_dtype(x)}."
    if reset is not None:
        return "it knows no reset."
    return None if _is_installed(module) else f"it is not installed: pip install {PACKAGES[module]}."


def serves(mixer: Mixer, module: str, backend: str, x: Tensor, reset: Tensor | None) -> bool:
    """Whether a call goes to the kernels of a package; what runs it is noted in the mixer.

    Raises:
        RuntimeError: `backend` names the package, and it does not serve the call.
    """
    problem = "torch is asked for." if backend == "torch" else unserved(module, x, reset)
    if problem is not None and backend == module:
        owner = type(mixer).__name__
        raise RuntimeError(f"{owner}: backend {module!r} cannot be used: {problem} Use backend='auto'.")
    name = "own" if problem else module
    if name not in mixer.kernels:
        mixer.kernels = (*mixer.kernels, name)
    return problem is None


def kernel_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a mixer's products are made of x: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def describe_kernels(mixers: Iterable[Mixer]) -> str:
    """Whose kernels have run the mixers, for a run's record: "own", or "fla 0.6.0", or both where calls differed."""
    names = dict.fromkeys(name for mixer in mixers for name in mixer.kernels) or ["own"]
    return ", ".join(f"{name} {sys.modules[name].__version__}" if name in PACKAGES else name for name in names)


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def delta_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor,
    logarithms: Tensor | None,
    state: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`chunks.delta_scan` by flash-linear-attention.

    Args:
        queries, keys, values, beta, state: as there.
        logarithms: as there and finite; None: the state does not decay.
        dtype: of what the kernels are given, but for logarithms and state.

    Returns:
        As there, in the dtype of the state.
    """
    rank = keys.shape[3]
    # (B, T R, H, ...): the writes of a step one after another
    keys, values, beta = (part.transpose(2, 3).flatten(1, 2).to(dtype) for part in (keys, values, beta))
    options = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    queries = queries.to(dtype)
    if rank > 1:
        from fla.ops.gated_delta_product import chunk_gated_delta_product

        y, state_after = chunk_gated_delta_product(
            queries, keys, values, g=logarithms, beta=beta, num_householder=rank, **options
        )
    elif logarithms is None:
        from fla.ops.delta_rule import chunk_delta_rule

        y, state_after = chunk_delta_rule(queries, keys, values, beta=beta, **options)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        y, state_after = chunk_gated_delta_rule(queries, keys, values, g=logarithms, beta=beta, **options)
    return y.to(state.dtype), state_after.to(state.dtype)


def mamba_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    steps: Tensor,
    rates: Tensor,
    state: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(-rate dt_t) S_{t-1} + dt_t k_t v_t^T and y_t = S_t^T q_t per head, by mamba-ssm.

    Args:
        queries, keys: (B, T, G, N), for the heads of a group.
        values: (B, T, H, P).
        steps: dt, (B, T, H).
        rates: (H,), above 0.
        state: S_0, (B, H, N, P).
        dtype: of what the kernels are given, but for steps, rates and state.

    Returns:
        y (B, T, H, P) and S_T (B, H, N, P), in the dtype of the state.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, state_after = mamba_chunk_scan_combined(
        values.to(dtype),
        steps,
        -rates,
        keys.to(dtype),
        queries.to(dtype),
        chunk_size=MAMBA_CHUNK,
        initial_states=state.mT.contiguous(),  # (B, H, P, N)
        return_final_states=True,
    )
    return y.to(state.dtype), state_after.mT.to(state.dtype)
