"""One call of a scan, checked at the door: what every backend gets."""

from typing import NamedTuple

import torch
from torch import Tensor

from statemix.gates import check_dense, check_floats, check_normalization, normalize

KINDS = ("block", "companion", "observer")


class Problem(NamedTuple):
    """The arguments of one scan, which fit together.

    kind: "block", "companion" or "observer".
    raw_gates: (B, T, M, M+1, N) for a block and (B, T, M+1, N) for the others, in the dtype and layout that came.
    values: (B, T, M, N) or (B, T, N), of the same dtype.
    initial_state: (B, M, N), float32 or wider: the dtype in which states are carried.
    reset: (B, T) bool, or None.
    normalization: a name in `NORMALIZATIONS`.
    """

    kind: str
    raw_gates: Tensor
    values: Tensor
    initial_state: Tensor
    reset: Tensor | None
    normalization: str

    def widened(self) -> "Problem":
        """The problem with raw gates and values in the dtype of the state."""
        dtype = self.initial_state.dtype
        return self._replace(raw_gates=self.raw_gates.to(dtype), values=self.values.to(dtype))

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, values and initial state in float64, in which no rounding of theirs can be seen in the result.

        A decay of 0.9999 in float32 is off by up to 3e-8 at every step, which is 3e-4 of what it forgets. On Apple's
        GPUs, which have no float64, they are float32.
        """
        dtype = torch.float32 if self.values.device.type == "mps" else torch.float64
        raw_gates, values, initial_state = self.widened()[1:4]
        weights = normalize(raw_gates, self.normalization, dim=-2, dtype=dtype)
        return weights, values.to(dtype), initial_state.to(dtype)


def check_problem(
    kind: str,
    raw_gates: Tensor,
    values: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    normalization: str,
) -> Problem:
    """The problem of these arguments. Raises TypeError or ValueError unless they fit together."""
    if kind not in KINDS:
        raise ValueError(f"scan_to_state: `kind` must be one of {sorted(KINDS)}, got {kind!r}.")
    owner = f"{kind}_scan"
    check_normalization(owner, normalization)
    floats = {"raw_gates": raw_gates, "values": values}
    if initial_state is not None:
        floats["initial_state"] = initial_state
    for argument, tensor in floats.items():
        check_floats(owner, argument, tensor)
        if tensor.device != raw_gates.device:
            raise TypeError(
                f"{owner}: `{argument}` must be on {raw_gates.device} like `raw_gates`, got {tensor.device}."
            )
    if values.dtype != raw_gates.dtype:
        raise TypeError(f"{owner}: `values` must be {raw_gates.dtype} like `raw_gates`, got {values.dtype}.")
    if reset is not None and (not isinstance(reset, Tensor) or reset.dtype != torch.bool):
        got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"{owner}: `reset` must be a bool tensor, got {got}.")

    block = kind == "block"
    layout = "(B, T, M, M+1, N)" if block else "(B, T, M+1, N)"
    shape = tuple(raw_gates.shape)
    if len(shape) != (5 if block else 4) or (block and shape[3] != shape[2] + 1):
        raise ValueError(f"{owner}: `raw_gates` must have shape {layout}, got {shape}.")
    batch, length, order, blocks = shape[0], shape[1], shape[-2] - 1, shape[-1]
    if any(size < 1 for size in (batch, length, order, blocks)):  # min would compare sizes that an export leaves open
        raise ValueError(f"{owner}: `raw_gates` must have B, T, M and N of at least 1 in {layout}, got {shape}.")
    _check_shape(
        owner,
        "values",
        values,
        axes="(B, T, M, N)" if block else "(B, T, N)",
        expected=(batch, length, order, blocks) if block else (batch, length, blocks),
    )
    if initial_state is not None:
        _check_shape(owner, "initial_state", initial_state, axes="(B, M, N)", expected=(batch, order, blocks))
    if reset is not None:
        check_dense(owner, "reset", reset)
        _check_shape(owner, "reset", reset, axes="(B, T)", expected=(batch, length))
        if reset.device != raw_gates.device:
            raise TypeError(f"{owner}: `reset` must be on {raw_gates.device} like `raw_gates`, got {reset.device}.")

    state_dtype = torch.promote_types(values.dtype, torch.float32)  # sums and states are float32 or wider
    if initial_state is None:
        initial_state = values.new_zeros(batch, order, blocks, dtype=state_dtype)
    return Problem(kind, raw_gates, values, initial_state.to(state_dtype), reset, normalization)


def _check_shape(owner: str, argument: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    got = tuple(tensor.shape)
    if got != expected:
        raise ValueError(f"{owner}: `{argument}` must have shape {axes} = {expected} to match `raw_gates`, got {got}.")
