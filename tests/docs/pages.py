"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = ("python", "bash", "yaml", "json", "text")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*) *(title=\"(?P<title>[^\"]+)\")?(?P<rest>.*)$"
)


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is the file's line on which its text begins."""

    page: str
    line: int
    language: str
    title: str | None
    text: str

    @property
    def place(self) -> str:
        """Where it is, as errors say it."""
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    """A page's path, seen from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a page, in order.

    Raises:
        ValueError: A block has another language, does not end, or is made by indentation.
    """
    blocks, opened, inside = [], None, []
    directive = False  # mkdocstrings' options are indented too
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        directive = line.startswith(":::") or (directive and bool(line.strip()))
        if opened is not None:
            if line.strip() == "```":
                text = textwrap.dedent("\n".join(inside)) + "\n"
                blocks.append(Block(name_of(page), *opened, text))
                opened = None
            inside.append(line)
        elif fence:
            language, rest = fence["language"], fence["rest"]
            if language not in LANGUAGES or rest:
                raise ValueError(
                    f"{name_of(page)}:{number}: {line.strip()!r} must be one of "
                    f'{", ".join(LANGUAGES)}, with title="..." or nothing after it'
                )
            opened, inside = (number + 1, language, fence["title"]), []
        elif line.startswith("    ") and line.strip() and not directive:
            raise ValueError(f"{name_of(page)}:{number}: indented code would not be run: fence it")
    if opened is not None:
        raise ValueError(f"{name_of(page)}:{opened[0]}: the block does not end")
    return blocks
