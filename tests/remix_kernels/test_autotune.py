"""REMIX_AUTOTUNE: what is searched, that a search harms nothing, and what is remembered."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from remix_kernels import RoutedShape, routed_lora, warmup
from remix_model import ReMixConfig, RoutedLoRALinear, sample_routing
from tests.helpers import Case, assert_all_accurate, run, solve
from tests.remix_kernels.test_triton import DEVICE, op_of

_autotune = pytest.importorskip("remix_kernels._autotune")
observe = pytest.importorskip("remix_kernels._launch").observe
CPU = torch.device(DEVICE)
SHRINK = "_dense_fwd_shrink_kernel"
TINY = RoutedShape(16, 16, 2, 1, 2, torch.float32, backend="triton")

pytestmark = pytest.mark.usefixtures("strict_triton")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Searching switched on, with a clock of our own; what was measured, in order.

    Each configuration is run on the copies that a search makes, and larger ones count as faster.
    """
    measured: list[tuple[str, dict[str, Any]]] = []

    def measure(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any]) -> float:
        kernel[programs](**arguments)
        measured.append((kernel.fn.__name__, blocks_of(arguments)))
        return 1.0 / sum(blocks_of(arguments).values())

    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_autotune, "enabled", lambda device: True)
    monkeypatch.setattr(_autotune, "_measure", measure)
    monkeypatch.setattr(_autotune, "_decided", {})
    monkeypatch.setattr(_autotune, "_warned", set())
    return measured


def blocks_of(arguments: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in arguments.items() if name.startswith("BLOCK_")}


def run_tiny(rows: int = 4) -> None:
    warmup([TINY], rows=rows, verbose=False)


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


def test_what_was_found_is_used_and_kept(
    searches: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = RoutedShape(48, 40, 4, 2, 3, torch.float32, backend="triton", strategy="dense")
    used: list[dict[str, int]] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        if kernel.fn.__name__ == SHRINK:
            used.append(blocks_of(arguments))
        return True

    warmup([shape], rows=40)
    errors = capsys.readouterr().err
    assert f"tuned {SHRINK}" in errors
    assert "48 -> 40, n=4, k=2, r=3" in errors
    largest = max(
        (blocks for name, blocks in searches if name == SHRINK), key=lambda b: sum(b.values())
    )
    shipped = next(blocks for name, blocks in searches if name == SHRINK)
    assert largest != shipped
    searches.clear()
    for forgotten in (False, True):  # in this process; and in another one, which has the file
        if forgotten:
            monkeypatch.setattr(_autotune, "_decided", {})
        with observe(note):
            warmup([shape], rows=33)  # 33 and 40 round up to the same power of two
        assert not searches
        assert used
        assert all(blocks == largest for blocks in used)
        used.clear()


def test_other_sizes_are_searched_for_themselves(searches: list[Any]) -> None:
    """M selections of one x: the same arguments but for the number of pairs."""
    for selections in (1, 8):
        searches.clear()
        x, index = torch.randn(8, 16), torch.stack([torch.arange(3)[:2]] * 8)
        routed_lora(
            x,
            torch.randn(3, 2, 16),
            torch.randn(3, 16, 2),
            torch.stack([index] * selections),
            0.5,
            backend="triton",
            strategy="grouped",
        )
        assert "_grouped_shrink_kernel" in {name for name, _ in searches}


def test_shipped_configurations_of_two_sizes_are_not_mixed(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes round up to one, and their tiles of pairs differ: the grids are made for them."""
    monkeypatch.setattr("remix_kernels._configs.arch", lambda device: "sm_90")
    monkeypatch.setattr(_autotune, "_search", lambda kernel, grid, config, *rest: config)
    for T in (129, 174):
        case = Case(T=T, in_features=16, out_features=16, n=8, k=3, r=32)
        inputs, dy, eager, truth = solve(case, torch.float16, DEVICE)
        actual = run(op_of(case, "grouped"), inputs, case.trained, dy)
        assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize(
    "text", ['{"half": {"BLOCK', "[1]", '{"a": 3}'], ids=["cut", "a list", "no entries"]
)
def test_a_damaged_file_is_searched_for_anew(searches: list[Any], text: str) -> None:
    path = _autotune.cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    run_tiny()
    assert searches
    assert _autotune._read(path)


def test_entries_that_no_kernel_can_run_are_searched_for_anew(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny()
    path = _autotune.cache_file(CPU)
    entries = _autotune._read(path)
    broken = {key: dict.fromkeys(entry, 48) for key, entry in entries.items()}
    path.write_text(json.dumps(broken), encoding="utf-8")
    searches.clear()
    monkeypatch.setattr(_autotune, "_decided", {})
    run_tiny()
    assert searches
    assert _autotune._read(path) == entries


def test_a_folder_that_cannot_be_written_costs_a_warning(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not written"):
        run_tiny()
    searches.clear()
    run_tiny()
    assert not searches  # this process remembers


@pytest.mark.parametrize("failure", ["copies", "measure", "nothing runs"])
def test_a_search_that_fails_takes_the_shipped_configuration_once(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    attempts = []

    def out_of_memory(*_: Any) -> Any:
        attempts.append(failure)
        raise torch.OutOfMemoryError("no room")

    def nothing(*_: Any) -> float:
        attempts.append(failure)
        return math.inf

    name = "_copies" if failure == "copies" else "_measure"
    monkeypatch.setattr(_autotune, name, nothing if failure == "nothing runs" else out_of_memory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_tiny()
        once = len(attempts)
        run_tiny()
    assert len(attempts) == once > 0
    assert not _autotune._read(_autotune.cache_file(CPU))
    texts = [str(warning.message) for warning in caught]
    assert any("runs as shipped" in text for text in texts) == (failure != "nothing runs"), texts


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
    monkeypatch.setenv("REMIX_AUTOTUNE", "true")
    with pytest.raises(ValueError, match="REMIX_AUTOTUNE='true' is unknown; choose 0 or 1"):
        _autotune.enabled(torch.device("cuda"))


# warmup ---------------------------------------------------------------------------------------

Launched = set[tuple[str, tuple[torch.dtype, ...], tuple[tuple[str, Any], ...]]]


@contextmanager
def launches() -> Iterator[Launched]:
    """Every kernel that runs inside, with its tensors' dtypes and its constants: what compiles."""
    seen: Launched = set()

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        dtypes = tuple(v.dtype for v in arguments.values() if isinstance(v, torch.Tensor))
        constants = tuple(item for item in sorted(arguments.items()) if item[0].isupper())
        seen.add((kernel.fn.__name__, dtypes, constants))
        return True

    with observe(note):
        yield seen


@pytest.mark.parametrize("unordered", [False, True], ids=["ordered", "unordered"])
@pytest.mark.parametrize("strategy", ["auto", "dense", "grouped", "gather"])
def test_warmup_runs_what_a_model_will(strategy: str, unordered: bool) -> None:
    """Decoding, a plain training step and a sampled one launch nothing that is new."""
    layer = RoutedLoRALinear(
        torch.nn.Linear(24, 40, bias=False),
        num_experts=4,
        top_k=2,
        r=3,
        backend="triton",
        strategy=strategy,
        init_lora_weights=False,
    ).to(DEVICE)
    shape = RoutedShape(
        24, 40, 4, 2, 3, torch.float32, torch.float32, "triton", strategy, layer.router.device
    )
    random_state = torch.get_rng_state()
    with launches() as warmed:
        done = warmup(layer, rows=(1, 6), unordered=unordered, verbose=False)
    shape = shape._replace(unordered=unordered)
    assert done == [(shape, 1), (shape, 6)]
    assert torch.equal(torch.get_rng_state(), random_state)
    with launches() as used, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trained outside sample_routing, on purpose
        with torch.no_grad():
            layer.eval()(torch.randn(1, 24, device=DEVICE))
        layer.train()(torch.randn(6, 24, device=DEVICE, requires_grad=True)).sum().backward()
        log_prob = "unordered" if unordered else "ordered"
        with sample_routing(layer, num_selections=2, log_prob=log_prob, seed=0) as routing:
            x = routing.expand({"x": torch.randn(3, 24, device=DEVICE)})["x"]
            losses = layer(x.requires_grad_()).square().mean(-1, keepdim=True)
            loss = routing.loss(losses, torch.ones_like(losses, dtype=torch.bool))
        loss.backward()
    assert any("dense" in name or "grouped" in name for name, *_ in used)
    assert used <= warmed, used - warmed


@pytest.mark.parametrize("strategy", ["auto", "dense", "grouped", "gather"])
@pytest.mark.parametrize("router_type", ["mixlora", "hydralora", "remix"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_warmup_runs_what_learned_routers_and_dropout_will(
    router_type: str, lora_dropout: float, strategy: str
) -> None:
    layer = RoutedLoRALinear(
        torch.nn.Linear(24, 40, bias=False),
        num_experts=4,
        top_k=2,
        r=3,
        router_type=router_type,
        lora_dropout=lora_dropout,
        backend="triton",
        strategy=strategy,
    ).to(DEVICE)
    with launches() as warmed:
        done = warmup(layer, rows=(1, 6), verbose=False)
    assert len(done) == (4 if lora_dropout else 2)
    with launches() as used, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trained outside sample_routing, on purpose
        with torch.no_grad():
            layer.eval()(torch.randn(1, 24, device=DEVICE))
        layer.train()(torch.randn(6, 24, device=DEVICE, requires_grad=True)).sum().backward()
    assert len(used) > 2
    assert used <= warmed, used - warmed


def test_warmup_of_whole_blocks_leaves_out_their_last_linears() -> None:
    from peft import get_peft_model

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu())

    config = ReMixConfig(
        num_experts=4,
        top_k=2,
        r=3,
        router_type="mixlora_block",
        router_kwargs={"load_balancing_coef": 0.0},
        target_modules=["up", "down"],
        runtime_config={"backend": "triton"},
    )
    model = get_peft_model(torch.nn.Sequential(Block()), config).to(DEVICE)
    with launches() as warmed:
        done = warmup(model, rows=6, verbose=False)
    assert [(s.in_features, s.top_k, s.selections) for s, _ in done] == [(24, 1, 2)]
    up = model.base_model.model[0].up
    with launches() as used:
        y = up(torch.randn(6, 24, device=DEVICE, requires_grad=True))
        y.sum().backward()
    assert len(used) > 2
    assert used <= warmed, used - warmed


def test_warmup_of_a_peft_model() -> None:
    from peft import get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)).half()
    runtime = {"backend": "triton"}
    config = ReMixConfig(
        num_experts=4, top_k=2, r=3, target_modules=["0", "1"], runtime_config=runtime
    )
    done = warmup(get_peft_model(base, config).to(DEVICE), rows=4, verbose=False)
    assert [(s.in_features, s.out_features, s.dtype, s.adapter_dtype) for s, _ in done] == [
        (24, 40, torch.float16, torch.float32),
        (40, 24, torch.float16, torch.float32),
    ]


def test_warmup_has_nothing_to_do_for_pytorch() -> None:
    assert warmup([RoutedShape(8, 8, 2, 1, 1, backend="torch")]) == []


@pytest.mark.parametrize(
    "model,rows,message",
    [
        ([], (4, 0), r"rows=\(4, 0\) must all be at least 1"),
        (torch.nn.Linear(2, 2), 1, "Linear has no routed layers"),
        (torch.nn.ReLU(), 1, "ReLU has no routed layers"),
    ],
)
def test_warmup_says_what_is_wrong(model: Any, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warmup(model, rows=rows)
