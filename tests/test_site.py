"""The documentation site: it is built without a warning, and a page of it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import statemix

pytest.importorskip("mkdocstrings", reason="mkdocs is not installed: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=1_200
    )
    assert built.returncode == 0, built.stderr
    return out


class Loaded(HTMLParser):
    """What a browser asks for when it shows a page: addresses of scripts, styles, fonts, pictures and frames."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "link" and named.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(named["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and named.get("src"):
            self.addresses.append(named["src"])
        self.addresses += re.findall(r"url\(([^)]*)\)|@import\s+([^;]*)", named.get("style") or "")


def test_what_a_page_loads_is_found():
    page = '<link rel=stylesheet href="a"><script src=b></script><img src=c><a href=d>e</a><p style="x: url(f)">'
    assert Loaded(page).addresses == ["a", "b", "c", ("f", "")]


def test_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for address in Loaded(page.read_text()).addresses:
            assert not re.match(r"(https?:)?//", str(address)), f"{page.relative_to(site)}: {address}"
            if page.name != "404.html":  # which is of no folder, so that its addresses are of the root
                assert (page.parent / address.partition("?")[0]).exists(), f"{page.relative_to(site)}: {address}"
    for style in site.rglob("*.css"):
        loaded = re.findall(r"url\(([^)]*)\)|@import\s+([^;]*)", style.read_text())
        assert not [pair for pair in loaded if re.search(r"//", "".join(pair)) and "data:" not in pair[0]], style


def test_every_public_name_is_in_the_api(site):
    shown = set(re.findall(r'id="(statemix\.[\w.]+)"', "".join(p.read_text() for p in site.glob("api/*.html"))))
    for name in statemix.__all__:
        value = getattr(statemix, name)
        assert {f"{value.__module__}.{name}"} <= shown, name
    assert "statemix.mixers.base.Mixer.step" in shown
