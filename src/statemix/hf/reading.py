"""The recurrent state as a cache of transformers, and rows of a batch read past their padding."""

import torch
from torch import Tensor, nn

from statemix.backbone import State
from statemix.model import SequenceModel


class StateCache:
    """The state after all tokens so far, as the cache that transformers' `generate` carries along.

    Args:
        state: of the model, one (B, M, N) per layer. None: nothing has been read.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # it knows its length, so `generate` leaves out of a longer text what has been read

    def __init__(self, state: State | None = None) -> None:
        self.state, self.length = state, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, with padding."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row beam_idx[b]."""
        if self.state is not None:
            self.state = tuple(part.index_select(0, beam_idx.to(part.device)) for part in self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Raise RuntimeError: what was read cannot be taken back from a state, as assisted generation would have it."""
        raise RuntimeError(
            f"StateCache: a recurrent state cannot be cropped, got crop({tokens_to_remove}). Generate without an "
            "assistant model and without prompt lookup."
        )


def read_past_padding(
    model: SequenceModel, inputs: Tensor, mask: Tensor | None, state: State | None, *, only_real: bool, every: bool
) -> tuple[tuple[Tensor, ...], State]:
    """What the layers of a model make of padded rows. A position of padding has what stands before it.

    Args:
        model: whose layers are run.
        inputs: tokens (B, T), or what the layers read, (B, T, D).
        mask: (B, T) bool; False is padding. None: there is none.
        state: that before the first of the T positions. Zeros if None.
        only_real: nothing is asked for at padding.
        every: return also what each layer reads.

    Returns:
        (B, T, D) each: what the layers read if it is asked for, and the normalised residual stream; and the state after
        the last token of each row.
    """
    if mask is None or mask.all():
        return _run(model, inputs, state, None, every)
    if inputs.ndim == 3:
        inputs = inputs.masked_fill(~mask[..., None], 0)  # be it NaN
    begins = mask & ~nn.functional.pad(mask, (1, -1))
    if state is None and (begins.sum(1) == 1).all() and (only_real or mask[:, -1].all()):
        # in one stretch: what is before it is forgotten at its first token, what is behind it is not asked for
        return _run(model, inputs, None, begins, every)
    rows = []
    for row, real in enumerate(mask):
        own = model.initial_state(1) if state is None else tuple(part[row : row + 1] for part in state)
        zeros = model.embedding.weight.new_zeros(1, 1, model.config["d_model"])
        streams = (zeros,) * (model.config["num_layers"] + 1 if every else 1)
        if real.any():
            streams, own = _run(model, inputs[row : row + 1, real], own, None, every)
        places = (real.cumsum(0) - 1).clamp(min=0)
        rows.append(([x[:, places] for x in streams], own))
    of_rows, states = zip(*rows, strict=True)
    together = tuple(torch.cat(parts) for parts in zip(*of_rows, strict=True))
    return together, tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def _run(
    model: SequenceModel, inputs: Tensor, state: State | None, reset: Tensor | None, every: bool
) -> tuple[tuple[Tensor, ...], State]:
    """The residual stream behind the last norm, after those that the layers read if every one is asked for."""
    streams: list[Tensor] = []
    layers = model.layers if every else ()
    hooks = [layer.register_forward_pre_hook(lambda _, given: streams.append(given[0])) for layer in layers]
    try:
        run = model.run_layers if inputs.ndim == 2 else model.run_stack
        x, state = run(inputs, state, reset)
    finally:
        for hook in hooks:
            hook.remove()
    return (*streams, x), state
