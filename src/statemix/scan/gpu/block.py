"""The kernels of the block scan, forward and backward.

A program is one warp. It carries BLOCK_N blocks through a chunk of time (all of it, unless the scan is chunked): a tile
of (GROUPS, BLOCK_N) lanes, where lane (g, n) has the rows g, g + GROUPS, ... of block n: of each of them the M + 1 raw
gates and the value, one vector each, which neighbouring lanes read from neighbouring places. The state has M components
of shape (1, BLOCK_N), which all lanes of a block hold; the rows are sent to them by shuffles.

What step t reads is loaded AHEAD steps before, into a list that moves on by one step at a time; the loop is unrolled
AHEAD times, so that it moves by renaming only.

Backward: with the adjoint s_t = dL/dh_t + A_{t+1}^T s_{t+1}, in the notation of `weigh`,
    dL/dz[i, j] = s[i] d[i, j] (u_j - g[i, j] h_t[i]),  dL/dv[i] = s[i] p[i, M],
where u_j = h_{t-1}[j], or v_t[i] for the input gate. In bfloat16 the states that are kept for it are two tensors: what
the scan returns, and the residual that rounding left.
"""

# mypy: ignore-errors, because what triton compiles is no Python
# ruff: noqa: RUF005, SIM108 (triton compiles no `[*x, y]`, and no list in a conditional expression)

import triton
import triton.language as tl

from statemix.scan.gpu.weights import as_float, cleared, load_list, store_list, weigh, where_all


@triton.jit
def _send(rows, group, M: tl.constexpr, GROUPS: tl.constexpr):
    """Rows, each (GROUPS, BLOCK_N), to the M components, each (1, BLOCK_N), in all lanes of a block."""
    components = []
    for i in tl.static_range(M):
        if GROUPS == 1:
            components = components + [rows[i]]
        else:
            mine = tl.where(group == i % GROUPS, rows[i // GROUPS], 0.0)
            components = components + [tl.sum(mine, axis=0, keep_dims=True)]
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
def _load_gates(gates, values, inside, group, M: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr):
    """Of each row of a lane: M + 1 raw gates and the value."""
    loaded = []
    for k in tl.static_range((M + GROUPS - 1) // GROUPS):
        mask = inside & (k * GROUPS + group < M)
        for j in tl.static_range(M + 1):
            loaded = loaded + [tl.load(gates + (k * GROUPS * (M + 1) + j) * N, mask=mask, other=0.0)]
        loaded = loaded + [tl.load(values + k * GROUPS * N, mask=mask, other=0.0)]
    return loaded


@triton.jit
def _load_rows(at, inside, group, M: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr):
    """One number of each row of a lane."""
    loaded = []
    for k in tl.static_range((M + GROUPS - 1) // GROUPS):
        loaded = loaded + [tl.load(at + k * GROUPS * N, mask=inside & (k * GROUPS + group < M), other=0.0)]
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
    """What one step of the backward reads: as `_load_gates`, then the gradient of the states, the state before, ..."""
    loaded = _load_gates(gates, values, inside & there, group, M, N, GROUPS)
    loaded = loaded + _load_rows(grad_states, inside & there, group, M, N, GROUPS)
    loaded = loaded + _load_rows(states_before, inside & there & has_before, group, M, N, GROUPS)
    if HAS_RESIDUAL:
        loaded = loaded + _load_rows(residual_before, inside & there & has_before, group, M, N, GROUPS)
    if HAS_RESET:
        loaded = loaded + [tl.load(reset, mask=there, other=0)]
    return loaded


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
    ROWS: tl.constexpr = (M + GROUPS - 1) // GROUPS
    GATES: tl.constexpr = M + 2  # with the value
    LOADS: tl.constexpr = ROWS * GATES + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    inside = (n < N) & (group < GROUPS)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gates = raw_gates_ptr + batch * gate_batch_stride + group * ((M + 1) * N) + n
    values = values_ptr + batch * value_batch_stride + group * N + n
    written = (batch * length) * (M * N) + group * N + n

    state = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, n < N, M)
    queue = []
    for ahead in tl.static_range(AHEAD):
        time = tl.cast(begin + ahead, tl.int64)
        queue = queue + _load_gates(
            gates + time * gate_time_stride,
            values + time * value_time_stride,
            inside & (time < end),
            group,
            M,
            N,
            GROUPS,
        )
        if HAS_RESET:
            queue = queue + [tl.load(reset_ptr + batch * length + time, mask=time < end, other=0)]
    for t in tl.range(begin, end, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            time = tl.cast(t + step + AHEAD, tl.int64)
            queue = queue + _load_gates(
                gates + time * gate_time_stride,
                values + time * value_time_stride,
                inside & (time < end),
                group,
                M,
                N,
                GROUPS,
            )
            if HAS_RESET:
                queue = queue + [tl.load(reset_ptr + batch * length + time, mask=time < end, other=0)]

            now = tl.cast(t + step, tl.int64)
            loaded, queue = queue[:LOADS], queue[LOADS:]
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
                mask = inside & (k * GROUPS + group < M) & (now < end)
                rounded = row.to(states_ptr.dtype.element_ty)
                offset = written + now * (M * N) + k * GROUPS * N
                tl.store(states_ptr + offset, rounded, mask=mask)
                if HAS_RESIDUAL:
                    residual = (row - rounded.to(tl.float32)).to(residual_ptr.dtype.element_ty)
                    tl.store(residual_ptr + offset, residual, mask=mask)
            state = where_all(now < end, _send(rows, group, M, GROUPS), state, M)
    if end == length:
        store_list(final_state_ptr + batch * (M * N) + n, N, n < N, state, M)


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
    GATES: tl.constexpr = M + 2
    AFTER: tl.constexpr = ROWS * GATES  # where the gradient of the states begins, then the state before, its residual
    LOADS: tl.constexpr = AFTER + ROWS * (2 + HAS_RESIDUAL) + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    inside = (n < N) & (group < GROUPS)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gates = raw_gates_ptr + batch * gate_batch_stride + group * ((M + 1) * N) + n
    values = values_ptr + batch * value_batch_stride + group * N + n
    row_like = (batch * length) * (M * N) + group * N + n
    gate_like = (batch * length) * (M * (M + 1) * N) + group * ((M + 1) * N) + n

    adjoint = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, n < N, M)
    first = _load_rows(initial_state_ptr + batch * (M * N) + group * N + n, inside, group, M, N, GROUPS)
    last = row_like + tl.cast(end - 1, tl.int64) * (M * N)
    state = as_float(_load_rows(states_ptr + last, inside, group, M, N, GROUPS))
    if HAS_RESIDUAL:
        residual = _load_rows(residual_ptr + last, inside, group, M, N, GROUPS)
        for k in tl.static_range(ROWS):
            state = state[1:] + [state[0] + residual[k].to(tl.float32)]
    queue = []
    for ahead in tl.static_range(AHEAD):
        time = tl.cast(end - 1 - ahead, tl.int64)
        queue = queue + _load_backward(
            gates + time * gate_time_stride,
            values + time * value_time_stride,
            grad_states_ptr + row_like + time * (M * N),
            states_ptr + row_like + (time - 1) * (M * N),
            residual_ptr + row_like + (time - 1) * (M * N),
            reset_ptr + batch * length + time,
            time >= begin,
            time > 0,
            inside,
            group,
            M,
            N,
            GROUPS,
            HAS_RESET,
            HAS_RESIDUAL,
        )
    for r in tl.range(0, end - begin, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            time = tl.cast(end - 1 - AHEAD - r - step, tl.int64)
            queue = queue + _load_backward(
                gates + time * gate_time_stride,
                values + time * value_time_stride,
                grad_states_ptr + row_like + time * (M * N),
                states_ptr + row_like + (time - 1) * (M * N),
                residual_ptr + row_like + (time - 1) * (M * N),
                reset_ptr + batch * length + time,
                time >= begin,
                time > 0,
                inside,
                group,
                M,
                N,
                GROUPS,
                HAS_RESET,
                HAS_RESIDUAL,
            )
            now = tl.cast(end - 1 - r - step, tl.int64)
            loaded, queue = queue[:LOADS], queue[LOADS:]
            before = []
            for k in tl.static_range(ROWS):
                row = loaded[AFTER + ROWS + k].to(tl.float32)
                if HAS_RESIDUAL:
                    row += loaded[AFTER + 2 * ROWS + k].to(tl.float32)
                before = before + [tl.where(now == 0, first[k], row)]
            entering = before
            if HAS_RESET:
                entering = cleared(loaded[LOADS - 1] != 0, before)
            u = _send(entering, group, M, GROUPS)

            parts = []  # of the adjoint of the state before, from the rows of this lane
            for k in tl.static_range(ROWS):
                mask = inside & (k * GROUPS + group < M) & (now >= begin)
                z = as_float(loaded[k * GATES : k * GATES + M + 1])
                p, d, g = weigh(z, M + 1, NORMALIZATION, True)
                value = loaded[k * GATES + M + 1].to(tl.float32)
                s = _own(adjoint, group, k, M, GROUPS) + loaded[AFTER + k].to(tl.float32)
                offset = gate_like + now * (M * (M + 1) * N) + k * GROUPS * ((M + 1) * N)
                gradients = []
                for j in tl.static_range(M):
                    gradients = gradients + [s * d[j] * (u[j] - g[j] * state[k])]
                    if k == 0:
                        parts = parts + [s * p[j]]
                    else:
                        parts = parts[1:] + [parts[0] + s * p[j]]
                gradients = gradients + [s * d[M] * (value - g[M] * state[k])]
                store_list(grad_raw_gates_ptr + offset, N, mask, gradients, M + 1)
                store_list(grad_values_ptr + row_like + now * (M * N) + k * GROUPS * N, N, mask, [s * p[M]], 1)
            handed = parts
            if GROUPS > 1:
                handed = [tl.sum(part, axis=0, keep_dims=True) for part in parts]
            if HAS_RESET:
                handed = cleared(loaded[LOADS - 1] != 0, handed)
            adjoint = where_all(now >= begin, handed, adjoint, M)
            state = before
    if begin == 0:
        store_list(grad_initial_state_ptr + batch * (M * N) + n, N, n < N, adjoint, M)
