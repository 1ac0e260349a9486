"""The kernels of the block scan for M 1 and 2, forward and backward, with lanes that take steps side by side.

There a step has so little to do that a warp which takes one after the other waits for itself longer than for memory.
A program carries BLOCK_N blocks through a chunk of time (all of it, unless the scan is chunked), STEPS steps at a time:
a tile of (STEPS, BLOCK_N) lanes over several warps. It makes all weights of a tile at once, composes the maps
h -> A h + x along the tile in log-depth, and applies them to the state that entered it. Tiles are loaded STAGES - 1
tiles before they are used, through shared memory.

Backward: what step t hands back, c_t = A_t^T (dL/dh_t + c_{t+1}), is composed in the same way from the last step, and
dL/dh_t + c_{t+1} is the adjoint s_t of block.py. h_t is computed again from h_{t-1}: the states are read once.
"""

# mypy: ignore-errors, because what triton compiles is no Python
# ruff: noqa: RUF005 (triton compiles no `[*x, y]`)

import triton
import triton.language as tl

from statemix.scan.gpu.weights import cleared, load_list, store_list, weigh


@triton.jit
def _then_1(a, x, b, y):
    """h -> b (a h + x) + y."""
    return b * a, b * x + y


@triton.jit
def _then_2(a, b, c, d, x, y, e, f, g, h, z, w):
    """The map ((e, f), (g, h)), (z, w) after ((a, b), (c, d)), (x, y)."""
    return e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d, e * x + f * y + z, g * x + h * y + w


@triton.jit
def _composed(matrix, offset, M: tl.constexpr, REVERSE: tl.constexpr):
    """Of each step, the map from the state that enters the tile; from its other end if REVERSE.

    Lists of M x M and of M tiles, [i * M + j] carrying old component j to new component i.
    """
    if M == 1:
        a, x = tl.associative_scan((matrix[0], offset[0]), 0, _then_1, reverse=REVERSE)
        return [a], [x]
    else:
        tl.static_assert(M == 2)
        maps = (matrix[0], matrix[1], matrix[2], matrix[3], offset[0], offset[1])
        a, b, c, d, x, y = tl.associative_scan(maps, 0, _then_2, reverse=REVERSE)
        return [a, b, c, d], [x, y]


@triton.jit
def _applied(matrix, offset, state, M: tl.constexpr):
    """The maps applied to a state of M components, each (1, BLOCK_N)."""
    applied = []
    for i in tl.static_range(M):
        row = offset[i]
        for j in tl.static_range(M):
            row += matrix[i * M + j] * state[j]
        applied = applied + [row]
    return applied


@triton.jit
def _at(x, step, which, M: tl.constexpr):
    """Step `which` of M tiles, each (1, BLOCK_N)."""
    components = []
    for i in tl.static_range(M):
        components = components + [tl.sum(tl.where(step == which, x[i], 0.0), axis=0, keep_dims=True)]
    return components


@triton.jit
def _inside(n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which lanes have a block, (1, BLOCK_N)."""
    if N % BLOCK_N == 0:
        return tl.full((1, BLOCK_N), True, tl.int1)  # a constant: no mask is computed
    else:
        return n < N


@triton.jit
def tile_forward(
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
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """As `block_forward`, with its pointers and its grid."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    step = tl.arange(0, STEPS)[:, None]
    inside = _inside(n, N, BLOCK_N)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gate_stride, value_stride = tl.cast(gate_time_stride, tl.int64), tl.cast(value_time_stride, tl.int64)
    gates = raw_gates_ptr + batch * gate_batch_stride + (begin + step) * gate_stride + n
    values = values_ptr + batch * value_batch_stride + (begin + step) * value_stride + n
    rows = (batch * length + begin + step) * (M * N) + n
    states, residual = states_ptr + rows, residual_ptr + rows
    resets = reset_ptr + batch * length + begin + step

    state = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, n < N, M)
    for t in tl.range(begin, end, STEPS, num_stages=STAGES):
        there = t + step < end
        mask = inside & there
        matrix, offset = [], []
        for i in tl.static_range(M):
            z = load_list(gates + i * ((M + 1) * N), N, mask, M + 1)
            p, _, _ = weigh(z, M + 1, NORMALIZATION, False)
            matrix = matrix + p[:M]
            offset = offset + [p[M] * tl.load(values + i * N, mask=mask, other=0.0).to(tl.float32)]
        if HAS_RESET:
            matrix = cleared(tl.load(resets, mask=there, other=0) != 0, matrix)
        matrix, offset = _composed(matrix, offset, M, False)
        h = _applied(matrix, offset, state, M)
        for i in tl.static_range(M):
            rounded = h[i].to(states_ptr.dtype.element_ty)
            tl.store(states + i * N, rounded, mask=mask)
            if HAS_RESIDUAL:
                left = (h[i] - rounded.to(tl.float32)).to(residual_ptr.dtype.element_ty)
                tl.store(residual + i * N, left, mask=mask)
        state = _at(h, step, tl.minimum(STEPS, end - t) - 1, M)
        gates += STEPS * gate_stride
        values += STEPS * value_stride
        states += STEPS * (M * N)
        residual += STEPS * (M * N)
        resets += STEPS
    if end == length:
        store_list(final_state_ptr + batch * (M * N) + n, N, n < N, state, M)


@triton.jit
def tile_backward(
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
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """As `block_backward`, with its pointers and its grid."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    step = tl.arange(0, STEPS)[:, None]
    inside = _inside(n, N, BLOCK_N)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    tiles = (end - begin + STEPS - 1) // STEPS
    last = begin + (tiles - 1) * STEPS  # where the last tile begins
    time = tl.cast(last + step, tl.int64)
    gate_stride, value_stride = tl.cast(gate_time_stride, tl.int64), tl.cast(value_time_stride, tl.int64)
    gates = raw_gates_ptr + batch * gate_batch_stride + time * gate_stride + n
    values = values_ptr + batch * value_batch_stride + time * value_stride + n
    rows = (batch * length + time) * (M * N) + n
    states, residual = states_ptr + rows - M * N, residual_ptr + rows - M * N  # of the step before
    grad_states, grad_values = grad_states_ptr + rows, grad_values_ptr + rows
    grad_gates = grad_raw_gates_ptr + (batch * length + time) * (M * (M + 1) * N) + n
    resets = reset_ptr + batch * length + time
    next_step = tl.broadcast_to(tl.minimum(step + 1, STEPS - 1), (STEPS, BLOCK_N))

    first = load_list(initial_state_ptr + batch * (M * N) + n, N, n < N, M)
    carry = load_list(carry_ptr + (batch * tl.num_programs(2) + chunk) * (M * N) + n, N, n < N, M)
    for r in tl.range(0, tiles, num_stages=STAGES):
        now = last - r * STEPS + step
        mask = inside & (now < end)
        u = load_list(states, N, mask & (now > 0), M)
        if HAS_RESIDUAL:
            left = load_list(residual, N, mask & (now > 0), M)
            for i in tl.static_range(M):
                u = u[1:] + [u[0] + left[i]]
        for i in tl.static_range(M):
            u = u[1:] + [tl.where(now == 0, first[i], u[0])]
        v = load_list(values, N, mask, M)
        s = load_list(grad_states, N, mask, M)
        p, d, g = [], [], []  # of all rows, [i * (M + 1) + j]
        for i in tl.static_range(M):
            z = load_list(gates + i * ((M + 1) * N), N, mask, M + 1)
            weights, slopes, signs = weigh(z, M + 1, NORMALIZATION, True)
            p, d, g = p + weights, d + slopes, g + signs
        transposed = []  # the identity past the end
        for j in tl.static_range(M):
            for i in tl.static_range(M):
                transposed = transposed + [tl.where(now < end, p[i * (M + 1) + j], 1.0 if i == j else 0.0)]
        if HAS_RESET:
            is_cut = tl.load(resets, mask=now < end, other=0) != 0
            u, transposed = cleared(is_cut, u), cleared(is_cut, transposed)
        offset = []
        for j in tl.static_range(M):
            part = transposed[j * M] * s[0]
            for i in tl.static_range(1, M):
                part += transposed[j * M + i] * s[i]
            offset = offset + [part]
        matrix, offset = _composed(transposed, offset, M, True)
        handed = _applied(matrix, offset, carry, M)
        for i in tl.static_range(M):
            adjoint = s[i] + tl.where(step == STEPS - 1, carry[i], tl.gather(handed[i], next_step, 0))
            h = p[i * (M + 1) + M] * v[i]
            for j in tl.static_range(M):
                h += p[i * (M + 1) + j] * u[j]
            entering = u + [v[i]]
            gradients = []
            for j in tl.static_range(M + 1):
                slope = d[i * (M + 1) + j]
                gradients = gradients + [adjoint * slope * (entering[j] - g[i * (M + 1) + j] * h)]
            store_list(grad_gates + i * ((M + 1) * N), N, mask, gradients, M + 1)
            store_list(grad_values + i * N, N, mask, [adjoint * p[i * (M + 1) + M]], 1)
        carry = _at(handed, step, 0, M)
        gates -= STEPS * gate_stride
        values -= STEPS * value_stride
        states -= STEPS * (M * N)
        residual -= STEPS * (M * N)
        grad_states -= STEPS * (M * N)
        grad_values -= STEPS * (M * N)
        grad_gates -= STEPS * (M * (M + 1) * N)
        resets -= STEPS
    if begin == 0:
        store_list(grad_initial_state_ptr + batch * (M * N) + n, N, n < N, carry, M)
