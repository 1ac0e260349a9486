"""What every sequence mixer is: one call for a sequence, one for a step, and a state of fixed size."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from statemix.gates import check_dense, check_floats

Hook = TypeVar("Hook", bound=Callable[..., Any])


def onlooker(hook: Hook) -> Hook:
    """Mark a hook that changes nothing of a call, neither what goes in nor what comes out; a decorator."""
    vars(hook)["looks_on"] = True
    return hook


class Rows(NamedTuple):
    """What x (B, T, D) is made of where few of its rows differ: x = table[places], of (V, D) and (B, T)."""

    table: Tensor
    places: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(x) (B, T, ...), of a function that has a row of x alone for each of its own: done once a row."""
        made = function(self.table[None])[0]
        return nn.functional.embedding(self.places, made.flatten(1)).unflatten(2, made.shape[1:])


class Mixer(nn.Module):
    """y, state = mixer(x, state, reset): mixes a sequence over time, from a state to a state.

    A subclass sets `d_model`, `state_shape` = (M, N) and `output`, its last map, and defines `mix`. What it says of its
    options, all that knows no mixer by name asks for: sizes, configs, training.
    """

    width_option: ClassVar[str]  # the option that makes it wider
    table_options: ClassVar[Mapping[str, Any]] = {}  # in a table of sizes, of options without a default
    plain_options: ClassVar[Mapping[str, Any]] = {}  # with which a step is operations of torch alone, for export
    has_gate_rows: ClassVar[bool] = False  # True: it has `row_entropy`, and N blocks that `output` need not see

    kernels: tuple[str, ...] = ()  # which have run it, where other packages have some: "own", or a module's name
    d_model: int
    state_shape: tuple[int, int]
    output: nn.Linear
    hidden: float = 0.0  # share of the blocks that `output` does not see, of each sequence others; with `has_gate_rows`

    @classmethod
    def width_step(cls, options: Mapping[str, Any]) -> int:
        """Between the widths that it takes, of all its other options."""
        return 1

    @classmethod
    def sharpens(cls, options: Mapping[str, Any]) -> bool:
        """Whether it has `sharpen`, of these options."""
        return False

    @property
    def state_size(self) -> int:
        """Numbers carried per sequence from one step to the next: M * N."""
        return self.state_shape[0] * self.state_shape[1]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights; None if there is no float among them, as where all are quantised."""
        weight = self._float_weight()
        return None if weight is None else weight.dtype

    def _float_weight(self) -> Tensor | None:
        """The first weight of a float dtype."""
        for weight in self.parameters():
            if weight.is_floating_point():
                return weight
        for module in self.modules():  # in a replica of DataParallel the weights are attributes
            for value in vars(module).values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    return value
        return None

    def initial_state(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, M, N), float32 or wider, where the weights are."""
        check_sizes(f"{type(self).__name__}.initial_state", batch=batch)
        weight = self._float_weight()
        dtype = torch.promote_types(torch.float32 if weight is None else weight.dtype, torch.float32)
        return torch.zeros(batch, *self.state_shape, dtype=dtype, device=None if weight is None else weight.device)

    if TYPE_CHECKING:  # torch says of no call what it returns

        def __call__(
            self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, rows: Rows | None = None
        ) -> tuple[Tensor, Tensor]:
            """See `forward`."""

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs and final state of a sequence.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, (B, M, N), float32 or wider, differentiable. Zeros if None.
            reset: (B, T) bool. True: the state is zero before that step (packed sequences). Never if None.
            rows: x once more, as a table of its rows and which is where; only of a mixer that `shares_rows`.

        Returns:
            y (B, T, D) and the state after the last step, (B, M, N).

        Raises:
            TypeError, ValueError: a dtype or shape is wrong, or T = 0.
        """
        name = type(self).__name__
        check_floats(name, "x", x)
        if state is not None:
            check_floats(name, "state", state)
        own = self.dtype
        if own not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: `x` must be {own} like the parameters, got {x.dtype}.")
        if x.ndim != 3 or x.shape[2] != self.d_model or 0 in x.shape:
            raise ValueError(
                f"{name}: `x` must have shape (B, T, D) with D = {self.d_model} and B, T of at least 1, "
                f"got {tuple(x.shape)}."
            )
        if state is not None and state.device != x.device:
            raise TypeError(f"{name}: `state` must be on {x.device} like `x`, got {state.device}.")
        if state is not None and tuple(state.shape) != (wanted := (x.shape[0], *self.state_shape)):
            raise ValueError(f"{name}: `state` must have shape (B, M, N) = {wanted}, got {tuple(state.shape)}.")
        if reset is not None:
            check_reset(name, reset, x.shape[:2], x.device)
        if rows is None:
            return self.mix(x, state, reset)
        check_rows(name, rows, x)
        return self.mix_rows(rows, state, reset)

    def step(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of the same recurrence: x (B, D) and the state (B, M, N) to y (B, D) and the next state.

        Where reset, (B,) bool, is True, the state is zero before the step.
        """
        check_floats(name := type(self).__name__, "x", x)
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"{name}.step: `x` must have shape (B, D) with D = {self.d_model}, got {tuple(x.shape)}.")
        y, state = self(x[:, None], self._kept(state, reset, x))
        return y[:, 0], state

    def _kept(self, state: Tensor | None, reset: Tensor | None, x: Tensor) -> Tensor | None:
        """The state with which a step of x (B, D) begins: zeros in the rows of a reset, (B,)."""
        if reset is None:
            return state
        check_floats(name := type(self).__name__, "x", x)
        check_reset(f"{name}.step", reset, x.shape[:1], x.device)
        return reset_rows(state, reset)

    def mix(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` on checked arguments."""
        raise NotImplementedError

    def shares_rows(self, positions: int) -> bool:
        """Whether it has `mix_rows`, and this saves time at so many positions."""
        return False

    def mix_rows(self, rows: Rows, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """`mix` of x = table[places], where what is made of a row alone is made once for each row of the table."""
        raise NotImplementedError

    def row_entropy(self, x: Tensor) -> Tensor:
        """See `LinearRecurrence.row_entropy`; of a mixer with rows of gates."""
        raise NotImplementedError

    def sharpen(self, factor: float) -> None:
        """See `LinearRecurrence.sharpen`; of a mixer that `sharpens`."""
        raise NotImplementedError


def reset_rows(state: Tensor | None, reset: Tensor) -> Tensor | None:
    """The state (B, M, N) with zeros where reset, (B,) bool, is True: a selection, which no NaN outlasts.

    One that does not fit is left as it is, for the step to refuse.
    """
    if not isinstance(state, Tensor) or state.ndim != 3 or state.shape[0] != reset.shape[0]:
        return state
    return state.masked_fill(reset[:, None, None], 0)


def check_rows(owner: str, rows: Rows, x: Tensor) -> None:
    """Raise, in the name of `owner`, unless rows may be those of x (B, T, D): a table (V, D), int64 places (B, T)."""
    table, places = rows
    if places.dtype != torch.int64 or table.dtype != x.dtype:
        told = f"places of {places.dtype} and a table of {table.dtype}"
        raise TypeError(f"{owner}: `rows` must have int64 places and a table of {x.dtype} like `x`, got {told}.")
    if table.ndim != 2 or table.shape[1] != x.shape[2] or places.shape != x.shape[:2]:
        told = f"{tuple(table.shape)} and {tuple(places.shape)}"
        wanted = f"(V, D) and (B, T) = (V, {x.shape[2]}) and {tuple(x.shape[:2])}"
        raise ValueError(f"{owner}: `rows` must have a table and places of the shapes {wanted}, got {told}.")


def check_reset(owner: str, reset: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raise, in the name of `owner`, unless it is a bool tensor of the shape, (B, T) or (B,), on the device."""
    check_mask(owner, "reset", reset, shape, device)


def check_mask(owner: str, argument: str, mask: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raise, in the name of `owner`, unless an argument is a bool tensor of shape (B, T) or (B,), on the device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{owner}: `{argument}` must be a tensor, got {type(mask).__name__}.")
    if mask.device != device:
        raise TypeError(f"{owner}: `{argument}` must be on {device} like `x`, got {mask.device}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"{owner}: `{argument}` must be a bool tensor, got {mask.dtype}.")
    check_dense(owner, argument, mask)
    if mask.shape != tuple(shape):
        axes = "(B, T)" if len(shape) == 2 else "(B,)"
        raise ValueError(f"{owner}: `{argument}` must have shape {axes} = {tuple(shape)}, got {tuple(mask.shape)}.")


def check_flags(owner: str, **flags: bool) -> None:
    """Raise TypeError, in the name of `owner`, unless every flag is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{owner}: `{name}` must be True or False, got {flag!r}.")


def check_recompute(owner: str, recompute: bool | None) -> None:
    """Raise TypeError, in the name of `owner`, unless it is a bool or None."""
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"{owner}: `recompute` must be True, False or None, got {recompute!r}.")


def check_sizes(owner: str, *, least: int = 1, **sizes: int) -> None:
    """Raise, in the name of `owner`, unless every size is an int of at least `least`."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{owner}: `{name}` must be an int, got {size!r}.")
        if size < least:
            raise ValueError(f"{owner}: `{name}` must be at least {least}, got {size}.")
        if size >= 2**63:
            raise ValueError(f"{owner}: `{name}` must be below 2^63, got {size}.")


def check_numbers(owner: str, **numbers: float) -> None:
    """Raise TypeError, in the name of `owner`, unless every value is a number."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"{owner}: `{name}` must be a number, got {number!r}.")


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, in the name of `owner`, unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{owner}: `{name}` must be one of {sorted(choices)}, got {value!r}.")
