"""What every test of the command line gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remix_cli import main
from tests.remix_cli.helpers import make_model


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, a configuration and a finished run in `run`; to be read, not changed."""
    root = tmp_path_factory.mktemp("work space")  # with a space, as a user's path may have
    make_model(root / "model")
    rows = [{"question": f"{a}+{b}?", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "c.yaml").write_text(
        f"model: {root / 'model'}\ndataset: {root / 'sums.jsonl'}\n"
        'prompt_template: "{question}"\nresponse_field: answer\neval_size: 6\n'
        "num_experts: 4\ntop_k: 2\nr: 2\nnum_selections: 2\nlearning_rate: 1e-2\nmax_steps: 8\n"
        "per_device_train_batch_size: 6\nsave_steps: 4\nlogging_steps: 2\nmax_new_tokens: 4\n"
        "device: cpu\n"
    )
    assert main(["train", "--config", str(root / "c.yaml"), "--output-dir", str(root / "run")]) == 0
    return root


@pytest.fixture
def finished(workspace: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, with checkpoints 4 and 8."""
    return Path(shutil.copytree(workspace / "run", tmp_path / "run"))
