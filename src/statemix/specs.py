"""Specs: a thing to build as a dict, the name of its class and its constructor's keyword arguments. JSON as it stands.

A name is a registered one, or the path of a class of one's own, "my_pkg.layers:Mine". Nothing is imported
because a spec names it: a config or a checkpoint may come from anywhere, and to import a module is to run it. So a path
is looked up among the modules that this process has imported, and else refused; who trusts a module imports it.
"""

import inspect
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn, TypeVar, cast

Spec = Mapping[str, Any]  # {"name": "bd_lru", "num_blocks": 16, "block_size": 3}
T = TypeVar("T")

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class NotImportedError(ValueError):
    """A spec names a class of a module that this process has not imported."""


class Registry(dict[str, type[T]]):
    """Classes by name: of the registered ones, and, when asked for by its path, of any that is below `base`.

    Args:
        kind: "mixer" or "task", for messages.
        base: what every class is a subclass of.
        classes: the registered ones.
    """

    def __init__(self, kind: str, base: type, classes: Mapping[str, type[T]]) -> None:
        super().__init__(classes)
        self.kind, self.base = kind, base

    def __getitem__(self, name: object) -> type[T]:
        """As of every dict; a name that is no text, and perhaps cannot be looked up, is refused as an unknown one."""
        return super().__getitem__(name) if isinstance(name, str) else self.__missing__(name)

    def __missing__(self, name: object) -> type[T]:
        """The class at a path. Raises ValueError if there is none, NotImportedError if its module is not imported."""
        if not isinstance(name, str) or ":" not in name:
            raise ValueError(f"{self.kind}: `name` must be one of {sorted(self)}, got {name!r}.")
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            self._refuse(name, "have the form 'package.module:Class'", repr(name))
        if (imported := sys.modules.get(module)) is None:
            raise NotImportedError(
                f"{self.kind}: the module {module!r} of {name!r} must be imported before it is used, for nothing is "
                f"imported because a file names it. If you trust it: `import {module}`, or --import {module}."
            )
        found: Any = vars(imported).get(attribute)  # not getattr: a module may import more when asked for a name
        if found is None:
            self._refuse(name, f"name a class of {module!r}", f"{attribute!r}, which it has not")
        if not isinstance(found, type) or not issubclass(found, self.base) or found is self.base:
            self._refuse(name, f"name a subclass of {self.base.__name__}", repr(found))
        if inspect.isabstract(found):
            missing = sorted(vars(found)["__abstractmethods__"])
            self._refuse(name, f"define {missing}", "none of its own")
        return cast("type[T]", found)

    def _refuse(self, name: str, rule: str, got: str) -> NoReturn:
        raise ValueError(f"{self.kind}: `name` {name!r} must {rule}, got {got}.")


def file_name(name: str) -> str:
    """The name of a spec as a part of that of a file, in which Windows has no colon."""
    return name.replace(":", ".")


def module_of(name: str) -> str:
    """The module of a path."""
    return name.partition(":")[0]


def modules_of(*specs: Spec) -> tuple[str, ...]:
    """The modules that specs need for classes that are not registered, each once."""
    return tuple(dict.fromkeys(module_of(spec["name"]) for spec in specs if ":" in spec["name"]))


def import_named(owner: str, module: str) -> None:
    """Import a module that the caller has named; the current folder is searched, too, after all else.

    Raises:
        ValueError: there is no such module, or it fails, whatever it raises; in the name of `owner`.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        import_module(module)
    except Exception as error:
        raise ValueError(f"{owner}: {module!r} cannot be imported: {type(error).__name__}: {error}") from error


def options(cls: type, given: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """The constructor's parameters that a spec sets: all with a name of their own but those `given` by the builder."""
    parameters = inspect.signature(cls).parameters.values()
    return [p for p in parameters if p.name not in given and p.kind not in VARIADIC]


def complete(classes: Registry[Any], spec: Spec, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """The spec with every option it left out at its default.

    Args:
        classes: those that the spec may name.
        spec: a name, and options.
        given: parameters that are not the spec's to set.

    Raises:
        TypeError: the spec is not a mapping.
        ValueError: the name or an option is unknown, or an option without a default is missing.
    """
    kind = classes.kind
    if not isinstance(spec, Mapping):
        raise TypeError(f"{kind}: a spec must be a mapping with a `name` of {sorted(classes)}, got {spec!r}.")
    name = spec.get("name")
    cls = classes[name]
    known = {p.name: p.default for p in options(cls, given)}
    for key in spec:
        if key != "name" and key not in known:
            raise ValueError(f"{kind}: `{key}` is not an option of {name!r}, which has {sorted(known)}.")
    filled = {"name": name, **known, **spec}
    for key, value in filled.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{kind}: {name!r} needs the option `{key}`, got {dict(spec)}.")
    return filled
