"""block_scan, companion_scan, observer_scan: check the call, choose a backend, run it.

A backend is a module of this package with these three functions; it receives checked tensors of one dtype, float32 or
float64 (a fused one bfloat16, too), a filled initial state, and the reset mask or None.
"""

import warnings
from types import ModuleType

import torch
from torch import Tensor

from statemix import kernels
from statemix.gates import check_normalization
from statemix.scan import associative, cpu, gpu, reference

# "auto" takes the first that serves the call
BACKENDS: dict[str, ModuleType] = {"gpu": gpu, "cpu": cpu, "associative": associative, "reference": reference}
FUSED = (gpu, cpu)  # these return the state to go on from, too, and read bfloat16 as it is


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts on this machine, fastest first."""
    return tuple(name for name in BACKENDS if backend_problem(name) is None)


def backend_problem(name: str) -> str | None:
    """Why the backend cannot be used on this machine, in one sentence; None if it can."""
    module = BACKENDS[name]
    if module is gpu:
        return gpu.load_problem()
    return kernels.load_problem() if module is cpu else None


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

    Args:
        raw_gates: (B, T, M, M+1, N), any real. [..., i, j, n] for j < M carries old component j to new component i of
            block n; j = M is the input gate of component i.
        values: v_t, (B, T, M, N). Same dtype and device as `raw_gates`.
        initial_state: h_0, (B, M, N), any float dtype. Zeros if None.
        normalization: a name in `NORMALIZATIONS`.
        reset: (B, T) bool. True: the state is zero before that step. Never if None.
        backend: "auto" or a name in `available_backends()`. "auto" is the Triton kernel for CUDA tensors and the
            compiled kernel for CPU tensors, where they are there and serve M and the dtype, and the log-depth torch
            scan for everything else.

    Returns:
        h_1..h_T, (B, T, M, N), in the dtype of `values`; sums are kept in float32 or wider.

    Raises:
        TypeError: an argument is not a tensor of the wanted dtype, or dtypes or devices disagree.
        ValueError: shapes disagree, or B, T, M or N is 0, or a name is unknown.
        RuntimeError: the named backend is not available here, or does not serve this device, dtype or block size.

    Source: Dubinin et al. 2026 (arXiv 2602.12021), eq. of BD-LRU. Gradients: docstring of scan/reference.py.
    """
    return _run("block_scan", raw_gates, values, initial_state, normalization, reset, backend)[0]


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
        As `block_scan`.

    Source: Dubinin et al. 2026 (arXiv 2602.12021), eq. of H-LRU.
    """
    return _run("companion_scan", raw_gates, values, initial_state, normalization, reset, backend)[0]


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
        As `block_scan`.

    Source: the form in which public code of Dubinin et al. 2026 (arXiv 2602.12021) trains its language models.
    """
    return _run("observer_scan", raw_gates, values, initial_state, normalization, reset, backend)[0]


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
        As `block_scan`.
    """
    return _run(f"{kind}_scan", raw_gates, values, initial_state, normalization, reset, backend)


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


def _run(
    name: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None,
    normalization: str,
    reset: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    order = check_scan(name, raw_gates, values, initial_state, normalization, reset)
    state_dtype = torch.promote_types(values.dtype, torch.float32)  # sums and states are float32 or wider
    if initial_state is None:
        initial_state = values.new_zeros(values.shape[0], order, values.shape[-1], dtype=state_dtype)
    initial_state = initial_state.to(state_dtype)
    module = choose_backend(name, backend, values.device, order, values.dtype)
    dtype = values.dtype if module in FUSED and values.dtype == torch.bfloat16 else state_dtype
    scan = getattr(module, name)
    raw_gates, scanned_values = raw_gates.to(dtype), values.to(dtype)
    if torch.amp.is_autocast_available(values.device.type):  # it would round the products of a torch backend
        with torch.autocast(values.device.type, enabled=False):
            scanned = scan(raw_gates, scanned_values, initial_state, reset, normalization)
    else:
        scanned = scan(raw_gates, scanned_values, initial_state, reset, normalization)
    if module in FUSED:
        states, final_state = scanned
    else:
        states = scanned
        final_state = states[:, -1]
        if name == "companion_scan":
            since = max(states.shape[1] - order, 0)  # the last M steps hold all lags; a shorter sequence reaches back
            cleared = None if reset is None else reset[:, since:]
            earlier = initial_state if since == 0 else torch.zeros_like(initial_state)
            final_state = lagged_states(states[:, since:], earlier, cleared, order)[:, -1]
    return states.to(values.dtype), final_state


def choose_backend(name: str, backend: str, device: torch.device, order: int, dtype: torch.dtype) -> ModuleType:
    """The backend's module. Raises if it was named and cannot serve the call; "auto" goes on to the next."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"{name}: `backend` must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
        problem = backend_problem(backend) or _unserved(backend, device, order, dtype)
        if problem:
            raise RuntimeError(f"{name}: backend {backend!r} cannot be used: {problem} Use backend='auto'.")
        return BACKENDS[backend]
    fused = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if fused is not None:
        problem = backend_problem(fused)
        if problem is None and _unserved(fused, device, order, dtype) is None:
            return BACKENDS[fused]
        if problem is not None and not _warned:
            _warned.append(problem)
            warnings.warn(f"statemix: the slow torch scan runs in place of the compiled one: {problem}", stacklevel=4)
    return associative


_warned: list[str] = []  # the fallback is announced once per process


def _unserved(backend: str, device: torch.device, order: int, dtype: torch.dtype) -> str | None:
    """Why an available backend does not serve this call; None if it does."""
    if backend == "gpu":
        return gpu.unserved(device, dtype, order)
    if backend != "cpu":
        return None
    if device.type != "cpu":
        return f"it needs CPU tensors, got device {device}."
    return f"it serves M up to {kernels.MAX_ORDER}, got M = {order}." if order > kernels.MAX_ORDER else None


def check_scan(
    name: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None,
    normalization: str,
    reset: Tensor | None,
) -> int:
    """Raise unless the arguments fit together; return M."""
    check_normalization(name, normalization)
    for argument, tensor in (("raw_gates", raw_gates), ("values", values), ("initial_state", initial_state)):
        if tensor is None and argument == "initial_state":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: `{argument}` must be a tensor, got {type(tensor).__name__}.")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: `{argument}` must have a floating-point dtype, got {tensor.dtype}.")
        if tensor.device != raw_gates.device:
            raise TypeError(
                f"{name}: `{argument}` must be on {raw_gates.device} like `raw_gates`, got {tensor.device}."
            )
    if values.dtype != raw_gates.dtype:
        raise TypeError(f"{name}: `values` must be {raw_gates.dtype} like `raw_gates`, got {values.dtype}.")

    block = name == "block_scan"
    layout = "(B, T, M, M+1, N)" if block else "(B, T, M+1, N)"
    shape = tuple(raw_gates.shape)
    if len(shape) != (5 if block else 4) or (block and shape[3] != shape[2] + 1):
        raise ValueError(f"{name}: `raw_gates` must have shape {layout}, got {shape}.")
    batch, length, blocks = shape[0], shape[1], shape[-1]
    order = shape[-2] - 1
    if min(batch, length, order, blocks) < 1:
        raise ValueError(f"{name}: `raw_gates` must have B, T, M and N of at least 1 in {layout}, got {shape}.")
    wanted = {
        "values": ("(B, T, M, N)", (batch, length, order, blocks)) if block else ("(B, T, N)", (batch, length, blocks)),
        "initial_state": ("(B, M, N)", (batch, order, blocks)),
        "reset": ("(B, T)", (batch, length)),
    }
    given = {"values": values, "initial_state": initial_state, "reset": reset}
    if reset is not None and (not isinstance(reset, Tensor) or reset.dtype != torch.bool):
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"{name}: `reset` must be a bool tensor, got {kind}.")
    for argument, tensor in given.items():
        axes, expected = wanted[argument]
        if tensor is not None and tuple(tensor.shape) != expected:
            got = tuple(tensor.shape)
            raise ValueError(
                f"{name}: `{argument}` must have shape {axes} = {expected} to match `raw_gates`, got {got}."
            )
    if reset is not None and reset.device != raw_gates.device:
        raise TypeError(f"{name}: `reset` must be on {raw_gates.device} like `raw_gates`, got {reset.device}.")
    return order
