"""The cost model's constants: fitted, written, found again, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path

import pytest
import torch

from remix_kernels import _costs
from remix_kernels._costs import SHIPPED, Costs, calibration_file, costs, write_calibration
from remix_kernels._dispatch import resolve_strategy, strategy_costs_s
from remix_kernels.calibrate import DECODING, TRAINING, Layer, Measured, fit, measure, regret

OTHER = Costs(2e-11, 4e-10, 1e-10, 3e-5, 1e-4, 5e-5)
FACTS: dict[str, object] = {"threads": torch.get_num_threads()}


def exactly(constants: Costs) -> list[Measured]:
    """What would be measured if the model were true."""
    found = []
    for shape, backward in [(s, True) for s in TRAINING] + [(s, False) for s in DECODING]:
        share = 1.0 if backward else 1.0 / 3.0
        for name, seconds in strategy_costs_s(*shape, itemsize=4, constants=constants).items():
            if name != "gather" or not backward:
                found.append(Measured(shape, backward, name, 1e-2, share * seconds))
    return found


@pytest.mark.parametrize("constants", [SHIPPED, OTHER, replace(OTHER, byte_s=0.0)], ids=str)
def test_fit_finds_the_constants(constants: Costs) -> None:
    assert astuple(fit(exactly(constants))) == pytest.approx(
        astuple(constants), rel=1e-3, abs=1e-13
    )


def test_fit_has_none_below_zero() -> None:
    """Where strategies are faster than no adapters at all, by noise."""
    noisy = [replace(m, over_s=-abs(m.over_s)) for m in exactly(SHIPPED)]
    assert astuple(fit(noisy)) == (0.0,) * 6


def test_regret_by_hand() -> None:
    shape = (1024, 576, 1536, 8, 4, 8)
    measured = [
        Measured(shape, True, "dense", 0.010, 0.005),
        Measured(shape, True, "grouped", 0.010, 0.002),
    ]
    ((taken, best, ratio),) = regret(measured, SHIPPED)
    assert (taken.strategy, best) == ("dense", "grouped")
    assert ratio == pytest.approx(15 / 12)


def test_measure_times_what_it_says() -> None:
    said: list[str] = []
    shapes = {"training": [(5, 6, 7, 4, 2, 3)], "decoding": [(1, 6, 7, 4, 2, 3)]}
    found = list(measure(0.0, **shapes, progress=said.append))
    assert [(m.backward, m.strategy) for m in found] == [
        (True, "dense"),
        (True, "grouped"),
        (False, "dense"),
        (False, "grouped"),
        (False, "gather"),
    ]
    assert all(m.frozen_s > 0 for m in found)
    assert said == ["T=5 6 -> 7 n=4 k=2 r=3", "T=1 6 -> 7 n=4 k=2 r=3"]
    layer = Layer((5, 6, 7, 4, 2, 3), True)
    assert all(len(set(row)) == 2 for row in layer.index.tolist())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("REMIX_CALIBRATION")
    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path))
    _costs.costs_with.cache_clear()
    yield tmp_path
    _costs.costs_with.cache_clear()


def test_written_constants_are_found(folder: Path) -> None:
    path = calibration_file()
    assert path == folder / "calibration.json"
    assert costs() == SHIPPED
    write_calibration(path, OTHER, FACTS)
    assert costs() == OTHER
    assert json.loads(path.read_text())["threads"] == torch.get_num_threads()
    assert [entry.name for entry in folder.iterdir()] == ["calibration.json"]


def test_constants_of_other_threads_are_not_used(folder: Path) -> None:
    path = folder / "calibration.json"
    write_calibration(path, OTHER, {"threads": torch.get_num_threads() + 1})
    assert costs() == SHIPPED


def test_a_named_file_is_used_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "mine.json"
    monkeypatch.setenv("REMIX_CALIBRATION", str(path))
    _costs.costs_with.cache_clear()
    with pytest.raises(ValueError, match="is not there: write it with `remix bench --calibrate`"):
        costs()
    write_calibration(path, OTHER, {"threads": 99})
    assert costs() == OTHER
    monkeypatch.setenv("REMIX_CALIBRATION", "shipped")
    _costs.costs_with.cache_clear()
    assert calibration_file() is None
    assert costs() == SHIPPED


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "no costs": "{}",
    "a name missing": json.dumps({"costs": {"flop_s": 1e-11}}),
    "a negative cost": json.dumps({"costs": {**asdict(OTHER), "byte_s": -1.0}}),
    "text": json.dumps({"costs": {**asdict(OTHER), "byte_s": "fast"}}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "calibration.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"calibration.json holds no calibration .*flop_s, byte_s"):
        assert costs() == SHIPPED
    monkeypatch.setenv("REMIX_CALIBRATION", str(path))
    _costs.costs_with.cache_clear()
    with pytest.raises(ValueError, match="holds no calibration"):
        costs()


def test_the_dispatch_follows_the_calibration(folder: Path) -> None:
    a, b = torch.empty(8, 8, 576), torch.empty(8, 1536, 8)
    problem = (1024, a, b, 2, torch.float32)
    assert resolve_strategy("auto", *problem) == "dense"
    free_experts = replace(SHIPPED, expert_call_s=0.0, pair_byte_s=0.0)
    write_calibration(folder / "calibration.json", free_experts, FACTS)
    assert resolve_strategy("auto", *problem) == "grouped"
