"""`remix env`: a report that works above all where something is wrong."""

from __future__ import annotations

import pytest
import torch

from remix_cli import main


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert "default backend" in output


def test_backend_that_is_not_there_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMIX_BACKEND", "vulkan")
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert "none: REMIX_BACKEND='vulkan' is unknown" in " ".join(output.replace("│", " ").split())
