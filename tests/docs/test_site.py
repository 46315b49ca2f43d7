"""The site: builds without a warning, and asks nobody else for anything when it is read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from remix_cli.config import option_fields
from remix_cli.parser import GROUP_TITLES, build_parser
from tests.conftest import ROOT

pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
site_hooks = pytest.importorskip("docs.site_hooks", reason="the extra `docs` is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site's folder."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link[^>]* rel=[\"']?stylesheet[^>]* href=[\"']?([^\"' >]+)", html)
        assert not [address for address in loaded if "//" in address], page.name


def test_formulas_are_mathml(site: Path) -> None:
    html = (site / "how-it-works.html").read_text(encoding="utf-8")
    assert html.count("<math") > 20 and html.count('display="block"') >= 5
    assert 'class="arithmatex"' not in html and "\\sum" not in html and "$$" not in html


def test_reference_shows_signatures_and_errors(site: Path) -> None:
    html = (site / "reference" / "remix_kernels.html").read_text(encoding="utf-8")
    assert 'id="remix_kernels.ops.routed_linear"' in html and "Raises:" in html


def test_tex_without_mathml_is_an_error() -> None:
    assert "<mfrac>" in site_hooks.to_mathml(r"\frac{1}{k r}", display=False)
    with pytest.raises(ValueError, match="nosuch"):
        site_hooks.to_mathml(r"\nosuch{x}", display=True)


def test_tables_have_every_option_and_flag() -> None:
    page = site_hooks.on_page_markdown("<!-- commands -->\n<!-- options -->")
    for item in option_fields(*GROUP_TITLES):
        assert f"\n| `{item.name}` | " in page
    assert all(f"### remix {name}\n" in page for name in build_parser()[1])
    assert "`--tasks TASK`" in page and "`--temperature " in page
