"""SequencePredictor: numbers for a whole sequence of any length, as a classification or a regression needs them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from statemix.backbone import Backbone
from statemix.lengths import Ends
from statemix.mixers.base import check_choice, check_sizes

POOLINGS = ("attention", "last", "mean")


class SequencePredictor(nn.Module):
    """W_o pool(y) + b_o with y = backbone(W_i x + b_i): the logits of classes, or the targets of a regression.

    Args:
        input_size: F, width of x.
        output_size: K, number of classes or of targets.
        backbone: what reads the sequence, of one direction or both.
        pooling: how its outputs become those of the sequence. "mean": their mean. "last": that of the last step, and of
            a reverse direction that of the first, where it ends. "attention": their mean with the weights
            softmax_t(w . y_t), w learned.

    Raises:
        TypeError, ValueError: a size is not a positive int, or an argument is of the wrong type or name.
    """

    def __init__(self, input_size: int, output_size: int, backbone: Backbone, *, pooling: str = "mean") -> None:
        super().__init__()
        check_sizes("SequencePredictor", input_size=input_size, output_size=output_size)
        if not isinstance(backbone, Backbone):
            raise TypeError(f"SequencePredictor: `backbone` must be a Backbone, got {type(backbone).__name__}.")
        check_choice("SequencePredictor", "pooling", pooling, POOLINGS)
        self.pooling = pooling
        self.input = nn.Linear(input_size, backbone.config["d_model"])
        self.backbone = backbone
        self.score = nn.Linear(backbone.output_size, 1, bias=False) if pooling == "attention" else None
        self.output = nn.Linear(backbone.output_size, output_size)

    if TYPE_CHECKING:  # torch says of no call what it returns

        def __call__(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            """See `forward`."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, T, F) and lengths (B,) in [1, T], or None where all are T, to (B, K).

        What is behind the end of a sequence has no part in any number or gradient, be it NaN: the result is, bit for
        bit, a function of `lengths` and of what is within them.

        Raises:
            TypeError, ValueError: as of `Backbone`.
        """
        if x.ndim != 3 or x.shape[2] != self.input.in_features or 0 in x.shape:
            rule = f"(B, T, F) with F = {self.input.in_features} and B, T of at least 1"
            raise ValueError(f"SequencePredictor: `x` must have shape {rule}, got {tuple(x.shape)}.")
        if lengths is None:
            y, _ = self.backbone(self.input(x))
            lengths = torch.full(x.shape[:1], x.shape[1], device=x.device)
        else:
            ends = Ends("SequencePredictor", lengths, x)
            lengths = ends.lengths
            y, _ = self.backbone(self.input(ends.cut(x)), lengths=lengths)
        return self.output(self._pool(y, lengths))

    def _pool(self, y: Tensor, lengths: Tensor) -> Tensor:
        """y (B, T, D), zeros behind the lengths (B,), to (B, D)."""
        if self.pooling == "mean":
            return y.sum(1) / lengths[:, None].to(y.dtype)
        if self.score is None:
            last = y[torch.arange(y.shape[0], device=y.device), lengths - 1]
            size = self.backbone.config["d_model"]
            return torch.cat([last[:, :size], y[:, 0, size:]], dim=1)
        behind = torch.arange(y.shape[1], device=y.device) >= lengths[:, None]
        weights = self.score(y)[..., 0].masked_fill(behind, -torch.inf).softmax(dim=1)
        return (weights[:, None] @ y)[:, 0]
