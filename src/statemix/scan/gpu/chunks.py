"""Chunks of time: what each chunk does to the state that enters it, and the relay of the states from chunk to chunk.

With the transitions A_1, ..., A_K of a chunk, the state that leaves it is P h + q: P = A_K ... A_1, and q is its state
from zero. A summary walks through every chunk but the last with the columns of P in registers, and a relay goes over
the chunks of a sequence, h <- P h + q, and keeps every h: the carry with which the scan then runs all chunks at once.

Backward: what a chunk hands back to the state before it is P^T s + q, with s what later chunks hand back and
q = sum_k (A_k ... A_1)^T dL/dh_k. These are the products that the same walk meets: ADJOINT reads the gradients of the
states in the place of values, and leaves out the first chunk in the place of the last. A map (P, q) is kept in float32
and laid out as raw gates are: (B, C - 1, M, M+1, N), [..., i, j, :] from component j to i, and q at j = M.
"""

# mypy: ignore-errors, because what triton compiles is no Python
# ruff: noqa: RUF005, SIM108 (triton compiles no `[*x, y]`, and no list in a conditional expression)

import triton
import triton.language as tl

from statemix.scan.gpu.block import lanes_inside, load_gates, send_rows
from statemix.scan.gpu.lagged import load_step
from statemix.scan.gpu.weights import as_float, cleared, load_list, store_list, weigh, where_all


@triton.jit
def _identity(column, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The M rows of the identity, each (COLUMNS, BLOCK_N)."""
    rows = []
    for i in tl.static_range(M):
        rows = rows + [tl.where(column == i, 1.0, 0.0) + tl.zeros((column.shape[0], BLOCK_N), tl.float32)]
    return rows


@triton.jit
def _zeros(COUNT: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """COUNT tiles (HEIGHT, BLOCK_N)."""
    tiles = []
    for _ in tl.static_range(COUNT):
        tiles = tiles + [tl.zeros((HEIGHT, BLOCK_N), tl.float32)]
    return tiles


@triton.jit
def _sent(x, g: tl.constexpr, GROUPS: tl.constexpr):
    """What the lanes of group g have of x, (1, BLOCK_N), in all lanes of a block."""
    if GROUPS == 1:
        return x
    else:
        return tl.gather(x, tl.full((1, x.shape[1]), g, tl.int32), 0)


@triton.jit
def _store_map(at, product, offset, column, inside, M: tl.constexpr, N: tl.constexpr, ADJOINT: tl.constexpr):
    """Store P and q, or P^T and q, whose offset is one tile over the columns."""
    for i in tl.static_range(M):
        if ADJOINT:
            place = column * ((M + 1) * N) + i * N
        else:
            place = i * ((M + 1) * N) + column * N
        tl.store(at + place, product[i], mask=inside & (column < M))
    if ADJOINT:
        tl.store(at + column * ((M + 1) * N) + M * N, offset[0], mask=inside & (column < M))
    else:
        store_list(at + M * N, (M + 1) * N, inside, offset, M)


@triton.jit
def block_summary(
    raw_gates_ptr,
    values_ptr,
    reset_ptr,
    maps_ptr,
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
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    ADJOINT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """The map of one chunk of the block scan.

    A row of P is a tile (COLUMNS, BLOCK_N), so that the lanes of a block share out its columns; they have the rows of
    raw gates as in `block_forward`, and send each other the weights.

    Pointers: raw_gates (B, T, M, M+1, N) and values (B, T, M, N), or the gradients of the states, by their strides,
    reset (B, T), maps. COLUMNS: a power of two, at least M. Grid: (N / BLOCK_N, B, C - 1).
    """
    ROWS: tl.constexpr = (M + GROUPS - 1) // GROUPS
    GATES: tl.constexpr = M + 2  # with the value
    LOADS: tl.constexpr = ROWS * GATES + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    OFFSETS: tl.constexpr = 1 if ADJOINT else M
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, COLUMNS)[:, None]
    inside = lanes_inside(n, group, N, BLOCK_N, GROUPS)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2) + (1 if ADJOINT else 0)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gates = raw_gates_ptr + batch * gate_batch_stride + group * ((M + 1) * N) + n
    values = values_ptr + batch * value_batch_stride + group * N + n

    product = _identity(column, M, BLOCK_N)
    offset = _zeros(OFFSETS, COLUMNS if ADJOINT else 1, BLOCK_N)
    queue = []
    for ahead in tl.static_range(AHEAD):
        time = tl.cast(tl.minimum(begin + ahead, end - 1), tl.int64)  # what is read beyond the end is not used
        gates_at, values_at = gates + time * gate_time_stride, values + time * value_time_stride
        queue = queue + load_gates(gates_at, values_at, inside, group, M, N, GROUPS)
        if HAS_RESET:
            queue = queue + [tl.load(reset_ptr + batch * length + time)]
    for t in tl.range(begin, end, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            time = tl.cast(tl.minimum(t + step + AHEAD, end - 1), tl.int64)
            gates_at, values_at = gates + time * gate_time_stride, values + time * value_time_stride
            queue = queue + load_gates(gates_at, values_at, inside, group, M, N, GROUPS)
            if HAS_RESET:
                queue = queue + [tl.load(reset_ptr + batch * length + time)]

            now = tl.cast(t + step, tl.int64)
            loaded, queue = queue[:LOADS], queue[LOADS:]
            entering, state = product, offset
            if HAS_RESET:
                entering = cleared(loaded[ROWS * GATES] != 0, product)
                if not ADJOINT:
                    state = cleared(loaded[ROWS * GATES] != 0, offset)
            weights, rows = [], []
            for k in tl.static_range(ROWS):
                p, _, _ = weigh(as_float(loaded[k * GATES : k * GATES + M + 1]), M + 1, NORMALIZATION, False)
                weights = weights + p
                row = loaded[k * GATES + M + 1].to(tl.float32)
                if not ADJOINT:
                    row *= p[M]
                    for j in tl.static_range(M):
                        row += p[j] * state[j]
                rows = rows + [row]
            components = send_rows(rows, group, M, GROUPS)  # of the state, or of its gradient
            leaving = []
            for i in tl.static_range(M):
                p = weights[(i // GROUPS) * (M + 1) : (i // GROUPS + 1) * (M + 1)]
                row = _sent(p[0], i % GROUPS, GROUPS) * entering[0]
                for j in tl.static_range(1, M):
                    row += _sent(p[j], i % GROUPS, GROUPS) * entering[j]
                leaving = leaving + [row]
            if ADJOINT:
                gathered = offset[0]
                for i in tl.static_range(M):
                    gathered += components[i] * leaving[i]
                components = [gathered]
            product = where_all(now < end, leaving, product, M)
            offset = where_all(now < end, components, offset, OFFSETS)
    slot = batch * tl.num_programs(2) + tl.program_id(2)
    _store_map(maps_ptr + slot * (M * (M + 1) * N) + n, product, offset, column, n < N, M, N, ADJOINT)


@triton.jit
def lagged_summary(
    raw_gates_ptr,
    values_ptr,
    reset_ptr,
    maps_ptr,
    length,
    chunk_size,
    gate_batch_stride,
    gate_time_stride,
    value_batch_stride,
    value_time_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    OBSERVER: tl.constexpr,
    ADJOINT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """The map of one chunk of the companion or the observer scan, as that of `block_summary`.

    Pointers: raw_gates (B, T, M+1, N) and values (B, T, N), or the gradients of the states, by their strides, reset,
    maps. Same grid.
    """
    SHOWN: tl.constexpr = M if OBSERVER and ADJOINT else 1  # of values, or gradients, of a step
    LOADS: tl.constexpr = M + 1 + SHOWN + HAS_RESET
    STEPS: tl.constexpr = max(AHEAD, 1)
    OFFSETS: tl.constexpr = 1 if ADJOINT else M
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    column = tl.arange(0, COLUMNS)[:, None]
    inside = n < N
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2) + (1 if ADJOINT else 0)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, length)
    gates = raw_gates_ptr + batch * gate_batch_stride + n
    values = values_ptr + batch * value_batch_stride + n
    resets = reset_ptr + batch * length

    product = _identity(column, M, BLOCK_N)
    offset = _zeros(OFFSETS, COLUMNS if ADJOINT else 1, BLOCK_N)
    queue = []
    for ahead in tl.static_range(AHEAD):
        time = tl.cast(begin + ahead, tl.int64)
        gates_at, values_at = gates + time * gate_time_stride, values + time * value_time_stride
        queue = queue + load_step(gates_at, values_at, resets + time, time < end, inside, M, N, SHOWN, HAS_RESET)
    for t in tl.range(begin, end, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            time = tl.cast(t + step + AHEAD, tl.int64)
            gates_at, values_at = gates + time * gate_time_stride, values + time * value_time_stride
            queue = queue + load_step(gates_at, values_at, resets + time, time < end, inside, M, N, SHOWN, HAS_RESET)

            now = tl.cast(t + step, tl.int64)
            loaded, queue = queue[:LOADS], queue[LOADS:]
            entering, state = product, offset
            if HAS_RESET:
                entering = cleared(loaded[LOADS - 1] != 0, product)
                if not ADJOINT:
                    state = cleared(loaded[LOADS - 1] != 0, offset)
            p, _, _ = weigh(as_float(loaded[: M + 1]), M + 1, NORMALIZATION, False)
            shown = as_float(loaded[M + 1 : M + 1 + SHOWN])
            leaving = _lagged_step(p, entering, M, OBSERVER)
            if ADJOINT:
                gathered = offset[0]
                for i in tl.static_range(SHOWN):
                    gathered += shown[i] * leaving[i]
                components = [gathered]
            else:
                components = _lagged_step(p, state, M, OBSERVER)
                components = [components[0] + p[M] * shown[0]] + components[1:]
            product = where_all(now < end, leaving, product, M)
            offset = where_all(now < end, components, offset, OFFSETS)
    slot = batch * tl.num_programs(2) + tl.program_id(2)
    _store_map(maps_ptr + slot * (M * (M + 1) * N) + n, product, offset, column, inside, M, N, ADJOINT)


@triton.jit
def _lagged_step(p, entering, M: tl.constexpr, OBSERVER: tl.constexpr):
    """A_t times a state, or times the rows of a matrix."""
    leaving = []
    if OBSERVER:
        for j in tl.static_range(M):
            component = p[j] * entering[0]
            if j + 1 < M:
                component += entering[j + 1]
            leaving = leaving + [component]
    else:
        made = p[0] * entering[0]
        for j in tl.static_range(1, M):
            made += p[j] * entering[j]
        leaving = [made] + entering[: M - 1]
    return leaving


@triton.jit
def _load_map(at, inside, group, M: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr):
    """Of each row of a lane: M entries of P and one of q."""
    loaded = []
    for k in tl.static_range((M + GROUPS - 1) // GROUPS):
        mask = inside & (k * GROUPS + group < M)
        for j in tl.static_range(M + 1):
            loaded = loaded + [tl.load(at + (k * GROUPS * (M + 1) + j) * N, mask=mask, other=0.0)]
    return loaded


@triton.jit
def relay(
    maps_ptr,
    start_ptr,
    carry_ptr,
    chunks,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """The carry of every chunk, from the first to the last; ADJOINT: from the last to the first.

    Rows are shared out over lanes as in `block_forward`. Pointers: maps, start (B, M, N): the carry of the first chunk
    on the way, carry (B, C, M, N). Grid: (N / BLOCK_N, B).
    """
    ROWS: tl.constexpr = (M + GROUPS - 1) // GROUPS
    LOADS: tl.constexpr = ROWS * (M + 1)
    STEPS: tl.constexpr = max(AHEAD, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    inside = (n < N) & (group < GROUPS)
    batch, count = tl.program_id(1).to(tl.int64), chunks - 1  # of maps
    maps = maps_ptr + batch * count * (M * (M + 1) * N) + group * ((M + 1) * N) + n
    carry = carry_ptr + batch * chunks * (M * N) + n

    state = load_list(start_ptr + batch * (M * N) + n, N, n < N, M)
    store_list(carry + (tl.cast(count, tl.int64) if ADJOINT else 0) * (M * N), N, n < N, state, M)
    queue = []
    for ahead in tl.static_range(AHEAD):
        at = tl.cast(count - 1 - ahead if ADJOINT else ahead, tl.int64)
        queue = queue + _load_map(maps + at * (M * (M + 1) * N), inside & (ahead < count), group, M, N, GROUPS)
    for r in tl.range(0, count, STEPS, num_stages=1):
        for step in tl.static_range(STEPS):
            later = r + step + AHEAD
            at = tl.cast(count - 1 - later if ADJOINT else later, tl.int64)
            queue = queue + _load_map(maps + at * (M * (M + 1) * N), inside & (later < count), group, M, N, GROUPS)

            now = r + step
            loaded, queue = queue[:LOADS], queue[LOADS:]
            rows = []
            for k in tl.static_range(ROWS):
                row = loaded[k * (M + 1) + M]
                for j in tl.static_range(M):
                    row += loaded[k * (M + 1) + j] * state[j]
                rows = rows + [row]
            state = where_all(now < count, send_rows(rows, group, M, GROUPS), state, M)
            to = tl.cast(count - 1 - now if ADJOINT else now + 1, tl.int64)
            for k in tl.static_range(ROWS):
                mask = inside & (k * GROUPS + group < M) & (now < count)
                tl.store(carry + to * (M * N) + (k * GROUPS + group) * N, rows[k], mask=mask)
