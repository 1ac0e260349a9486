"""A function of tensors with its derivative, as torch wants it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead  # a tensor that outlived functorch's transform, out of its wrapper
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# a subclass of Tensor, or of a number, looks at the operations made with it
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), str, bool, int, float, torch.dtype))


class Operator:
    """A function of tensors, with its derivative, as torch needs it in two places.

    torch.compile, torch.export, dispatch modes and subclasses of Tensor see a custom operator. That costs a few hundred
    microseconds a call in Python, as much as a small scan, and functorch refuses it: all other calls go through an
    autograd.Function, under functorch one with a `setup_context`, which again is slower.

    Args:
        name: of the custom operator, in the name space of statemix.
        function: on tensors that have numbers.
        fake: on tensors that have none: the results' shapes and dtypes.
        save: what the derivative needs, into its context.
        derivative: from the context and the gradients of the results.
        device_types: of the tensors. None: of any device.
        flops: from the inputs, and the results as `out_val`, what `FlopCounterMode` adds. None: nothing.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None],
        derivative: Callable[..., Any],
        device_types: str | None = "cpu",
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.operator = torch.library.custom_op(
            f"statemix::{name}", function, mutates_args=(), device_types=device_types
        )
        self.operator.register_fake(fake)
        self.operator.register_autograd(derivative, setup_context=save)

        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = function(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        self.function, self._flops = function, flops
        eager = {"forward": forward, "backward": derivative}
        functorch = {"forward": function, "setup_context": save, "backward": derivative, "vmap": self._each}
        self.eager, self.functorch = (
            type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
            for methods in (eager, functorch)
        )
        # `eager.apply` comes to this one without functorch, and takes 5 us to look for it, as `__call__` does already
        self._apply = super(torch.autograd.Function, self.eager).apply  # type: ignore[misc] # of a class, at run time

    def __call__(self, *inputs: Any) -> Any:
        """The function, seen by whatever looks at the operations now made."""
        if torch.compiler.is_compiling():
            return self.operator(*inputs)
        if torch._C._len_torch_dispatch_stack():
            self._tell_counters()
            return self.operator(*inputs)
        if not _PLAIN.issuperset(map(type, inputs)):
            return self.operator(*inputs)
        if torch._C._are_functorch_transforms_active():
            return self.functorch.apply(*inputs)  # type: ignore[attr-defined]
        # forward-mode derivatives go on without grad mode: the autograd.Function refuses them
        if not torch.is_grad_enabled() and torch.autograd.forward_ad._current_level < 0:
            return self.function(*inputs)
        return self._apply(*[unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in inputs])

    def _tell_counters(self) -> None:
        """Give the FLOPs of this operator to the counters now in use, each of which has formulas of its own."""
        # its module is slow to import, and there where a counter is
        if self._flops is None or (counting := sys.modules.get("torch.utils.flop_counter")) is None:
            return
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(counter := getattr(mode, "counter", None), counting.FlopCounterMode):
                counter.flop_registry.setdefault(self.operator._opoverload.overloadpacket, self._flops)

    def _each(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Under vmap, one call for each."""
        each = [
            self(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(results) for results in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What an operator without a derivative keeps for it."""


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The derivative of the operators that are themselves one. Raises RuntimeError."""
    raise RuntimeError("scan: the 'cpu' backend has no second derivative. Use backend='associative'.")
