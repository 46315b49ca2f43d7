"""`remix train` on two processes, of every method: what one process trains with twice the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remix_cli import main
from remix_cli.options import PEFT_METHODS
from tests.ranks import run_on_two_ranks
from tests.remix_cli.helpers import make_model

POOL = ("--num-experts", "4", "--top-k", "2", "--r", "2")
# xlora needs adapters to mix; experts that ranks draw by themselves are not one process's.
METHODS: dict[str, tuple[str, ...]] = {
    **{method: () for method in PEFT_METHODS if method != "xlora"},
    "hydralora": (*POOL, "--top-k", "4"),
    "mixlora": (*POOL, "--router-kwargs", "{load_balancing_coef: 0}"),  # of each rank's tokens
    "mor": POOL,
    "remix": (*POOL, "--num-selections", "2"),
}


def train(method: str, folder: Path, run: str, *argv: str) -> None:
    """Three steps of a tiny model, evaluated before and after."""
    given = ["--model", str(folder / "model"), "--dataset", str(folder / "sums.jsonl")]
    steps = ["--max-steps", "3", "--save-steps", "100", "--eval-size", "6", "--num-samples", "0"]
    out = ["--output-dir", str(folder / run), "--device", "cpu", "--learning-rate", "1e-2"]
    assert main(["train", *given, *steps, *out, "--method", method, *METHODS[method], *argv]) == 0


def rank_trains(rank: int, method: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    # Ranks share the batch's selections, or the batch.
    argv = ["--selection-parallel", "2"] if method == "remix" else []
    batch = "4" if method == "remix" else "2"
    train(method, folder, "two", "--per-device-train-batch-size", batch, *argv)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_does(method, tmp_path):
    make_model(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}?", "response": str(a + b)} for a in range(6) for b in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(method, tmp_path, "one", "--per-device-train-batch-size", "4")
    run_on_two_ranks(rank_trains, method, tmp_path)
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-4, atol=2e-5)
    # Of 6 examples in batches of 8: the second rank has repeats, which count once.
    ends = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two")]
    for when in ("eval_loss_before", "eval_loss_after"):
        assert ends[1][when] == pytest.approx(ends[0][when], rel=1e-5)
    assert ends[1]["eval_loss_after"] != ends[1]["eval_loss_before"]
