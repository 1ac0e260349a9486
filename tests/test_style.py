"""How the code reads, as far as `ast` can see it: plain literals, and one meaning for each name of a class."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("src", "tests", "experiments", "examples") for path in (ROOT / room).rglob("*.py"))
# (file, source of the splat) -> why it may stand
ALLOWED_SPLATS: dict[tuple[str, str], str] = {}
# name of a class -> why two may have it
ALLOWED_NAMES: dict[str, str] = {}

LITERALS = (ast.Tuple, ast.List, ast.Set, ast.Dict)


def splats(source: str) -> Iterator[str]:
    """Starred literals and ** of literals: entries that could stand in the call, list or dict itself.

    A name that is only known when the test runs could not: `f(**{name: value})` may stand.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Starred) and isinstance(node.value, LITERALS):
            yield ast.unparse(node)
        is_splat = isinstance(node, ast.keyword) and node.arg is None and isinstance(node.value, ast.Dict)
        if is_splat and {type(key) for key in node.value.keys} != {ast.Name}:
            yield f"**{ast.unparse(node.value)}"
        if isinstance(node, ast.Dict):
            inner = (value for key, value in zip(node.keys, node.values, strict=True) if key is None)
            yield from (f"**{ast.unparse(value)}" for value in inner if isinstance(value, ast.Dict))


SOURCES = {  # a piece of code, and the splats in it
    "f(*(1, 2), *rest)": ["*(1, 2)"],
    "rows = [*[0] * 3, *(x for x in y), *names]": [],
    "rows = [*[1, 2], *{3}]": ["*[1, 2]", "*{3}"],
    "f(**{'a': 1}, **options)": ["**{'a': 1}"],
    "f(**{name: 1})": [],
    "f(**{name: 1, 'a': 2}, **{**rest}, **{})": ["**{name: 1, 'a': 2}", "**{**rest}", "**{}"],
    "table = {'a': 1, **{'b': 2}, **{n: n for n in names}}": ["**{'b': 2}"],
    "def f(*items, **options): return g(*items, **options)": [],
}


@pytest.mark.parametrize("code", SOURCES)
def test_the_checker_finds_splats_of_literals(code):
    assert list(splats(code)) == SOURCES[code]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_literals_are_plain(path):
    name = str(path.relative_to(ROOT))
    assert [found for found in splats(path.read_text()) if (name, found) not in ALLOWED_SPLATS] == []


def classes() -> dict[str, list[str]]:
    """Name of a class -> the files of the package that define one of that name."""
    defined: dict[str, list[str]] = {}
    for path in FILES:
        if path.is_relative_to(ROOT / "src"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    defined.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    return defined


CLASSES = classes()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_name_has_one_meaning(name):
    assert len(CLASSES[name]) == 1 or name in ALLOWED_NAMES, CLASSES[name]
