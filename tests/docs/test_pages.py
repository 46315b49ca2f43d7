"""What pages say of the code is true of it: messages, names, options, links."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

import remix_kernels
import remix_model
from remix_cli.parser import build_parser
from tests.conftest import ROOT
from tests.docs.messages import PACKAGES, templates
from tests.docs.pages import DOCS, PAGES, blocks_of, name_of

TROUBLES = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
# Messages on that page that are not ours.
OTHERS = {"KeyError: 'REMIX'": "PEFT's: test_unknown_method_is_a_bare_key_error"}


def prose_of(page: Path) -> str:
    """A page without its code blocks."""
    text = page.read_text(encoding="utf-8")
    for block in blocks_of(page):
        text = text.replace(block.text, "")
    return text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose_of(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def quoted_messages() -> list[str]:
    """The headings of the page, and what else it quotes as said by us."""
    headings = re.findall(r"^### `(.+)`$", TROUBLES, re.MULTILINE)
    return headings + [code for code in re.findall(r"`([^`\n]+)`", TROUBLES) if "…" in code[1:-1]]


@pytest.mark.parametrize("message", dict.fromkeys(quoted_messages()))
def test_quoted_message_is_in_the_source(message: str) -> None:
    if message not in OTHERS:
        assert any(message in template for template in templates()), "nobody says this any more"


def test_every_trouble_has_a_cause_and_a_fix() -> None:
    headings = re.split(r"^##+ .+$", TROUBLES, flags=re.MULTILINE)
    bodies = [body for body in headings[1:] if "\n**Fix:** " in body]
    assert len(bodies) == len(re.findall(r"^### ", TROUBLES, re.MULTILINE)) >= 50
    for body in bodies:
        cause, fix = body.strip().split("\n**Fix:** ")
        assert len(cause) > 20 and len(fix) > 5, body


def test_unknown_method_is_a_bare_key_error() -> None:
    from peft import PeftConfig

    with pytest.raises(KeyError) as raised:  # what from_pretrained calls
        PeftConfig.from_peft_type(peft_type="UNKNOWN")
    assert str(raised.value) == "'UNKNOWN'"


@pytest.mark.parametrize("package", [remix_kernels, remix_model], ids=lambda p: p.__name__)
def test_reference_has_every_public_name(package: object) -> None:
    name = package.__name__
    text = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
    listed = dict.fromkeys(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    documented = {path.rpartition(".")[2]: path for path in listed}
    assert not set(package.__all__) - set(documented)
    for attribute, path in documented.items():
        module, _, _ = path.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert getattr(package, attribute, found) is found, f"{path} is not {name}.{attribute}"


def test_reference_has_every_environment_variable() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    used = {
        name for path in sources for name in re.findall(r"REMIX_[A-Z_]+[A-Z]", path.read_text())
    }
    text = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(REMIX_\w+)` \|", text, re.MULTILINE)) == used


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (nav,) = re.findall(r"^nav:\n((?:  .*\n)+)", text, re.MULTILINE)
    pages = [str(page) for page in _leaves(yaml.safe_load(nav))]
    assert sorted(pages) == sorted(name_of(page)[len("docs/") :] for page in PAGES[1:])


def _leaves(node: object) -> list[object]:
    if isinstance(node, dict):
        node = list(node.values())
    return [leaf for item in node for leaf in _leaves(item)] if isinstance(node, list) else [node]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_flags_in_prose_exist(page: Path) -> None:
    prose, commands = prose_of(page), build_parser()[1]
    for missing in re.findall(r"Not there yet:[^.]*\.", prose):
        assert not set(re.findall(r"`remix ([a-z]+)", missing)) & set(commands), missing
        prose = prose.replace(missing, "")
    for command in re.findall(r"`remix ([a-z]+)\b[^`]*`", prose):
        assert command in commands, f"{name_of(page)} speaks of remix {command}"
    flags = {flag for parser in commands.values() for flag in parser._option_string_actions}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text()))
    for flag in re.findall(r"`(?:remix [a-z]+ )?(--[\w-]+)", prose):
        assert flag in flags, f"{name_of(page)} speaks of {flag}"
