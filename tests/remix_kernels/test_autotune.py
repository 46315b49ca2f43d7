"""REMIX_AUTOTUNE: what is searched, that a search harms nothing, and what is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remix_kernels import RoutedShape, _autotune, warmup
from remix_kernels._launch import observe
from remix_model import ReMixConfig, RoutedLoRALinear
from tests.helpers import Case, assert_all_accurate, run, solve
from tests.remix_kernels.test_triton import DEVICE, op_of

CPU = torch.device(DEVICE)

pytestmark = pytest.mark.usefixtures("strict_triton")


@pytest.fixture
def searches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Searching switched on, with a clock of our own; what was measured, in order.

    Each configuration is run on the copies that a search makes, and larger ones count as faster.
    """
    measured: list[tuple[str, dict[str, Any]]] = []

    def measure(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> float:
        kernel[programs](**arguments)
        config = {name: value for name, value in arguments.items() if name.startswith("BLOCK_")}
        measured.append((kernel.fn.__name__, config))
        return 1.0 / sum(config.values())

    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_autotune, "enabled", lambda device: True)
    monkeypatch.setattr(_autotune, "_measure", measure)
    _autotune._load.cache_clear()
    yield measured
    _autotune._load.cache_clear()


@pytest.mark.parametrize("strategy", ["dense", "grouped", "gather"])
@pytest.mark.parametrize("options", [("linear",), ("base", "M3")], ids="-".join)
def test_a_search_changes_no_result(
    searches: list[Any], options: tuple[str, ...], strategy: str, nan_in_empty: None
) -> None:
    """Several kernels add to what they are given: they must not do so once a measurement."""
    case = Case(T=4 if strategy == "gather" else 20, options=options)
    inputs, dy, eager, truth = solve(case, torch.float32, DEVICE)
    actual = run(op_of(case, strategy), inputs, case.trained, dy)
    assert len(searches) > 4
    assert_all_accurate(actual, eager, truth)


def test_what_was_found_is_used_and_kept(searches: list[Any], capsys: Any) -> None:
    shape = RoutedShape(48, 40, 4, 2, 3, torch.float32)
    used: dict[str, int] = {}
    warmup([shape], rows=(40,), device=DEVICE, backend="triton")
    assert "tuned _dense_fwd_shrink_kernel" in capsys.readouterr().err
    best = max(sum(config.values()) for name, config in searches if name == SHRINK)
    searches.clear()

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        used[kernel.fn.__name__] = grid[0]
        return True

    _autotune._load.cache_clear()  # as another process: what it knows is in the file
    with observe(note):
        warmup([shape], rows=(33,), device=DEVICE, backend="triton")
    assert not searches  # 33 and 40 rows round up to the same power of two
    assert SHRINK in used
    key, found = next(
        (key, value)
        for key, value in _autotune._read(_autotune.cache_file(CPU)).items()
        if key.startswith(SHRINK)
    )
    assert "T=64" in key
    assert sum(v for name, v in found.items() if name.startswith("BLOCK_")) == best


SHRINK = "_dense_fwd_shrink_kernel"


def test_a_damaged_file_is_searched_for_anew(searches: list[Any]) -> None:
    path = _autotune.cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text('{"half": {"BLOCK', encoding="utf-8")
    warmup(
        [RoutedShape(16, 16, 2, 1, 2, torch.float32)], rows=(4,), device=DEVICE, backend="triton"
    )
    assert searches
    assert _autotune._read(path)


def test_a_folder_that_cannot_be_written_costs_a_warning(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path / "file"))
    _autotune._load.cache_clear()
    with pytest.warns(UserWarning, match="is not written"):
        warmup(
            [RoutedShape(16, 16, 2, 1, 2, torch.float32)],
            rows=(4,),
            device=DEVICE,
            backend="triton",
        )


def test_neighbours_stay_what_kernels_can_run() -> None:
    config = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 4, "CHUNK": 4096}
    assert [c["BLOCK_M"] for c in _autotune.neighbours(config, "BLOCK_M")] == [32]
    assert [c["BLOCK_N"] for c in _autotune.neighbours(config, "BLOCK_N")] == [128]
    assert [c["num_warps"] for c in _autotune.neighbours(config, "num_warps")] == [2, 8]
    assert not list(_autotune.neighbours(config, "CHUNK"))


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _autotune.enabled(torch.device("cuda"))
    monkeypatch.setenv("REMIX_AUTOTUNE", "1")
    assert _autotune.enabled(torch.device("cuda"))
    assert not _autotune.enabled(torch.device("cpu"))


# warmup ---------------------------------------------------------------------------------------


def test_warmup_runs_what_a_model_will() -> None:
    launched: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        launched.append(kernel.fn.__name__)
        return True

    layers = [
        RoutedLoRALinear(torch.nn.Linear(24, 40), num_experts=4, top_k=2, r=3) for _ in range(2)
    ]
    model = torch.nn.Sequential(*layers).to(DEVICE)
    with observe(note):
        done = warmup(model, rows=(1, 20), backend="triton", verbose=False)
    assert done == [
        (RoutedShape(24, 40, 4, 2, 3, torch.float32, torch.float32), rows) for rows in (1, 20)
    ]
    assert {SHRINK, "_dense_bwd_gram_kernel", "_sample_top_k_fwd_kernel"} <= set(launched), launched


def test_warmup_of_a_peft_model() -> None:
    from peft import get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)).half()
    config = ReMixConfig(num_experts=4, top_k=2, r=3, target_modules=["0", "1"])
    done = warmup(
        get_peft_model(base, config).to(DEVICE), rows=(4,), backend="triton", verbose=False
    )
    assert [(s.in_features, s.out_features, s.dtype, s.adapter_dtype) for s, _ in done] == [
        (24, 40, torch.float16, torch.float32),
        (40, 24, torch.float16, torch.float32),
    ]


def test_warmup_has_nothing_to_do_for_pytorch() -> None:
    assert warmup([RoutedShape(8, 8, 2, 1, 1)], backend="torch") == []


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([], (0,)), r"rows=\(0,\) must all be at least 1"),
        ((torch.nn.Linear(2, 2), (1,)), "Linear has no routed layers"),
    ],
)
def test_warmup_says_what_is_wrong(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warmup(arguments[0], rows=arguments[1])
