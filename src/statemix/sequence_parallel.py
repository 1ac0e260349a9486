"""A scan whose time axis is split over the processes of a torch.distributed group: rank r holds the r-th piece.

Notation: R ranks, B batch, M block size or order, N blocks or channels; per sequence and block, h_r in R^M is the state
after piece r, P_r the product of its transitions, c_r the state after it from a zero state. A piece is the affine map

    h_r = P_r h_{r-1} + c_r                                                     (h_{-1} the initial state)

Forward. Column j of P_r is where a scan of the unit state e_j with zero values ends, and c_r where a scan of the zero
state ends; a reset inside the piece makes P_r zero by itself. All maps are exchanged in one all_gather, each rank
composes those before it, and scans its piece from the right state. Rank 0 has that state already: it scans first and
sends h_0 as its c_0. Nobody comes after the last rank, so it sends zeros. The ranks between scan M + 1 times without a
gradient and once, like the others, with it.

Backward. Let L be the sum of the losses of all ranks, g_r = dL/dh_r from what comes after piece r, and d_r the gradient
of the losses of rank r alone in h_{r-1}. The chain rule of the map above is the mirrored recurrence

    g_{r-1} = P_r^T g_r + d_r                                                   (g_{R-1} = 0)

Each rank but the first finds d_r by differentiating its scan in the incoming state only (fused kernels find
all gradients at once, as one pass). All d_r are exchanged in one more all_gather, the products are still there, each
rank composes what comes after it, adds g_r to the gradient of its last state, and the ordinary backward goes on.

Cost. `bytes_sent` says what a rank sends. An all_gather on a ring puts (R - 1) times that on every link. On the slowest
rank a forward takes M + 2 scans of T / R steps and a backward two: what is gained is memory, and the time of the
products around the scan.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from statemix.gates import NORMALIZATIONS
from statemix.mixers.linear_recurrence import LinearRecurrence
from statemix.scan import choose_backend, lagged_states, scan_to_state
from statemix.scan.problem import KINDS, check_problem

SIGNATURE = ("kind", "normalization", "B", "M", "N", "bytes of a state", "gradients enabled")  # must agree over ranks
SIGNATURE_BYTES = 8 * (2 + len(SIGNATURE))  # int64; besides: whether the arguments are right, and need gradients


def sequence_parallel_scan(
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None = None,
    *,
    normalization: str = "softmax",
    reset: Tensor | None = None,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The states of one piece of a long scan, h_t = A_t h_{t-1} + a0_t * v_t, and the state after it.

    Every rank of the group calls it with its piece. A backward computes the gradients of the sum of the losses of all
    ranks, so every rank must run one, through what this returned, and scans of one graph in one order. It cannot be
    differentiated twice.

    Args:
        kind, normalization, backend: as in `scan_to_state`. The backends may differ over the ranks.
        raw_gates, values, reset: of this rank's piece, as in `scan_to_state`. The pieces may differ in T alone.
        initial_state: (B, M, N), the state before the first piece, on rank 0. Zeros if None. None on other ranks.
        group: whose rank r holds the r-th piece of time. The default group if None. With one rank this is
            `scan_to_state`.

    Returns:
        What `scan_to_state` would for the whole sequence, cut to this piece: states, and the state after the piece's
        last step, (B, M, N), float32 or wider. On the last rank that is the final state of the sequence.

    Raises:
        TypeError, ValueError: as `scan_to_state`; or `initial_state` is given on a rank other than 0, this process
            is not in the group, or the ranks disagree in more than T.
        RuntimeError: as `scan_to_state`; or torch.distributed is not initialised, or another rank refused its
            arguments. No rank waits for one whose arguments were refused.
    """
    return _run(
        "sequence_parallel_scan",
        group,
        kind,
        raw_gates,
        values,
        initial_state,
        normalization=normalization,
        reset=reset,
        backend=backend,
        lagged=False,
    )


def sequence_parallel_layer(
    layer: LinearRecurrence,
    x: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """y, state = layer(x, state, reset) of a BDLRU or HLRU, for one piece of time on each rank of the group.

    The layer must have the same weights on all ranks. Each rank's gradient of a weight is that of its own steps: their
    sum over the ranks is the whole (DistributedDataParallel takes the mean). Products and scan are not fused.

    Args:
        layer: a `BDLRU` or `HLRU`.
        x: (B, T, D), this rank's piece; the pieces may differ in T.
        state: (B, M, N), the state before the first piece, on rank 0. Zeros if None. None on other ranks.
        reset: (B, T) bool, of this piece. Never if None.
        group: as in `sequence_parallel_scan`.

    Returns:
        y (B, T, D) of this piece, and the state after it, (B, M, N).

    Raises:
        TypeError: the layer is of another kind.
        TypeError, ValueError, RuntimeError: as `sequence_parallel_scan`.
    """
    if not isinstance(layer, LinearRecurrence):
        raise TypeError(f"sequence_parallel_layer: `layer` must be a BDLRU or HLRU, got {type(layer).__name__}.")
    values = layer.values(x)
    if layer.kind == "block":
        values = values.unflatten(2, layer.state_shape)
    states, final_state = _run(
        "sequence_parallel_layer",
        group,
        layer.kind,
        layer.raw_gates(x).to(values.dtype),
        values,
        state,
        normalization=layer.normalization,
        reset=reset,
        backend=layer.backend,
        # the read-out of a companion sees all M lags, and the first of them lie in the piece before
        lagged=layer.kind == "companion",
    )
    return layer.output(states.flatten(2).to(x.dtype)), final_state


def bytes_sent(batch: int, order: int, blocks: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that each rank gives to the collectives of one scan: S + B M (M + 1) N s forward, B M N s backward.

    Args:
        batch, order, blocks: B, M and N; T does not matter.
        dtype: of raw gates and values.

    Returns:
        The two numbers, for s the bytes of a state (float32 or wider), and S = `SIGNATURE_BYTES`, by which the ranks
        see that their arguments fit together. With one rank nothing is sent.
    """
    state = batch * order * blocks * torch.promote_types(dtype, torch.float32).itemsize
    return SIGNATURE_BYTES + state * (order + 1), state


def _run(
    owner: str,
    group: dist.ProcessGroup | None,
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None,
    *,
    normalization: str,
    reset: Tensor | None,
    backend: str,
    lagged: bool,
) -> tuple[Tensor, Tensor]:
    """`sequence_parallel_scan`; with `lagged` its states are (B, T, M, N), by `lagged_states`."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{owner}: torch.distributed is not initialised. Call torch.distributed.init_process_group first."
        )
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{owner}: `group` must contain this process, rank {dist.get_rank()} of all.")

    scan = partial(scan_to_state, kind, raw_gates, normalization=normalization, reset=reset, backend=backend)

    def scan_piece(state: Tensor | None) -> tuple[Tensor, Tensor]:
        states, final_state = scan(values, state)
        return lagged_states(states, state, reset, final_state.shape[1]) if lagged else states, final_state

    if ranks == 1:
        return scan_piece(initial_state)
    problem: Exception | None = None
    signature, needs_gradient = [0] * len(SIGNATURE), False
    try:
        signature = _signature(owner, rank, kind, raw_gates, values, initial_state, normalization, reset, backend)
        tensors = (raw_gates, values) if initial_state is None else (raw_gates, values, initial_state)
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = error  # raised when the others know
    device = raw_gates.device if isinstance(raw_gates, Tensor) else torch.device("cpu")
    needs_gradient = _agree(owner, problem, signature, needs_gradient, device, group)

    batch, order, blocks = signature[2:5]
    wide = torch.promote_types(values.dtype, torch.float32)
    state = values.new_zeros(batch, order, blocks, dtype=wide)
    own_map = values.new_zeros(batch, order, order + 1, blocks, dtype=wide)  # (P_r, c_r), laid out like gates
    if rank == 0:
        state = state if initial_state is None else initial_state.to(wide)
        # a rank that needs no gradient itself takes part in the exchange of the others'
        state = state if state.requires_grad else state.detach().requires_grad_(needs_gradient)
        states, final_state = scan_piece(state)
        own_map[:, :, -1] = final_state.detach()
    elif rank < ranks - 1:
        with torch.no_grad():
            own_map[:, :, -1] = scan(values, state)[1]
            for j in range(order):
                unit = torch.zeros_like(state)
                unit[:, j] = 1
                own_map[:, :, j] = scan(torch.zeros_like(values), unit)[1]
    maps = _gather(own_map, group)
    products, ends = maps[:, :, :, :-1], maps[:, :, :, -1]
    if rank > 0:
        for product, end in zip(products[:rank], ends[:rank], strict=True):
            state = _apply(product, state) + end
        states, final_state = scan_piece(state.requires_grad_(needs_gradient))
    if not needs_gradient:
        return states, final_state
    states, final_state = _Adjoint.apply(states, final_state, state, products, group)
    return states, final_state


class _Adjoint(torch.autograd.Function):
    """The states and last state of a piece as they are; its backward adds the adjoint of the pieces after it."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        final_state: Tensor,
        state: Tensor,
        products: Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """States (B, T, ...), state after and before the piece (B, M, N), and P_r of all ranks (R, B, M, M, N)."""
        ctx.group = group
        ctx.save_for_backward(states, final_state, state, products)
        return states.view_as(states), final_state.view_as(final_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
        """Add g_r to the gradient of the last state; the module docstring derives it."""
        states, final_state, state, products = ctx.saved_tensors
        rank = dist.get_rank(ctx.group)
        own = torch.zeros_like(state)
        if rank > 0:  # nobody comes before rank 0
            outputs, cotangents = (states, final_state), (grad_states, grad_final_state)
            (own,) = torch.autograd.grad(outputs, state, cotangents, retain_graph=True)
        adjoints = _gather(own, ctx.group)
        adjoint = torch.zeros_like(own)
        for product, step in zip(products[rank + 1 :].flip(0), adjoints[rank + 1 :].flip(0), strict=True):
            adjoint = _apply(product.transpose(1, 2), adjoint) + step
        return grad_states, grad_final_state + adjoint, None, None, None


def _apply(product: Tensor, state: Tensor) -> Tensor:
    """P h for P (B, M, M, N) and h (B, M, N); what is not finite in h does not pass a zero of P: it may be a reset."""
    return (product * state[:, None]).masked_fill(product == 0, 0).sum(2)


def _gather(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all ranks, (R, ...)."""
    everyone = own.new_empty(dist.get_world_size(group), *own.shape)
    dist.all_gather(list(everyone.unbind()), own.contiguous(), group=group)
    return everyone


def _signature(
    owner: str,
    rank: int,
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None,
    normalization: str,
    reset: Tensor | None,
    backend: str,
) -> list[int]:
    """What must agree over the ranks, as numbers. Raises where the arguments of this rank are wrong."""
    if kind not in KINDS:
        raise ValueError(f"{owner}: `kind` must be one of {sorted(KINDS)}, got {kind!r}.")
    scan = check_problem(kind, raw_gates, values, initial_state, reset, normalization)
    choose_backend(scan, backend)
    if rank > 0 and initial_state is not None:
        raise ValueError(
            f"{owner}: the initial state must be None on all ranks but 0, which holds the first piece; "
            f"got one on rank {rank}."
        )
    batch, order, blocks = scan.initial_state.shape
    return [
        KINDS.index(kind),
        list(NORMALIZATIONS).index(normalization),
        batch,
        order,
        blocks,
        scan.initial_state.itemsize,
        int(torch.is_grad_enabled()),
    ]


def _agree(
    owner: str,
    problem: Exception | None,
    signature: list[int],
    needs_gradient: bool,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> bool:
    """Whether any rank needs a gradient. Raises, on all ranks, where one has a problem or another signature."""
    own = torch.tensor([problem is not None, needs_gradient, *signature], dtype=torch.int64, device=device)
    everyone = _gather(own, group).tolist()
    if problem is not None:
        raise problem
    for rank, (failed, *_) in enumerate(everyone):
        if failed:
            raise RuntimeError(f"{owner}: rank {rank} refused its arguments. Its own error says why.")
    for rank, (_, _, *other) in enumerate(everyone):
        if other != (first := everyone[0][2:]):
            raise ValueError(
                f"{owner}: all ranks must agree in {', '.join(SIGNATURE)}; rank 0 has {_spelled(first)}, "
                f"rank {rank} has {_spelled(other)}."
            )
    return any(needed for _, needed, *_ in everyone)


def _spelled(signature: list[int]) -> str:
    """A signature as a reader knows it."""
    kind, normalization, *sizes, enabled = signature
    return ", ".join([KINDS[kind], list(NORMALIZATIONS)[normalization], *map(str, sizes), str(bool(enabled))])
