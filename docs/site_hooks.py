"""What the site's pages get beside Markdown: TeX becomes MathML, marks become tables of options.

Browsers draw MathML by themselves, so that no page loads a script to show a formula.
"""

from __future__ import annotations

import html as escapes
import re
from argparse import Action, ArgumentParser
from typing import Any

from latex2mathml.converter import convert

from remix_cli.config import option_fields
from remix_cli.parser import GROUP_TITLES, _StoreField, build_parser

_TEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the command line's tables where a page asks for them."""
    markdown = markdown.replace("<!-- commands -->", commands())
    return markdown.replace("<!-- options -->", options())


def on_page_content(html: str, **_: Any) -> str:
    """Turn what arithmatex marked as TeX into MathML."""
    return _TEX.sub(lambda found: to_mathml(escapes.unescape(found[2]), found[1] == "div"), html)


def to_mathml(tex: str, display: bool) -> str:
    """MathML of a formula.

    Raises:
        ValueError: It holds a command that the converter does not know.
    """
    mathml = convert(tex.strip(), display="block" if display else "inline")
    unknown = re.search(r"\\[A-Za-z]+", escapes.unescape(mathml))
    if unknown:
        raise ValueError(f"{unknown[0]} in {tex!r} has no MathML: write it another way")
    return mathml


def commands() -> str:
    """Every command with the flags that are its own, in Markdown."""
    lines = []
    for name, parser in build_parser()[1].items():
        lines += [f"### remix {name}", "", str(parser.description), ""]
        own = [action for action in parser._actions if _is_own(action)]
        lines += _table(("flag", "what it does"), [_flag(parser, action) for action in own])
    return "\n".join(lines)


def options() -> str:
    """Every key of a configuration, group by group, in Markdown."""
    lines = []
    for group, title in GROUP_TITLES.items():
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        rows = []
        for item in option_fields(group):
            choices = item.metadata["choices"]
            takes = f": {', '.join(f'`{choice}`' for choice in choices)}" if choices else ""
            default = "" if item.default is None else f"`{item.default}`"
            rows.append((f"`{item.name}`", default, item.metadata["help"] + takes))
        lines += _table(("key", "default", "what it is"), rows)
    return "\n".join(lines)


def _is_own(action: Action) -> bool:
    """Whether a flag is neither an option of the configuration nor --help."""
    return not isinstance(action, _StoreField) and action.dest != "help"


def _flag(parser: ArgumentParser, action: Action) -> tuple[str, str]:
    metavar = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    if not action.option_strings:  # a word without a flag
        return f"`{metavar.strip()}`", str(action.help)
    return f"`{action.option_strings[-1]}{metavar}`", str(action.help)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [heads, ("---",) * len(heads), *rows]
    return [f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines] + [""]
