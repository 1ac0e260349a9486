"""Whether a kernel may stand in for torch modules: only where calling them would have done the same.

A kernel computes, from their weights, what the classes of some modules say. Whatever else a call of them does would be
lost, so there must be nothing else. This file is the one list of what that means. A `Part` declares a module as a
kernel knows it, with the parts below it; `Part.inputs` is what the kernel reads, or None where anything is otherwise:

- its class is one that was declared, and has the functions that it had then; nothing in the instance hides them, or its
  weights and parts (an instance that was patched, compiled, flattened, replicated);
- no hook waits for its forward or backward, neither its own nor one of all modules;
- every weight that the kernel reads is a plain tensor under its own name (so not parametrised, quantised, distributed),
  dense, all on one device and of one dtype that the kernel's `Engine` serves; and a weight that it does not read, as a
  bias, is None;
- nothing watches or changes torch's operations: no mode of dispatch or of functions, and no autocast, unless the engine
  does as that says.

A short step is over before this list is read. So a module keeps what was read from it, with a `Watch` that sees in a
few microseconds whether anything on the list may have changed.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.modules.module as of_all_modules
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from statemix import kernels

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OWN_CALLS = ("_call_impl", "_compiled_call_impl")  # an instance that has them is called otherwise
PLAIN = (Tensor, nn.Parameter)
CALLS = (nn.Module, "__call__"), (nn.Module, "_call_impl")
KEPT = "_fused"  # a module's attribute

Class = TypeVar("Class", bound=type[nn.Module])

_global_hooks = tuple(getattr(of_all_modules, f"_global{name}") for name in HOOKS)
_module_calls = nn.Module.__call__, nn.Module._call_impl
_nothing = object()


class Engine(NamedTuple):
    """Kernels for a kind of device.

    serves: whether they are here, and for tensors of this device.
    dtypes: of these tensors.
    autocasts: whether they do as autocast says.
    """

    serves: Callable[[torch.device], bool]
    dtypes: tuple[torch.dtype, ...]
    autocasts: bool


def _gpu_serves(device: torch.device) -> bool:
    from statemix.scan import gpu  # when it is first asked for

    return gpu.load_problem() is None and gpu.unserved_device(device) is None


CPU = Engine(
    serves=lambda device: device.type == "cpu" and kernels.load_problem() is None,
    dtypes=(torch.float32, torch.float64),
    autocasts=False,
)
GPU = Engine(serves=_gpu_serves, dtypes=(torch.float32, torch.bfloat16, torch.float16), autocasts=True)


class Part:
    """A module as a kernel knows it: what its call does is what its class says.

    Args:
        classes: it is of one of these exactly; `of` adds others.
        weights: names of the parameters that the kernel reads, in its order.
        absent: names of parameters that must be None.
        parts: what is below it, by name. The kernel reads their weights after its own, in this order.
        each: what every child is, if it is a list of modules.
        settings: names of attributes that change what a call does.
        allows: whether the kernel does what the settings of a module ask for.
        calls: names of the methods that a call of it runs.
        uses: (owner, name) of functions of torch that it calls.
        arrange: from the module and all weights, to what `inputs` gives.
        engine: whose kernel it is, where the part is not one of another.
    """

    def __init__(
        self,
        *classes: type[nn.Module],
        weights: Sequence[str] = (),
        absent: Sequence[str] = (),
        parts: "dict[str, Part] | None" = None,
        each: "Part | None" = None,
        settings: Sequence[str] = (),
        allows: Callable[[Any], bool] = lambda module: True,
        calls: Sequence[str] = ("forward",),
        uses: Sequence[tuple[Any, str]] = (),
        arrange: Callable[[Any, tuple[Tensor, ...]], Any] = lambda module, weights: weights,
        engine: Engine = CPU,
    ) -> None:
        self._weights, self._absent, self._parts, self._each = weights, absent, parts or {}, each
        self.settings, self._allows, self.arrange, self.engine = settings, allows, arrange, engine
        self._hidden = (*weights, *absent, *self._parts)  # by an attribute of the instance itself
        self._calls, self._own_calls = calls, (*OWN_CALLS, *calls)
        self._uses = [(owner, name, getattr(owner, name)) for owner, name in uses]
        self._functions: dict[type[nn.Module], list[tuple[Any, str, Any]]] = {}
        for known in classes:
            self.of(known)

    def of(self, known: Class) -> Class:
        """Declare one more class; a decorator."""
        self._functions[known] = self._uses + [(known, name, getattr(known, name)) for name in self._calls]
        return known

    def on(
        self, engine: Engine, allows: Callable[[Any], bool], arrange: Callable[[Any, tuple[Tensor, ...]], Any]
    ) -> "Part":
        """The same modules for a kernel of another engine; the classes told to `of` are those of both."""
        other = copy.copy(self)
        other.engine, other._allows, other.arrange = engine, allows, arrange
        return other

    def without(self, name: str, allows: Callable[[Any], bool]) -> "Part":
        """The same modules but for a part of them, for what is computed of the others alone."""
        other = copy.copy(self)
        other._parts = {each: part for each, part in self._parts.items() if each != name}
        other._allows = allows
        return other

    def plainly_called(self, module: nn.Module) -> bool:
        """Whether a call of the module runs its forward and nothing else."""
        attributes = module.__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            return False
        if attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]:
            return False
        return self.runs_its_own(module)

    def runs_its_own(self, module: nn.Module) -> bool:
        """Whether a call of the module, its hooks aside, runs the functions that its class had when it was declared."""
        attributes, functions = module.__dict__, self._functions.get(type(module))
        if functions is None or type(module).__call__ is not nn.Module.__call__:
            return False
        for name in self._own_calls:  # not every torch traces isdisjoint, and this takes no longer
            if name in attributes:
                return False
        return all(getattr(owner, name) is function for owner, name, function in functions)

    def inputs(self, module: nn.Module) -> Any:
        """What a kernel reads of a module, where it may stand in for the forward of it; otherwise None.

        The module's own hooks are those of a caller, who asks `plainly_called` before it goes round its call.
        """
        if torch.compiler.is_compiling():
            weights = self._read(module) if undisturbed(self.engine) else None
            return None if weights is None else self.arrange(module, weights)
        kept = module.__dict__.get(KEPT)
        if kept is not None and kept.part is self and kept.holds(module):
            return kept.inputs
        module.__dict__[KEPT] = None
        if not undisturbed(self.engine):
            return None
        if (weights := self._read(module)) is None:
            return None
        lent = any(type(weight) is not nn.Parameter for weight in weights)  # by functional_call, perhaps of a graph
        if lent or kernels.load_problem() is not None:
            return self.arrange(module, weights)
        module.__dict__[KEPT] = kept = Watch(self, module, weights)
        return kept.inputs

    def reads(self, module: nn.Module) -> bool:
        """Whether all is as this file says, looked at anew."""
        return undisturbed(self.engine) and self._read(module) is not None

    def watch(self, module: nn.Module) -> "Watch | None":
        """What a kernel reads that stands in for calls of a module without gradients, or None where it may not."""
        plain = undisturbed(self.engine) and not transformed() and self.plainly_called(module)
        weights = self._read(module) if plain else None
        return None if weights is None else Watch(self, module, weights, whole=True)

    def walk(self, module: nn.Module) -> "Iterator[tuple[Part, nn.Module]]":
        """A module that was read and all below it, each with its part."""
        yield self, module
        for part, child in self._children(module):
            yield from part.walk(cast(nn.Module, child))

    def functions(self, module: nn.Module) -> list[tuple[Any, str, Any]]:
        """What a call of the module runs: (owner, name, function as it was when it was declared)."""
        return self._functions[type(module)]

    def _children(self, module: nn.Module) -> "list[tuple[Part, nn.Module | None]]":
        children = module._modules
        if self._each is not None:
            return [(self._each, child) for child in children.values()]
        return [(part, children.get(name)) for name, part in self._parts.items()]

    def _read(self, module: nn.Module) -> tuple[Tensor, ...] | None:
        """The weights of a module and all below it, if they are as the list at the head of this file says."""
        if not self._allows(module):
            return None
        weights: list[Tensor | None] = []
        served = self._collect(module, weights) and self._plain(weights)
        return cast(tuple[Tensor, ...], tuple(weights)) if served else None

    def _plain(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether the kernel can read the weights where they lie."""
        if (first := weights[0]) is None or first.dtype not in self.engine.dtypes:
            return False
        for weight in weights:
            if weight is None or not _is_numbers(weight) or weight.dtype != first.dtype:
                return False
            if weight.device != first.device or not weight.is_contiguous():
                return False
            if not torch.compiler.is_compiling() and weight.is_neg():  # cannot be traced; there the operator sees to it
                return False
        return self.engine.serves(first.device)

    def _collect(self, module: nn.Module, weights: list[Tensor | None]) -> bool:
        """Whether the forward of the module is the one declared, and the calls below it; adds its weights."""
        attributes, parameters = module.__dict__, module._parameters
        if type(module) not in self._functions or any(name in attributes for name in self._hidden):
            return False
        for name in self._absent:
            if parameters.get(name, _nothing) is not None:  # nothing under its name: it may be anywhere
                return False
        for name in self._weights:
            weights.append(parameters.get(name))
        for part, child in self._children(module):
            if child is None or not part.plainly_called(child) or not part._allows(child):
                return False
            if not part._collect(child, weights):
                return False
        return True


class Watch:
    """What was read of a module, and whether all that it was read from is as it was then.

    It does not hold the module, which may keep it; copies of the module do not keep it.

    Args:
        part, module, weights: what was read.
        whole: whether it also sees what would make a call of the module itself, without gradients, another one.
    """

    def __init__(self, part: Part, module: nn.Module, weights: tuple[Tensor, ...], *, whole: bool = False) -> None:
        self.part, self.inputs, self._module = part, part.arrange(module, weights), weakref.ref(module)
        above, *below = part.walk(module)
        called = [above, *below] if whole else below
        children = [child for _, child in called]
        hooks = [vars(child)[name] for child in children for name in HOOKS]
        functions = {function[:2] for known, child in called for function in known.functions(child)}
        functions |= {(type(child), "__call__") for child in children}
        own = [(module, name) for name in ("_modules", "_parameters", *part.settings)]
        self._snapshot = kernels.Snapshot(
            sizes=[*hooks, *_global_hooks, *(vars(child) for child in children)],
            contents=[held for _, child in (above, *below) for held in (child._modules, child._parameters)],
            items=[(vars(child), name) for known, child in below for name in known.settings],
            objects=children,
            results=[*_modes(part.engine), torch._C._are_functorch_transforms_active],
            attributes=[*functions, *own, *CALLS, (torch.autograd.forward_ad, "_current_level")],
            tensors=weights,
        )

    def holds(self, module: nn.Module) -> bool:
        """Whether a kernel would read the same of the module, for which this was made."""
        return self._module() is module and self._snapshot.holds()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module has nothing read of it."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Nor has one from a file."""
        return type(None), ()


def unchanged_by_hooks(module: nn.Module) -> bool:
    """Whether all hooks of a module, if there are any, are onlookers (mixers/base.py)."""
    return all(getattr(hook, "looks_on", False) for name in HOOKS for hook in vars(module)[name].values())


LINEAR = Part(nn.Linear, weights=["weight"], absent=["bias"], uses=[(nn.functional, "linear")])
AFFINE = Part(nn.Linear, weights=["weight", "bias"], uses=[(nn.functional, "linear")])
RMS_NORM = Part(
    nn.RMSNorm,
    weights=["weight"],
    settings=["eps"],
    allows=lambda norm: norm.eps is not None,
    uses=[(nn.functional, "rms_norm")],
)
EMBEDDING = Part(
    nn.Embedding,
    weights=["weight"],
    settings=["max_norm"],
    allows=lambda embedding: embedding.max_norm is None,
    uses=[(nn.functional, "embedding")],
)


def undisturbed(engine: Engine = CPU) -> bool:
    """Whether torch's modules and operations now do what they are, and nothing besides. A `Watch` looks at the same."""
    if not engine.autocasts and torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():  # its own modes are on, and it looks at those of others itself
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None or any(_global_hooks):
        return False
    # a default device is a mode, too, which concerns new tensors only
    if torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return False
    return (nn.Module.__call__, nn.Module._call_impl) == _module_calls


def _modes(engine: Engine) -> list[Callable[[], Any]]:
    """Functions whose results change where `undisturbed` may."""
    functions = torch._C._len_torch_function_stack()
    modes = [torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state, torch._C._len_torch_function_stack]
    modes += [partial(torch._C._get_function_stack_at, i) for i in range(functions)]
    return modes if engine.autocasts else [*modes, partial(torch.is_autocast_enabled, "cpu")]


def transformed() -> bool:
    """Whether torch.compile, a trace, functorch or forward-mode differentiation looks at the operations now made."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def serves(engine: Engine, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the operators of a whole layer read x and what comes with it."""
    if x.dtype not in engine.dtypes or not engine.serves(x.device):
        return False
    return all(tensor is None or _is_numbers(tensor) for tensor in (x, *others))


def step_state(x: Tensor, state: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """The state from which a kernel may make a step of x (B, D), zeros if it is None; None where a kernel may not.

    Kernels make steps without gradients, of at most `kernels.STEP_ROWS` rows.

    Args:
        x, state: of the step.
        shape: D and the shape of the state, without B.
    """
    if torch.is_grad_enabled() or not _is_dense(x) or x.ndim != 2 or x.dtype not in CPU.dtypes or not x.is_cpu:
        return None
    if transformed():  # before a question about the number of rows, which an export may leave open
        return None
    rows, width = x.shape
    if not 0 < rows <= kernels.STEP_ROWS or width != shape[0]:
        return None
    if state is None:
        return x.new_zeros(rows, *shape[1:])
    if not _is_dense(state) or state.shape != (rows, *shape[1:]) or state.dtype != x.dtype or not state.is_cpu:
        return None
    return state


def gated(x: Tensor) -> Tensor:
    """silu(gate) * inner, the product within a SwiGLU, for x (..., 2 H) with the gates first, to (..., H).

    It has torch's operations wherever they are looked at: torch.compile fuses them by itself.
    """
    served = type(x) is Tensor and CPU.serves(x.device) and x.dtype in CPU.dtypes and x.numel()
    if served and not transformed() and undisturbed():
        return kernels.gated(x)
    gate, inner = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * inner


def _is_dense(tensor: object) -> bool:
    """Whether this is torch's own tensor, and holds all its numbers."""
    return type(tensor) is Tensor and tensor.layout == torch.strided


def _is_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is what it holds: no subclass, but for those by which torch itself traces programs."""
    return type(tensor) in PLAIN or type(tensor).__module__.startswith("torch._subclasses.")
