"""JSON that anyone may have edited: read by rules of our own, and of the form that is asked for before it is used.

A form says what a value must be:

    int                              a count: a whole number in [0, 2^63)
    float                            a number, also an infinite one, but not NaN
    str, bool, dict, list, A | None  as in Python; `object` is anything
    [form]                           a list, each part of it of the form
    {"a": form, "b?": form}          an object that has `a`, and maybe `b`; what else it has is let be
    {str: form}                      an object whose other fields are all of the form
"""

import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args

COUNTS = range(2**63)
NAMES = {int: "a whole number in [0, 2^63)", float: "a number", str: "a text", bool: "true or false"}
NAMES |= {dict: "an object", list: "a list", type(None): "null"}


def read(path: Path, form: object, owner: str, remedy: str = "") -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is not JSON, or not of the form; `owner` begins the message, which names
            file and field, and `remedy` ends it.
    """
    try:
        value = parse(path.read_bytes())
        check(value, form)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(owner, path, error, remedy) from error
    return value


def read_lines(path: Path, form: object, owner: str, remedy: str = "") -> list[Any]:
    """The values of a file of JSON lines, but for a last line that was cut short. Raises as `read`."""
    values = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):
                try:
                    value = parse(line)
                    check(value, form)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
                values.append(value)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(owner, path, error, remedy) from error
    return values


def damaged(owner: str, path: Path, what: object, remedy: str = "") -> ValueError:
    """The error that a file is not as it was written, and what to do."""
    return ValueError(f"{owner}: '{path}' is damaged: {what}.{remedy and ' '}{remedy}")


def parse(content: bytes | str) -> Any:
    """The value of a JSON text.

    A whole number outside [-2^63, 2^63) becomes a float: what asks for a whole number then refuses it by its name.

    Raises:
        ValueError: it is not UTF-8 or not JSON, it is nested too deep, a field is there twice, or a text in it is not
            valid Unicode.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a pair stands for no character and cannot be written
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it is not valid Unicode: it has half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value


def check(value: Any, form: Any, name: str = "") -> None:
    """Raise ValueError, naming the field, unless a value is of a form."""
    if isinstance(form, dict):
        _check_kind(value, dict, name)
        for key, part in _fields(value, form, name):
            check(value[key], part, f"{name}.{key}" if name else key)
    elif isinstance(form, list):
        _check_kind(value, list, name)
        for number, part in enumerate(value):
            check(part, form[0], f"{name}[{number}]")
    else:
        _check_kind(value, form, name)


def _fields(value: dict[str, Any], form: dict[Any, Any], name: str) -> Iterator[tuple[str, Any]]:
    """Each field of an object of which the form says something, and what it says."""
    named = {key.removesuffix("?"): part for key, part in form.items() if key is not str}
    for key in form:
        if key is not str and not key.endswith("?") and key not in value:
            raise ValueError(f"`{name}.{key}` is missing" if name else f"`{key}` is missing")
    for key in value:
        if key in named or str in form:
            yield key, named.get(key, form.get(str))


def _check_kind(value: Any, form: Any, name: str) -> None:
    kinds = get_args(form) if isinstance(form, UnionType) else (form,)
    if not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(NAMES[kind] for kind in kinds)
        raise ValueError(f"`{name or 'the content'}` must be {wanted}, got {reprlib.repr(value)}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; true and false are no numbers."""
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is int:
        return isinstance(value, int) and value in COUNTS
    if kind is float:
        return isinstance(value, int | float) and value == value
    return isinstance(value, kind)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"`{reprlib.repr(key)[1:-1]}` is there twice")
        fields[key] = value
    return fields


def _whole_number(digits: str) -> int | float:
    number = int(digits) if len(digits) < 21 else 2**63  # Python itself refuses to read very many
    return number if -(2**63) <= number < 2**63 else float(digits)
