"""`accelerate launch -m remix_cli`, sharded by FSDP2 over two processes, to its end.

REMIX_TEST_LAUNCH=1 runs it: every launch imports everything anew in three processes, which takes
one to three minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remix_cli import main
from tests.remix_cli.helpers import make_model

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("REMIX_TEST_LAUNCH") != "1", reason="REMIX_TEST_LAUNCH is not 1"
    ),
]


def launch(*argv: str) -> str:
    """Run a command of ours by accelerate's launcher and return what it prints."""
    set_up = ["--config_file", "examples/accelerate/8gpu_fsdp2.yaml", "--num_processes", "2"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *set_up),
            *("--mixed_precision", "no", "--main_process_port", "0"),
            *("-m", "tests.distributed.as_gpus", *argv),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_a_sharded_run_ends_is_resumed_and_answers(tmp_path, capsys):
    make_model(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}?", "response": str(a + b)} for a in range(6) for b in range(6)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    sizes = ["--num-experts", "4", "--top-k", "2", "--r", "2", "--num-selections", "2"]
    steps = ["--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--eval-size", "6"]
    given = ["--model", str(tmp_path / "model"), "--dataset", str(data), "--device", "cpu"]
    launch("train", *given, *sizes, *steps, "--output-dir", str(run))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train_steps"] == 4
    assert metrics["eval_loss_after"] != metrics["eval_loss_before"]
    assert len(metrics["routing"]["layers"]) == 6
    straight = load_file(run / "adapter_model.safetensors")

    assert (run / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    shutil.rmtree(run / "checkpoint-4")
    (run / "metrics.json").unlink()
    assert "continuing from" in launch("train", "--output-dir", str(run), "--resume")
    resumed = load_file(run / "adapter_model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    argv = ["--adapter", str(run), "--max-new-tokens", "4", "--compare"]
    assert main(["generate", *argv, "--prompt", "1+2?"]) == 0
    assert "with the adapter" in capsys.readouterr().out
