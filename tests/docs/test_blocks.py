"""Every code block of README and the documentation is run, or checked as far as it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from remix_cli.config import RunConfig, read_yaml
from tests.docs.commands import check, commands_of
from tests.docs.given import GIVEN
from tests.docs.pages import PAGES, Block, blocks_of, name_of

# Configurations of other programs, which only have to be YAML: (page, first line of the block).
OTHER_YAML = {
    ("docs/ways-in-and-out.md", "task: my_task"),
    ("docs/ways-in-and-out.md", "# sums.yaml: LLaMA-Factory's own keys, and ReMix's"),
}
# Python that is only compiled: (page, first line of the block), and why.
NOT_RUN = {
    ("docs/ways-in-and-out.md", "from remix_model import evaluate_tasks"): "the reader's tasks",
    ("docs/distributed.md", "from remix_model import sample_routing, token_losses"): "8 processes",
}


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run one block, with tracebacks that point into the page."""
    if block.title is not None:
        Path(block.title).write_text(block.text)
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
        if (block.page, block.text.splitlines()[0]) not in NOT_RUN:
            exec(code, namespace)
    elif block.language == "bash":
        for words in commands_of(block.text):
            check(words)
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        check_yaml(block)


def check_yaml(block: Block) -> None:
    if (block.page, block.text.splitlines()[0]) in OTHER_YAML:
        assert isinstance(yaml.safe_load(block.text), dict)
        return
    path = Path(block.title or "block.yaml")
    path.write_text(block.text)
    RunConfig(**read_yaml(path))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_runs(page: Path, desk: Path) -> None:
    blocks = blocks_of(page)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if any(block.language in ("python", "bash") for block in blocks):
        namespace.update(GIVEN.get(name_of(page), dict)())
    for block in blocks:
        try:
            run(block, namespace)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error
