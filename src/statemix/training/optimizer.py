"""The optimizer of a run, AdamW or Muon for the matrices of the layers and AdamW for the rest, and its schedule."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from statemix.model import TokenModel
from statemix.training.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan's post: steepest at zero, not convergent
MOMENTUM, ITERATIONS = 0.95, 5


def make_optimizer(model: TokenModel, config: OptimizerConfig) -> "MuonAdamW":
    """The optimizer of a model. Only matrices decay: not biases, norms, embeddings or constant gates.

    With `muon_lr` those of the layers are Muon's; embedding and head, which see rare tokens, stay AdamW's.
    """
    kinds = (torch.nn.Linear, torch.nn.RNNBase)
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    matrices = {id(p) for part in parts for p in part.parameters(recurse=False) if p.ndim == 2}
    matrices -= {id(model.embedding.weight)}
    of_layers = {id(p) for p in model.layers.parameters()} if config.muon_lr is not None else set()
    decayed = [p for p in model.parameters() if id(p) in matrices - of_layers]
    rest = [p for p in model.parameters() if id(p) not in matrices]
    orthogonal = [p for p in model.parameters() if id(p) in matrices & of_layers]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if orthogonal:
        assert config.muon_lr is not None
        group = {"params": orthogonal, "weight_decay": config.weight_decay}
        groups.append(group | {"orthogonal": True, "lr_share": config.muon_lr / config.lr})
    return MuonAdamW(groups, config)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step 0 .. steps - 1: lr (step + 1) / warm-up steps, then a cosine or a line from lr to final_lr."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + (config.lr - config.final_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step have this rate, and each group its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_share"]


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the parameter groups that are `orthogonal`: all of these are matrices.

    Muon, for a matrix W (m, n) with gradient G, momentum u and decay d:

        B <- u B + (1 - u) G;   W <- (1 - lr d) W - lr sqrt(max(1, m / n)) NS(u B + (1 - u) G)

    NS brings all singular values near 1, by five steps of X <- a X + (b X X^T + c (X X^T)^2) X from X / |X|. It is
    torch.optim.Muon's rule, in float32: that one iterates in bfloat16, which is slow where a CPU has none.

    Args:
        groups: of parameters. `set_learning_rate` multiplies the rate by a group's `lr_share`, 1 if it is not given.
        config: the peak learning rate and the decay rates of AdamW's moments.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        whole = [{"orthogonal": False, "lr_share": 1.0} | group for group in groups]
        super().__init__(whole, lr=config.lr, betas=config.betas, amsgrad=config.amsgrad)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's asks each parameter for its step count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            weights = [p for p in group["params"] if p.grad is not None] if group["orthogonal"] else []
            aims = []
            for weight in weights:
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                aims.append(weight.grad.lerp(momentum, MOMENTUM))
            for weight, direction in zip(weights, orthogonalized(aims), strict=True):
                size = math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * size)
        return loss


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices with the singular vectors of these and singular values near 1 (0.7 to 1.2), in float32 or wider.

    Every step multiplies X by a polynomial of its Gram matrix X X^T. These commute, so X is multiplied once,
    by the product of them all: 2 products of its size instead of 10. Gram matrices of one size go through as one batch.
    """
    sizes: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, matrix in enumerate(matrices):
        sizes.setdefault((min(matrix.shape), matrix.dtype), []).append(i)
    results = list(matrices)
    for (_, dtype), members in sizes.items():
        wide = [_wide(matrices[i]).to(torch.promote_types(dtype, torch.float32)) for i in members]
        wide = [x / x.norm().clamp(min=1e-7) for x in wide]
        products = _polynomials(torch.stack([x @ x.mT for x in wide]))
        for i, x, product in zip(members, wide, products, strict=True):
            y = product @ x
            results[i] = (y if y.shape == matrices[i].shape else y.mT).to(dtype)
    return results


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _polynomials(gram: Tensor) -> Tensor:
    """The product of all steps' polynomials, (K, m, m), of Gram matrices (K, m, m)."""
    a, b, c = NEWTON_SCHULZ
    product = None
    for left in reversed(range(ITERATIONS)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else product @ factor
        if left:
            gram = factor @ gram @ factor
    assert product is not None
    return product
