"""The loop over time in float64: the definition of the three scans, which every other backend is tested against.

Notation: B batch, T time, M block size or order, N blocks or channels. p are the normalised gates. With the adjoint
s_t = dL/dh_t + A_{t+1}^T s_{t+1}, autograd through this loop gives what the fused backends compute in closed form:

    dL/dz_t[i,j] = s_t[i] * f'(z_t[i,j]) / S_t[i] * (u_j - sign(f(z_t[i,j])) * h_t[i]),   dL/dv_t[i] = s_t[i] * p_t[i,M]

for weights p = f(z) / S with S = sum |f(z)|, where u_j = h_{t-1}[j] for a transition weight and v_t[i] for the input
gate; softmax is f = exp, so f' / S = p.
"""

import torch
from torch import Tensor

from statemix.scan.problem import Problem


def unserved(problem: Problem) -> str | None:
    """It serves every problem."""
    return None


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """One step at a time: the states, and the state (B, M, N) after the last step."""
    step = {"block": _block_step, "companion": _companion_step, "observer": _observer_step}[problem.kind]
    weights, values, state = problem.exact()
    states = []
    for t, (weight, value) in enumerate(zip(weights.unbind(1), values.unbind(1), strict=True)):
        if problem.reset is not None:
            state = state.masked_fill(problem.reset[:, t, None, None], 0)
        state = step(weight, value, state)
        states.append(state[:, 0] if problem.kind == "companion" else state)
    return torch.stack(states, dim=1), state.to(problem.initial_state.dtype)


def _block_step(weight: Tensor, value: Tensor, state: Tensor) -> Tensor:
    """h'[i] = sum_j p[i,j] h[j] + p[i,M] v[i]."""
    transition, input_gate = weight[:, :, :-1], weight[:, :, -1]  # [b, i, j, n] carries j to i
    return (transition * state[:, None]).sum(2) + input_gate * value


def _companion_step(weight: Tensor, value: Tensor, lags: Tensor) -> Tensor:
    """h_t = sum_{i=1..M} a_i h_{t-i} + a_0 v, before the lags h_{t-1}, ..., h_{t-M+1}."""
    newest = (weight[:, :-1] * lags).sum(1) + weight[:, -1] * value
    return torch.cat([newest[:, None], lags[:, :-1]], dim=1)


def _observer_step(weight: Tensor, value: Tensor, state: Tensor) -> Tensor:
    """h'[0] = a_1 h[0] + h[1] + a_0 v, h'[i] = a_{i+1} h[0] + h[i+1]."""
    shifted = torch.cat([state[:, 1:], torch.zeros_like(state[:, :1])], dim=1)
    entering = torch.cat([weight[:, -1:] * value[:, None], torch.zeros_like(state[:, 1:])], dim=1)
    return weight[:, :-1] * state[:, :1] + shifted + entering
