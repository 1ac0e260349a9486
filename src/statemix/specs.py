"""Specs: a thing to build as a dict, its registered name and its constructor's keyword arguments. JSON as it stands."""

import inspect
from collections.abc import Mapping
from typing import Any

Spec = Mapping[str, Any]  # {"name": "bd_lru", "num_blocks": 16, "block_size": 3}


def options(cls: type, given: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """The constructor's parameters that a spec sets: all but those `given` by the builder."""
    return [p for p in inspect.signature(cls).parameters.values() if p.name not in given]


def complete(kind: str, classes: Mapping[str, type], spec: Spec, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """The spec with every option it left out at its default.

    Args:
        kind: "mixer" or "task", for messages.
        classes: the registry: name -> class.
        spec: a name in it, and options.
        given: parameters that are not the spec's to set.

    Raises:
        TypeError: the spec is not a mapping.
        ValueError: the name or an option is unknown, or an option without a default is missing.
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"{kind}: a spec must be a mapping with a `name` of {sorted(classes)}, got {spec!r}.")
    name = spec.get("name")
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"{kind}: `name` must be one of {sorted(classes)}, got {name!r}.")
    known = {p.name: p.default for p in options(classes[name], given)}
    for key in spec:
        if key != "name" and key not in known:
            raise ValueError(f"{kind}: `{key}` is not an option of {name!r}, which has {sorted(known)}.")
    filled = {"name": name, **known, **spec}
    for key, value in filled.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{kind}: {name!r} needs the option `{key}`, got {dict(spec)}.")
    return filled
