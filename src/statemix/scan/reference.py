"""The loop over time: the definition of the three scans, which every other backend is tested against.

Notation: B batch, T time, M block size or order, N blocks or channels. p are the normalised gates. With the adjoint
s_t = dL/dh_t + A_{t+1}^T s_{t+1}, autograd through this loop gives what the fused backends compute in closed form:

    dL/dz_t[i,j] = s_t[i] * f'(z_t[i,j]) / S_t[i] * (u_j - sign(f(z_t[i,j])) * h_t[i]),   dL/dv_t[i] = s_t[i] * p_t[i,M]

for weights p = f(z) / S with S = sum |f(z)|, where u_j = h_{t-1}[j] for a transition weight and v_t[i] for the input
gate; softmax is f = exp, so f' / S = p.
"""

import torch
from torch import Tensor

from statemix.gates import normalize


def block_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> Tensor:
    """h_t[i] = sum_j p_t[i,j] h_{t-1}[j] + p_t[i,M] v_t[i], one step at a time. Shapes: `statemix.scan.block_scan`."""
    weights = normalize(raw_gates, normalization, dim=3)
    state, states = initial_state, []
    for t, (weight, value) in enumerate(zip(weights.unbind(1), values.unbind(1), strict=True)):
        state = _cleared(state, reset, t)
        transition, input_gate = weight[:, :, :-1], weight[:, :, -1]  # [b, i, j, n] carries j to i
        state = (transition * state[:, None]).sum(2) + input_gate * value
        states.append(state)
    return torch.stack(states, dim=1)


def companion_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> Tensor:
    """h_t = sum_{i=1..M} a_{i,t} h_{t-i} + a_{0,t} v_t. Shapes: `statemix.scan.companion_scan`."""
    weights = normalize(raw_gates, normalization, dim=2)
    lags, states = initial_state, []  # h_{t-1}, ..., h_{t-M}
    for t, (weight, value) in enumerate(zip(weights.unbind(1), values.unbind(1), strict=True)):
        lags = _cleared(lags, reset, t)
        state = (weight[:, :-1] * lags).sum(1) + weight[:, -1] * value
        lags = torch.cat([state[:, None], lags[:, :-1]], dim=1)
        states.append(state)
    return torch.stack(states, dim=1)


def observer_scan(
    raw_gates: Tensor, values: Tensor, initial_state: Tensor, reset: Tensor | None, normalization: str
) -> Tensor:
    """h'[0] = a_1 h[0] + h[1] + a_0 v, h'[i] = a_{i+1} h[0] + h[i+1]. Shapes: `statemix.scan.observer_scan`."""
    weights = normalize(raw_gates, normalization, dim=2)
    state, states = initial_state, []
    for t, (weight, value) in enumerate(zip(weights.unbind(1), values.unbind(1), strict=True)):
        state = _cleared(state, reset, t)
        shifted = torch.cat([state[:, 1:], torch.zeros_like(state[:, :1])], dim=1)
        entering = torch.cat([weight[:, -1:] * value[:, None], torch.zeros_like(state[:, 1:])], dim=1)
        state = weight[:, :-1] * state[:, :1] + shifted + entering
        states.append(state)
    return torch.stack(states, dim=1)


def _cleared(state: Tensor, reset: Tensor | None, t: int) -> Tensor:
    """The state (B, M, N) before step t: zero where that step starts a new sequence."""
    return state if reset is None else state.masked_fill(reset[:, t, None, None], 0)
