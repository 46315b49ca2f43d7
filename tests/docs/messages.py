"""Our messages as the source has them, with `…` for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache

from tests.conftest import ROOT

PACKAGES = ("remix_kernels", "remix_model", "remix_cli")


@lru_cache(maxsize=1)
def templates() -> list[str]:
    """Every text in the packages, docstrings left out."""
    return [
        template
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for template in _texts(ast.parse(path.read_text(encoding="utf-8")))
    ]


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        yield re.sub("…+", "…", "".join(map(str, parts)))
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from _texts(child)
