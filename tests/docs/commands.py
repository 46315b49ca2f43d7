"""Commands of the documentation: which of them run, and what holds for those that do not."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

from remix_cli import main
from remix_cli.config import build_config
from remix_cli.parser import parse_arguments
from tests.conftest import ROOT

# Parsed, not run: (words that a command begins with, why).
NOT_RUN = [
    ("remix eval --adapter runs/mine --tasks", "names tasks of the reader's"),
    ("remix bench", "measures for a minute"),
    ("REMIX_AUTOTUNE=1 remix train", "tunes kernels, for a GPU"),
]
# Neither parsed nor run, another program's or the shell's: (what a line begins with, why).
NOT_OURS = [
    ("python -m venv factory", "another environment, for LLaMA-Factory"),
    ('pip install . "transformers==5.6.0"', "likewise"),
    ("pip install --no-deps llamafactory", "likewise"),
    ("pip install torchaudio", "likewise"),
    ("export ", "sets a variable"),
    ("python -c", "lm-eval's own program, on tasks of the reader's"),
]
LAUNCHERS = ("python", "torchrun", "accelerate")  # of a module or a script, which is only checked
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")


def commands_of(text: str) -> list[list[str]]:
    """The commands of a bash block as words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    ours = [line for line in lines if not line.startswith(tuple(start for start, _ in NOT_OURS))]
    return [words for line in ours if (words := shlex.split(line, comments=True))]


def check(words: list[str], run: bool = True) -> None:
    """Fail unless a command is one of ours and right; run it where that is quick.

    Args:
        words: As the shell would pass them.
        run: False only parses.
    """
    while _ASSIGNMENT.match(words[0]):
        run, words = False, words[1:]
    skipped = any(" ".join(words).startswith(start) for start, _ in NOT_RUN)
    if words[0] == "remix":
        _check_remix(words[1:], run and not skipped)
    elif words[0] == "make":
        _check_make(words[1:])
    elif words[:2] == ["pip", "install"]:
        _check_pip(words[2:])
    elif Path(words[0]).name in LAUNCHERS:
        _check_launched(words[1:])
    else:
        raise AssertionError(f"{words[0]} is no command of this project: say how to check it here")
    for path in (word for word in words if word.startswith("examples/")):
        assert (ROOT / path).exists(), f"{path} is not there"


def _check_remix(argv: list[str], run: bool) -> None:
    args, overrides = parse_arguments(argv)
    if args.command in ("train", "validate"):
        build_config(overrides, args.config)
    if run:
        assert main(argv) == 0, f"remix {shlex.join(argv)} failed"


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if word.startswith("ARGS="):
            for path in re.findall(r"tests/[\w/.]*", word):
                assert (ROOT / path).exists(), f"{path} is not there"
        else:
            assert word in targets, f"make {word}: no such target"


def _check_pip(words: list[str]) -> None:
    setup = (ROOT / "setup.py").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    for word in (word for word in words if not word.startswith("-")):
        name, _, extras = word.rstrip("]").partition("[")
        if name in (".", "remix-lora"):
            for extra in extras.split(",") if extras else []:
                assert f'"{extra}": [' in setup, f"there is no extra {extra}"
        else:
            assert f"\n{word}\n" in pins, f"{word} is not what constraints.txt pins"


def _check_launched(words: list[str]) -> None:
    """`-m module ...`, or a script of ours, after the launcher's own flags."""
    if "-m" not in words:
        assert any(word.endswith(".py") for word in words), f"{words} starts nothing"
        return
    module, *rest = words[words.index("-m") + 1 :]
    if module == "remix_cli":
        _check_remix(rest, run=False)
    else:
        _check_module(module, rest)


def _check_module(module: str, words: list[str]) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"python -m {module}: no such module"
    if module.startswith("benchmarks."):
        source = Path(str(spec.origin)).read_text()
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in source, f"{module} has no {flag}"
        for path in (word for word in words if "/" in word):
            assert (ROOT / path).exists(), f"{path} is not there"
