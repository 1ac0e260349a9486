"""The kernels of the companion and the observer scan, forward and backward: O(M) work for a channel and step.

A program is one warp and carries BLOCK_N channels through a chunk of time. What a step reads is loaded AHEAD steps
before, as in block.py. OBSERVER says which of the two recurrences runs:

    companion   h_t = sum_j p_j h_{t-1-j} + p_M v_t; the state is the last M values, the newest first
    observer    h'[j] = p_j h[0] + h[j+1], and p_M v_t besides in h'[0]

Backward of the companion, with s the adjoint of h_t: dL/dz[j] = s d_j (u_j - g_j h_t) with u_j = h_{t-1-j} or v_t. Of
the observer, with s[j] the adjoint of h'[j]: dL/dz[j] = d_j (D_j - g_j sum_l p_l D_l) with D_j = s[j] h[0] or s[0] v_t.
"""

# mypy: ignore-errors, because what triton compiles is no Python
# ruff: noqa: RUF005, SIM108 (triton compiles no `[*x, y]`, and no list in a conditional expression)

import triton
import triton.language as tl

from statemix.scan.gpu.weights import as_float, cleared, load_list, store_list, weigh, where_all


@triton.jit
def load_step(
    gates,
    values,
    reset,
    there,
    inside,
    M: tl.constexpr,
    N: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """M + 1 raw gates, the value (or VALUES of them), and the reset."""
    loaded = []
    for j in tl.static_range(M + 1):
        loaded = loaded + [tl.load(gates + j * N, mask=inside & there, other=0.0)]
    for i in tl.static_range(VALUES):
        loaded = loaded + [tl.load(values + i * N, mask=inside & there, other=0.0)]
    if HAS_RESET:
        loaded = loaded + [tl.load(reset, mask=there, other=0)]
    return loaded


@triton.jit
def lagged_forward(
    raw_gates_ptr,
    values_ptr,
    carry_ptr,
    reset_ptr,
    states_ptr,
    residual_ptr,
    final_state_ptr,
    length,
    chunk_size,
    gate_batch_stride,
    gate_time_stride,
    value_batch_stride,
    value_time_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    OBSERVER: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The states of one chunk.

    Pointers: raw_gates (B, T, M+1, N) and values (B, T, N) by their strides, carry (B, C, M, N): the state that enters
    each chunk, reset (B, T), states and residual (B, T, N) or (B, T, M, N), final_state (B, M, N). Grid:
    (N / BLOCK_N, B, C).
    """
    SHOWN: tl.constexpr = M if OBSERVER else 1
    LOADS: tl.constexpr = M + 2 + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gates = raw_gates_ptr + batch * gate_batch_stride + n
    values = values_ptr + batch * value_batch_stride + n
    resets = reset_ptr + batch * length
    written = (batch * length) * (SHOWN * N) + n

    state = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, inside, M)
    queue = []
    for ahead in tl.static_range(AHEAD):
        time = tl.cast(begin + ahead, tl.int64)
        gates_at, values_at = gates + time * gate_time_stride, values + time * value_time_stride
        queue = queue + load_step(gates_at, values_at, resets + time, time < end, inside, M, N, 1, HAS_RESET)
    for t in tl.range(begin, end, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            time = tl.cast(t + step + AHEAD, tl.int64)
            gates_at, values_at = gates + time * gate_time_stride, values + time * value_time_stride
            queue = queue + load_step(gates_at, values_at, resets + time, time < end, inside, M, N, 1, HAS_RESET)

            now = tl.cast(t + step, tl.int64)
            loaded, queue = queue[:LOADS], queue[LOADS:]
            entering = state
            if HAS_RESET:
                entering = cleared(loaded[M + 2] != 0, state)
            p, _, _ = weigh(as_float(loaded[: M + 1]), M + 1, NORMALIZATION, False)
            made = p[M] * loaded[M + 1].to(tl.float32)
            if OBSERVER:
                leaving = []
                for j in tl.static_range(M):
                    component = p[j] * entering[0]
                    if j == 0:
                        component += made
                    if j + 1 < M:
                        component += entering[j + 1]
                    leaving = leaving + [component]
            else:
                for j in tl.static_range(M):
                    made += p[j] * entering[j]
                leaving = [made] + entering[: M - 1]
            for i in tl.static_range(SHOWN):
                rounded = leaving[i].to(states_ptr.dtype.element_ty)
                offset = written + now * (SHOWN * N) + i * N
                tl.store(states_ptr + offset, rounded, mask=inside & (now < end))
                if HAS_RESIDUAL:
                    residual = (leaving[i] - rounded.to(tl.float32)).to(residual_ptr.dtype.element_ty)
                    tl.store(residual_ptr + offset, residual, mask=inside & (now < end))
            state = where_all(now < end, leaving, state, M)
    if end == length:
        store_list(final_state_ptr + batch * (M * N) + n, N, inside, state, M)


@triton.jit
def _load_backward(
    gates,
    values,
    reset,
    grad_states,
    states,
    residual,
    initial_state,
    time,
    begin,
    inside,
    M: tl.constexpr,
    N: tl.constexpr,
    OBSERVER: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """As `load_step` at `time`, then the gradient of the states, and what the walk back meets for the first time.

    That is the state of M steps before (observer: of one) from the states or the initial state, and the reset after it.
    """
    there = time >= begin
    loaded = load_step(gates, values, reset, there, inside, M, N, 1, False)
    for i in tl.static_range(M if OBSERVER else 1):
        loaded = loaded + [tl.load(grad_states + i * N, mask=inside & there, other=0.0)]
    old = time - (1 if OBSERVER else M)
    offset = old * ((M if OBSERVER else 1) * N)
    loaded = loaded + [tl.load(states + offset, mask=inside & there & (old >= 0), other=0.0)]
    if HAS_RESIDUAL:
        loaded = loaded + [tl.load(residual + offset, mask=inside & there & (old >= 0), other=0.0)]
    loaded = loaded + [tl.load(initial_state - (old + 1) * N, mask=inside & there & (old < 0), other=0.0)]
    if HAS_RESET:
        loaded = loaded + [tl.load(reset + old + 1, mask=there & (old + 1 >= 0), other=0)]
    return loaded


@triton.jit
def _first_window(
    states, residual, initial_state, end, inside, M: tl.constexpr, N: tl.constexpr, RESIDUAL: tl.constexpr
):
    """The states of the M steps before `end`, newest first."""
    window = []
    for lag in tl.static_range(M):
        time = tl.cast(end - 1 - lag, tl.int64)
        state = tl.load(states + time * N, mask=inside & (time >= 0), other=0.0).to(tl.float32)
        if RESIDUAL:
            state += tl.load(residual + time * N, mask=inside & (time >= 0), other=0.0).to(tl.float32)
        initial = tl.load(initial_state - (time + 1) * N, mask=inside & (time < 0), other=0.0)
        window = window + [tl.where(time < 0, initial, state)]
    return window


@triton.jit
def _add_shown(adjoint, grads, M: tl.constexpr, SHOWN: tl.constexpr):
    """The adjoint with the gradient of those components that the scan returns."""
    whole = []
    for i in tl.static_range(M):
        if i < SHOWN:
            whole = whole + [adjoint[i] + grads[i].to(tl.float32)]
        else:
            whole = whole + [adjoint[i]]
    return whole


@triton.jit
def lagged_backward(
    raw_gates_ptr,
    values_ptr,
    initial_state_ptr,
    reset_ptr,
    states_ptr,
    residual_ptr,
    grad_states_ptr,
    carry_ptr,
    grad_raw_gates_ptr,
    grad_values_ptr,
    grad_initial_state_ptr,
    length,
    chunk_size,
    gate_batch_stride,
    gate_time_stride,
    value_batch_stride,
    value_time_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    OBSERVER: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The gradients of one chunk, from its last step to its first.

    Pointers: as `lagged_forward`, and initial_state and grad_initial_state (B, M, N), grad_states as the states, carry
    (B, C, M, N): what later chunks hand back to the state that leaves each chunk, and the dense gradients. Same grid.
    """
    SHOWN: tl.constexpr = M if OBSERVER else 1
    OLD: tl.constexpr = M + 2 + SHOWN  # where the old state is among the loaded, then its residual
    LOADS: tl.constexpr = OLD + 2 + HAS_RESIDUAL + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gates = raw_gates_ptr + batch * gate_batch_stride + n
    values = values_ptr + batch * value_batch_stride + n
    resets = reset_ptr + batch * length
    state_like = (batch * length) * (SHOWN * N) + n
    states, residual = states_ptr + state_like, residual_ptr + state_like
    initial_state = initial_state_ptr + batch * (M * N) + n
    grad_gates = grad_raw_gates_ptr + (batch * length) * ((M + 1) * N) + n
    grad_values = grad_values_ptr + (batch * length) * N + n

    adjoint = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, inside, M)
    window, recent = [], []  # companion: h_t, ..., h_{t-M+1}, and the resets of t, ..., t-M+2
    if not OBSERVER:
        window = _first_window(states, residual, initial_state, end, inside, M, N, HAS_RESIDUAL)
        if HAS_RESET:
            for lag in tl.static_range(M - 1):
                recent = recent + [tl.load(resets + end - 1 - lag, mask=end - 1 - lag >= 0, other=0)]
    queue = []
    for ahead in tl.static_range(AHEAD):
        time = tl.cast(end - 1 - ahead, tl.int64)
        queue = queue + _load_backward(
            gates + time * gate_time_stride,
            values + time * value_time_stride,
            resets,
            grad_states_ptr + state_like + time * (SHOWN * N),
            states,
            residual,
            initial_state,
            time,
            begin,
            inside,
            M,
            N,
            OBSERVER,
            HAS_RESET,
            HAS_RESIDUAL,
        )
    for r in tl.range(0, end - begin, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            time = tl.cast(end - 1 - AHEAD - r - step, tl.int64)
            queue = queue + _load_backward(
                gates + time * gate_time_stride,
                values + time * value_time_stride,
                resets,
                grad_states_ptr + state_like + time * (SHOWN * N),
                states,
                residual,
                initial_state,
                time,
                begin,
                inside,
                M,
                N,
                OBSERVER,
                HAS_RESET,
                HAS_RESIDUAL,
            )
            now = tl.cast(end - 1 - r - step, tl.int64)
            loaded, queue = queue[:LOADS], queue[LOADS:]
            p, d, g = weigh(as_float(loaded[: M + 1]), M + 1, NORMALIZATION, True)
            value = loaded[M + 1].to(tl.float32)
            old = loaded[OLD].to(tl.float32)
            if HAS_RESIDUAL:
                old += loaded[OLD + 1].to(tl.float32)
            old = tl.where(now < (1 if OBSERVER else M), loaded[OLD + 1 + HAS_RESIDUAL], old)
            window = window + [old]
            if HAS_RESET:
                recent = recent + [loaded[LOADS - 1]]
            s = _add_shown(adjoint, loaded[M + 2 : OLD], M, SHOWN)

            gradients = []
            if OBSERVER:
                top = window[0]
                if HAS_RESET:
                    top = tl.where(recent[0] != 0, 0.0, top)
                slopes = [y * top for y in s] + [s[0] * value]  # dL/dp
                mean = p[M] * slopes[M]
                for j in tl.static_range(M):
                    mean += p[j] * slopes[j]
                for j in tl.static_range(M + 1):
                    gradients = gradients + [d[j] * (slopes[j] - g[j] * mean)]
                handed = p[0] * s[0]
                for j in tl.static_range(1, M):
                    handed += p[j] * s[j]
                handed = [handed] + s[: M - 1]
            else:
                handed = []
                is_cut = now < 0  # whether a reset lies between the lag and now
                for j in tl.static_range(M):
                    u = window[1 + j]
                    if HAS_RESET:
                        is_cut = (recent[j] != 0) | is_cut
                        u = tl.where(is_cut, 0.0, u)
                    gradients = gradients + [s[0] * d[j] * (u - g[j] * window[0])]
                    if j + 1 < M:
                        handed = handed + [p[j] * s[0] + s[j + 1]]
                    else:
                        handed = handed + [p[j] * s[0]]
                gradients = gradients + [s[0] * d[M] * (value - g[M] * window[0])]
            mask = inside & (now >= begin)
            store_list(grad_gates + now * ((M + 1) * N), N, mask, gradients, M + 1)
            store_list(grad_values + now * N, N, mask, [s[0] * p[M]], 1)
            if HAS_RESET:
                handed = cleared(recent[0] != 0, handed)
                recent = recent[1:]
            adjoint = where_all(now >= begin, handed, adjoint, M)
            window = window[1:]
    if begin == 0:
        store_list(grad_initial_state_ptr + batch * (M * N) + n, N, inside, adjoint, M)
