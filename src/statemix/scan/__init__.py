"""block_scan, companion_scan, observer_scan: check the call, choose a backend, run it.

A backend is a module of this package with two functions of a `Problem`: `unserved` says why it does not serve it on
this machine, or None; `scan` returns the states, which are rounded here to the dtype of the values, and the state to go
on from. A backend is imported when it is first asked for.
"""

import contextlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from statemix.scan.problem import Problem, check_problem

BACKENDS = ("gpu", "cpu", "associative", "reference")  # fastest first
_COMPILED = {"cuda": "gpu", "cpu": "cpu"}  # the fast backend of a kind of device


def available_backends(device: torch.device | str | None = None) -> tuple[str, ...]:
    """Names that `backend=` accepts on this machine, fastest first.

    Args:
        device: only those that serve float32 tensors of this device. None: those that serve tensors of any device here.
    """
    return tuple(name for name in BACKENDS if backend_problem(name, device) is None)


def backend_problem(name: str, device: torch.device | str | None = None) -> str | None:
    """Why the backend cannot be used here, in one sentence; None if it can. For `device` see `available_backends`."""
    devices = [device] if device is not None else ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    problem = None
    for each in devices:
        problem = _backend(name).unserved(_smallest_problem(each))
        if problem is None:
            return None
    return problem


def _smallest_problem(device: torch.device | str) -> Problem:
    gates, values = torch.zeros(1, 1, 2, 1, device=device), torch.zeros(1, 1, 1, device=device)
    return check_problem("companion", gates, values, None, None, "softmax")


def block_scan(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None = None,
    *,
    normalization: str = "softmax",
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """States of h_t = A_t h_{t-1} + a0_t * v_t, with a dense A_t in each block and (A_t, a0_t) from normalised gates.

    NaN and infinities in the inputs pass through to the states that depend on them.

    Float32 states are right to 2e-5 of the largest one, at any length, but for one case: "cpu" rounds the weights of
    tanh, silu, linear and none, and "gpu" all, and where a weight is almost 1 or -1 at every step, so is what the state
    forgets. The error was up to 2e-3 with weights of 1 - 1e-4 (a memory of 10^4 steps), and 6e-2 with 1 - 1e-6. Use
    float64 or backend="associative" there; in "cpu" softmax and sigmoid keep the distance of a weight from one.

    Args:
        raw_gates: (B, T, M, M+1, N), any real. [..., i, j, n] for j < M carries old component j to new component i of
            block n; j = M is the input gate of component i.
        values: v_t, (B, T, M, N). Same dtype and device as `raw_gates`.
        initial_state: h_0, (B, M, N), any float dtype. Zeros if None.
        normalization: a name in `NORMALIZATIONS`.
        reset: (B, T) bool. True: the state is zero before that step. Never if None.
        backend: "auto" or a name in `available_backends()`. "auto" is "gpu" for CUDA tensors and "cpu" for CPU
            tensors where that serves the call, and "associative" for everything else.

    Returns:
        h_1..h_T, (B, T, M, N), in the dtype of `values`; sums are kept in float32 or wider.

    Raises:
        TypeError: an argument is not a tensor of the wanted dtype, or dtypes or devices disagree.
        ValueError: shapes disagree, or B, T, M or N is 0, or a name is unknown.
        RuntimeError: the named backend is not available here, or does not serve this device, dtype or block size.

    Source: Dubinin et al. 2026 (arXiv 2602.12021), eq. of BD-LRU. Gradients: docstring of scan/reference.py.
    """
    states, _ = scan_to_state(
        "block",
        raw_gates,
        values,
        initial_state,
        normalization=normalization,
        reset=reset,
        backend=backend,
    )
    return states


def companion_scan(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None = None,
    *,
    normalization: str = "softmax",
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """States of h_t = sum_{i=1..M} a_{i,t} h_{t-i} + a_{0,t} v_t, with the coefficients from normalised gates.

    Args:
        raw_gates: (B, T, M+1, N), any real. [..., j, n] for j < M is the coefficient of lag j + 1 of channel n; j = M
            is the input gate.
        values: v_t, (B, T, N). Same dtype and device as `raw_gates`.
        initial_state: (B, M, N), any float dtype: the last M values h_0, h_{-1}, ..., newest first. Zeros if None.
        normalization, reset, backend: as in `block_scan`; a reset clears all M lags.

    Returns:
        h_1..h_T, (B, T, N), in the dtype of `values`. The state after step t is h_t, ..., h_{t-M+1}: `lagged_states`.

    Raises:
        TypeError, ValueError, RuntimeError: as `block_scan`.

    Source: Dubinin et al. 2026 (arXiv 2602.12021), eq. of H-LRU.
    """
    states, _ = scan_to_state(
        "companion",
        raw_gates,
        values,
        initial_state,
        normalization=normalization,
        reset=reset,
        backend=backend,
    )
    return states


def observer_scan(
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None = None,
    *,
    normalization: str = "softmax",
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """States of h'[0] = a_1 h[0] + h[1] + a_0 v, h'[i] = a_{i+1} h[0] + h[i+1]: the transposed companion block.

    A coefficient is taken from the step at which it was made, where `companion_scan` takes it from the step at which
    it acts. Stable in the 1-norm of the block only.

    Args:
        raw_gates: (B, T, M+1, N), as in `companion_scan`; values: (B, T, N); initial_state: the block, (B, M, N).
        normalization, reset, backend: as in `block_scan`.

    Returns:
        The whole block after each step, (B, T, M, N), in the dtype of `values`.

    Raises:
        TypeError, ValueError, RuntimeError: as `block_scan`.

    Source: the form in which public code of Dubinin et al. 2026 (arXiv 2602.12021) trains its language models.
    """
    states, _ = scan_to_state(
        "observer",
        raw_gates,
        values,
        initial_state,
        normalization=normalization,
        reset=reset,
        backend=backend,
    )
    return states


def scan_to_state(
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None = None,
    *,
    normalization: str = "softmax",
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The states of a scan and the state to go on from, which is float32 or wider also where the states are not.

    Args:
        kind: "block", "companion" or "observer".
        raw_gates, values, initial_state, normalization, reset, backend: as in `block_scan`, `companion_scan` and
            `observer_scan`.

    Returns:
        What that scan returns, and the state after the last step, (B, M, N): for the companion its last M values.

    Raises:
        TypeError, ValueError, RuntimeError: as `block_scan`.
    """
    problem = check_problem(kind, raw_gates, values, initial_state, reset, normalization)
    module, device = choose_backend(problem, backend), values.device.type
    # autocast would round the products of a torch backend; tensors of meta have none
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        states, final_state = module.scan(problem)
    return states.to(values.dtype), final_state


def lagged_states(states: Tensor, initial_state: Tensor | None, reset: Tensor | None, order: int) -> Tensor:
    """(h_t, h_{t-1}, ..., h_{t-M+1}) at every step, from the states of a companion scan.

    Args:
        states: (B, T, N), what `companion_scan` returned.
        initial_state, reset: what it was given.
        order: M.

    Returns:
        (B, T, M, N); a lag from before a reset is zero. [:, -1] is the state to go on from.
    """
    batch, length, channels = states.shape
    if initial_state is None:
        initial_state = states.new_zeros(batch, order, channels)
    history = torch.cat([initial_state.to(states.dtype).flip(1), states], dim=1)  # (B, M + T, N), oldest first
    lags = torch.stack([history[:, order - lag : order - lag + length] for lag in range(order)], dim=2)
    if reset is None:
        return lags
    time = torch.arange(length, device=states.device)
    last_reset = torch.where(reset, time, -length - order).cummax(dim=1).values  # (B, T): the newest one, if any
    age = time[:, None] - torch.arange(order, device=states.device)  # (T, M): when a lag was made
    return lags.masked_fill((age < last_reset[:, :, None])[..., None], 0)


def choose_backend(problem: Problem, backend: str) -> ModuleType:
    """The module that runs the problem: the named backend, or for "auto" what `block_scan` documents.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend does not serve the problem.
    """
    owner = f"{problem.kind}_scan"
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"{owner}: `backend` must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
        reason = _backend(backend).unserved(problem)
        if reason is not None:
            raise RuntimeError(f"{owner}: backend {backend!r} cannot be used: {reason} Use backend='auto'.")
        return _backend(backend)
    device = problem.values.device.type
    compiled = _COMPILED.get(device)
    if compiled is not None:
        if _backend(compiled).unserved(problem) is None:
            return _backend(compiled)
        missing = backend_problem(compiled, device)
        if missing is not None and not _warned:
            _warned.append(missing)
            warnings.warn(f"statemix: the slow torch scan runs in place of the compiled one: {missing}", stacklevel=4)
    return _backend("associative")


_warned: list[str] = []  # the fallback is announced once per process


def _backend(name: str) -> ModuleType:
    """The module of a backend. Import statements, since torch.compile does not trace importlib."""
    if name == "gpu":
        from statemix.scan import gpu

        return gpu
    if name == "cpu":
        from statemix.scan import cpu

        return cpu
    if name == "associative":
        from statemix.scan import associative

        return associative
    from statemix.scan import reference

    return reference
