"""`remix bench`: a table of strategies, and constants that are kept."""

from __future__ import annotations

import json

import pytest
import torch

from remix_cli import bench, main
from remix_kernels import _costs, calibrate

SMALL = (((40, 6, 7, 4, 2, 3), (8, 6, 7, 4, 2, 3)), ((1, 6, 7, 4, 2, 3),))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("REMIX_CALIBRATION")
    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path))
    _costs.costs_with.cache_clear()
    for module in (bench, calibrate):
        monkeypatch.setattr(module, "TRAINING", SMALL[0])
        monkeypatch.setattr(module, "DECODING", SMALL[1])
    original = calibrate.measure
    few = {"training": SMALL[0], "decoding": SMALL[1]}
    monkeypatch.setattr(bench, "measure", lambda *args, **more: original(*args, **more, **few))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    _costs.costs_with.cache_clear()


def test_bench_shows_every_strategy(cache, capsys):
    assert main(["bench", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    for word in ("dense", "grouped", "gather", "auto", "40 6 7 4 2 3", "train"):
        assert word in out
    assert "remix bench --calibrate" in out
    assert list(cache.iterdir()) == []


def test_calibrate_keeps_the_constants(cache, capsys):
    assert main(["bench", "--calibrate", "--seconds", "0.01", "--threads", "1"]) == 0
    path = cache / "calibration.json"
    written = json.loads(path.read_text())
    assert written["threads"] == 1
    assert _costs.costs() == _costs.Costs(**written["costs"])
    assert written["worst_choice_over_fastest"] >= 1.0
    assert "calibration.json;deleteittogoback" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0; it must be at least 1"),
        (["--seconds", "0"], "--seconds 0.0; it must be positive"),
    ],
)
def test_bad_values(arguments, message, cache, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nowhere_to_write(cache, monkeypatch, capsys):
    monkeypatch.setenv("REMIX_CALIBRATION", "shipped")
    assert main(["bench", "--calibrate"]) == 2
    assert "unset it, or name the file" in capsys.readouterr().err
