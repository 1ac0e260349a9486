"""The kernels of the block scan, forward and backward.

A program is one warp. It carries BLOCK_N blocks through a chunk of time (all of it, unless the scan is chunked): a tile
of (GROUPS, BLOCK_N) lanes, where lane (g, n) has the rows g, g + GROUPS, ... of block n: of each of them the M + 1 raw
gates and the value, one vector each, which neighbouring lanes read from neighbouring places. The state has M components
of shape (1, BLOCK_N), which all lanes of a block hold; the rows are sent to them by shuffles.

What step t reads is loaded AHEAD steps before, into a list that moves on by one step at a time; the loop is unrolled
AHEAD times, so that it moves by renaming only. No load of that loop asks whether its step exists: the last ones read
the last steps again. What does not fill AHEAD steps follows, one by one.

Backward: with the adjoint s_t = dL/dh_t + A_{t+1}^T s_{t+1}, in the notation of `weigh`,
    dL/dz[i, j] = s[i] d[i, j] (u_j - g[i, j] h_t[i]),  dL/dv[i] = s[i] p[i, M],
where u_j = h_{t-1}[j], or v_t[i] for the input gate. In bfloat16 the states that are kept for it are two tensors: what
the scan returns, and the residual that rounding left.
"""

# mypy: ignore-errors, because what triton compiles is no Python
# ruff: noqa: RUF005, SIM108 (triton compiles no `[*x, y]`, and no list in a conditional expression)

import triton
import triton.language as tl

from statemix.scan.gpu.weights import as_float, cleared, load_list, store_list, weigh


@triton.jit
def lanes_inside(n, group, N: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """Which lanes have a block, (GROUPS, BLOCK_N)."""
    if N % BLOCK_N == 0:
        return tl.full((GROUPS, BLOCK_N), True, tl.int1)  # a constant: loads and stores have no mask
    else:
        return (n < N) & (group < GROUPS)


@triton.jit
def _has_row(inside, group, k: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr):
    """Which lanes have a row k."""
    if (k + 1) * GROUPS <= M:
        return inside
    else:
        return inside & (k * GROUPS + group < M)


@triton.jit
def send_rows(rows, group, M: tl.constexpr, GROUPS: tl.constexpr):
    """Rows, each (GROUPS, BLOCK_N), to the M components, each (1, BLOCK_N), in all lanes of a block."""
    components = []
    for i in tl.static_range(M):
        if GROUPS == 1:
            components = components + [rows[i]]
        else:
            owner = tl.full((1, rows[0].shape[1]), i % GROUPS, tl.int32)
            components = components + [tl.gather(rows[i // GROUPS], owner, 0)]
    return components


@triton.jit
def _own(components, group, k: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr):
    """Row k of each lane, (GROUPS, BLOCK_N), out of the M components; zero beyond M."""
    row = components[k * GROUPS] + tl.zeros(group.shape, tl.float32)
    for g in tl.static_range(1, GROUPS):
        if k * GROUPS + g < M:
            row = tl.where(group == g, components[k * GROUPS + g], row)
        else:
            row = tl.where(group == g, 0.0, row)
    return row


@triton.jit
def load_gates(gates, values, inside, group, M: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr):
    """Of each row of a lane: M + 1 raw gates and the value."""
    loaded = []
    for k in tl.static_range((M + GROUPS - 1) // GROUPS):
        mask = _has_row(inside, group, k, M, GROUPS)
        for j in tl.static_range(M + 1):
            loaded = loaded + [tl.load(gates + (k * GROUPS * (M + 1) + j) * N, mask=mask, other=0.0)]
        loaded = loaded + [tl.load(values + k * GROUPS * N, mask=mask, other=0.0)]
    return loaded


@triton.jit
def _load_rows(at, inside, group, M: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr):
    """One number of each row of a lane."""
    loaded = []
    for k in tl.static_range((M + GROUPS - 1) // GROUPS):
        loaded = loaded + [tl.load(at + k * GROUPS * N, mask=_has_row(inside, group, k, M, GROUPS), other=0.0)]
    return loaded


@triton.jit
def _load_forward(
    gates,
    values,
    reset,
    there,
    inside,
    group,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """What one step of the forward reads: as `load_gates`, then the reset."""
    loaded = load_gates(gates, values, inside & there, group, M, N, GROUPS)
    if HAS_RESET:
        loaded = loaded + [tl.load(reset, mask=there, other=0)]
    return loaded


@triton.jit
def _load_backward(
    gates,
    values,
    grad_states,
    states_before,
    residual_before,
    reset,
    there,
    has_before,
    inside,
    group,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """What one step of the backward reads: as `load_gates`, then the gradient of the states, the state before, ..."""
    loaded = load_gates(gates, values, inside & there, group, M, N, GROUPS)
    loaded = loaded + _load_rows(grad_states, inside & there, group, M, N, GROUPS)
    loaded = loaded + _load_rows(states_before, inside & there & has_before, group, M, N, GROUPS)
    if HAS_RESIDUAL:
        loaded = loaded + _load_rows(residual_before, inside & there & has_before, group, M, N, GROUPS)
    if HAS_RESET:
        loaded = loaded + [tl.load(reset, mask=there, other=0)]
    return loaded


@triton.jit
def _step_forward(
    loaded,
    state,
    states,
    residual,
    inside,
    group,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The state after a step, which is written to where `states` and `residual` point."""
    ROWS: tl.constexpr = (M + GROUPS - 1) // GROUPS
    GATES: tl.constexpr = M + 2  # with the value
    entering = state
    if HAS_RESET:
        entering = cleared(loaded[ROWS * GATES] != 0, state)
    rows = []
    for k in tl.static_range(ROWS):
        z = as_float(loaded[k * GATES : k * GATES + M + 1])
        p, _, _ = weigh(z, M + 1, NORMALIZATION, False)
        row = p[M] * loaded[k * GATES + M + 1].to(tl.float32)
        for j in tl.static_range(M):
            row += p[j] * entering[j]
        rows = rows + [row]
        mask = _has_row(inside, group, k, M, GROUPS)
        rounded = row.to(states.dtype.element_ty)
        tl.store(states + k * GROUPS * N, rounded, mask=mask)
        if HAS_RESIDUAL:
            left = (row - rounded.to(tl.float32)).to(residual.dtype.element_ty)
            tl.store(residual + k * GROUPS * N, left, mask=mask)
    return send_rows(rows, group, M, GROUPS)


@triton.jit
def block_forward(
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
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """h_t[i] = sum_j p_t[i, j] h_{t-1}[j] + p_t[i, M] v_t[i] over the steps of one chunk.

    Pointers: raw_gates (B, T, M, M+1, N) and values (B, T, M, N) by their strides, carry (B, C, M, N): the state that
    enters each chunk, reset (B, T), states and residual (B, T, M, N), final_state (B, M, N). Grid: (N / BLOCK_N, B, C).
    """
    LOADS: tl.constexpr = (M + GROUPS - 1) // GROUPS * (M + 2) + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    inside = lanes_inside(n, group, N, BLOCK_N, GROUPS)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    whole = (end - begin) // STEPS * STEPS
    gate_stride, value_stride = tl.cast(gate_time_stride, tl.int64), tl.cast(value_time_stride, tl.int64)
    gates = raw_gates_ptr + batch * gate_batch_stride + begin * gate_stride + group * ((M + 1) * N) + n
    values = values_ptr + batch * value_batch_stride + begin * value_stride + group * N + n
    resets = reset_ptr + batch * length + begin
    rows = (batch * length + begin) * (M * N) + group * N + n
    states, residual = states_ptr + rows, residual_ptr + rows

    state = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, n < N, M)
    queue = []
    for step in tl.static_range(AHEAD):
        at, value_at = gates + step * gate_stride, values + step * value_stride
        queue = queue + _load_forward(at, value_at, resets + step, whole > 0, inside, group, M, N, GROUPS, HAS_RESET)
    for t in tl.range(0, whole, STEPS, num_stages=1):
        now, later = tl.cast(t, tl.int64), tl.cast(tl.minimum(t + AHEAD, whole - STEPS), tl.int64)
        for step in tl.static_range(STEPS):
            queue = queue + _load_forward(
                gates + later * gate_stride + step * gate_stride,
                values + later * value_stride + step * value_stride,
                resets + later + step,
                True,
                inside,
                group,
                M,
                N,
                GROUPS,
                HAS_RESET,
            )
            loaded, queue = queue[:LOADS], queue[LOADS:]
            state = _step_forward(
                loaded,
                state,
                states + now * (M * N) + step * (M * N),
                residual + now * (M * N) + step * (M * N),
                inside,
                group,
                M,
                N,
                GROUPS,
                NORMALIZATION,
                HAS_RESET,
                HAS_RESIDUAL,
            )
    if STEPS > 1:
        for t in tl.range(whole, end - begin, num_stages=1):
            now = tl.cast(t, tl.int64)
            at, value_at = gates + now * gate_stride, values + now * value_stride
            loaded = _load_forward(at, value_at, resets + now, True, inside, group, M, N, GROUPS, HAS_RESET)
            state = _step_forward(
                loaded,
                state,
                states + now * (M * N),
                residual + now * (M * N),
                inside,
                group,
                M,
                N,
                GROUPS,
                NORMALIZATION,
                HAS_RESET,
                HAS_RESIDUAL,
            )
    if end == length:
        store_list(final_state_ptr + batch * (M * N) + n, N, n < N, state, M)


@triton.jit
def _step_backward(
    loaded,
    adjoint,
    state,
    first,
    is_first,
    grad_gates,
    grad_values,
    inside,
    group,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Write the gradients of a step; the adjoint of the state before it, and the rows of that state."""
    ROWS: tl.constexpr = (M + GROUPS - 1) // GROUPS
    GATES: tl.constexpr = M + 2
    AFTER: tl.constexpr = ROWS * GATES  # where the gradient of the states begins, then the state before, its residual
    RESET: tl.constexpr = AFTER + ROWS * (2 + HAS_RESIDUAL)
    before = []
    for k in tl.static_range(ROWS):
        row = loaded[AFTER + ROWS + k].to(tl.float32)
        if HAS_RESIDUAL:
            row += loaded[AFTER + 2 * ROWS + k].to(tl.float32)
        before = before + [tl.where(is_first, first[k], row)]
    entering = before
    if HAS_RESET:
        entering = cleared(loaded[RESET] != 0, before)
    u = send_rows(entering, group, M, GROUPS)

    parts = []  # of the adjoint of the state before, from the rows of this lane
    for k in tl.static_range(ROWS):
        mask = _has_row(inside, group, k, M, GROUPS)
        z = as_float(loaded[k * GATES : k * GATES + M + 1])
        p, d, g = weigh(z, M + 1, NORMALIZATION, True)
        value = loaded[k * GATES + M + 1].to(tl.float32)
        s = _own(adjoint, group, k, M, GROUPS) + loaded[AFTER + k].to(tl.float32)
        gradients = []
        for j in tl.static_range(M):
            gradients = gradients + [s * d[j] * (u[j] - g[j] * state[k])]
            if k == 0:
                parts = parts + [s * p[j]]
            else:
                parts = parts[1:] + [parts[0] + s * p[j]]
        gradients = gradients + [s * d[M] * (value - g[M] * state[k])]
        store_list(grad_gates + k * GROUPS * ((M + 1) * N), N, mask, gradients, M + 1)
        store_list(grad_values + k * GROUPS * N, N, mask, [s * p[M]], 1)
    handed = parts
    if GROUPS > 1:
        handed = [tl.sum(part, axis=0, keep_dims=True) for part in parts]
    if HAS_RESET:
        handed = cleared(loaded[RESET] != 0, handed)
    return handed, before


@triton.jit
def block_backward(
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
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The gradients of one chunk, from its last step to its first.

    Pointers: as `block_forward`, and initial_state and grad_initial_state (B, M, N), grad_states (B, T, M, N), carry
    (B, C, M, N): what later chunks hand back to the state that leaves each chunk, and the dense gradients. Same grid.
    """
    ROWS: tl.constexpr = (M + GROUPS - 1) // GROUPS
    LOADS: tl.constexpr = ROWS * (M + 4 + HAS_RESIDUAL) + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    inside = lanes_inside(n, group, N, BLOCK_N, GROUPS)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    whole = (end - begin) // STEPS * STEPS
    # all of these point to the last step, the states to the one before it
    last = tl.cast(end - 1, tl.int64)
    gate_stride, value_stride = tl.cast(gate_time_stride, tl.int64), tl.cast(value_time_stride, tl.int64)
    gates = raw_gates_ptr + batch * gate_batch_stride + last * gate_stride + group * ((M + 1) * N) + n
    values = values_ptr + batch * value_batch_stride + last * value_stride + group * N + n
    resets = reset_ptr + batch * length + last
    rows = (batch * length + last) * (M * N) + group * N + n
    states, residual = states_ptr + rows - M * N, residual_ptr + rows - M * N
    grad_states, grad_values = grad_states_ptr + rows, grad_values_ptr + rows
    grad_gates = grad_raw_gates_ptr + (batch * length + last) * (M * (M + 1) * N) + group * ((M + 1) * N) + n

    adjoint = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, n < N, M)
    first = _load_rows(initial_state_ptr + batch * (M * N) + group * N + n, inside, group, M, N, GROUPS)
    state = as_float(_load_rows(states + M * N, inside, group, M, N, GROUPS))
    if HAS_RESIDUAL:
        left = _load_rows(residual + M * N, inside, group, M, N, GROUPS)
        for k in tl.static_range(ROWS):
            state = state[1:] + [state[0] + left[k].to(tl.float32)]
    queue = []
    for step in tl.static_range(AHEAD):
        queue = queue + _load_backward(
            gates - step * gate_stride,
            values - step * value_stride,
            grad_states - step * (M * N),
            states - step * (M * N),
            residual - step * (M * N),
            resets - step,
            whole > 0,
            last - step > 0,
            inside,
            group,
            M,
            N,
            GROUPS,
            HAS_RESET,
            HAS_RESIDUAL,
        )
    for r in tl.range(0, whole, STEPS, num_stages=1):
        now, later = tl.cast(r, tl.int64), tl.cast(tl.minimum(r + AHEAD, whole - STEPS), tl.int64)
        for step in tl.static_range(STEPS):
            queue = queue + _load_backward(
                gates - later * gate_stride - step * gate_stride,
                values - later * value_stride - step * value_stride,
                grad_states - later * (M * N) - step * (M * N),
                states - later * (M * N) - step * (M * N),
                residual - later * (M * N) - step * (M * N),
                resets - later - step,
                True,
                last - later - step > 0,
                inside,
                group,
                M,
                N,
                GROUPS,
                HAS_RESET,
                HAS_RESIDUAL,
            )
            loaded, queue = queue[:LOADS], queue[LOADS:]
            adjoint, state = _step_backward(
                loaded,
                adjoint,
                state,
                first,
                last - now - step == 0,
                grad_gates - now * (M * (M + 1) * N) - step * (M * (M + 1) * N),
                grad_values - now * (M * N) - step * (M * N),
                inside,
                group,
                M,
                N,
                GROUPS,
                NORMALIZATION,
                HAS_RESET,
                HAS_RESIDUAL,
            )
    if STEPS > 1:
        for r in tl.range(whole, end - begin, num_stages=1):
            now = tl.cast(r, tl.int64)
            loaded = _load_backward(
                gates - now * gate_stride,
                values - now * value_stride,
                grad_states - now * (M * N),
                states - now * (M * N),
                residual - now * (M * N),
                resets - now,
                True,
                last - now > 0,
                inside,
                group,
                M,
                N,
                GROUPS,
                HAS_RESET,
                HAS_RESIDUAL,
            )
            adjoint, state = _step_backward(
                loaded,
                adjoint,
                state,
                first,
                last - now == 0,
                grad_gates - now * (M * (M + 1) * N),
                grad_values - now * (M * N),
                inside,
                group,
                M,
                N,
                GROUPS,
                NORMALIZATION,
                HAS_RESET,
                HAS_RESIDUAL,
            )
    if begin == 0:
        store_list(grad_initial_state_ptr + batch * (M * N) + n, N, n < N, adjoint, M)
