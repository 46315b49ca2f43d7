"""The grid of one adapted linear: its cells, its peers against fp64, its fits and comparisons."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_layer, common
from benchmarks.common import Timing
from benchmarks.expert_loop import ExpertLoop
from benchmarks.layers.cells import DEFAULT, ROUTINGS, SMALL, every_cell
from benchmarks.layers.growth import growth, regrets
from benchmarks.layers.peers import OTHERS, PEERS, Unable, runnable
from benchmarks.layers.problem import Problem

QUICK = {name: peer for name, peer in PEERS.items() if name != "dense_compiled"}
FEW = replace(SMALL, tokens=6)


def test_cells_have_names_of_their_own():
    assert 30 < len(DEFAULT) <= 60
    assert len({str(cell) for cell in DEFAULT}) == len(DEFAULT)
    full = every_cell()
    assert len({str(cell) for cell in full}) == len(full)
    assert [c.flops for c in full] == sorted(c.flops for c in full)
    assert len(every_cell(gpu=True)) > len(full)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing):
    cell = replace(SMALL, tokens=64, n=16, m=2, routing=routing)
    index = Problem(cell).index
    assert index.shape == (2, 64, 2)
    assert all(len(set(row)) == 2 for row in index.flatten(0, 1).tolist())
    share = torch.bincount(index.flatten(), minlength=16) / index.numel()
    if routing == "hot":
        assert sorted(index[0, 0].tolist()) == [0, 1]
        assert (index.sort(-1).values == torch.tensor([0, 1])).all()
    elif routing == "zipf":
        assert share[:4].sum() > share[8:].sum()
    elif routing == "sequence":
        runs = index.flatten(0, 1).view(8, 16, 2)
        assert (runs == runs[:, :1]).all()
        assert len(runs[:, 0].unique(dim=0)) > 1
    else:
        assert share.max() < 0.2


@pytest.mark.parametrize(
    "cell",
    [
        FEW,
        replace(FEW, backward=False),
        replace(FEW, m=3, k=4),
        replace(FEW, tokens=1, m=2),
        replace(SMALL, tokens=200, routing="hot"),
    ],
    ids=str,
)
def test_peers_are_right(cell):
    problem = Problem(cell)
    found, reasons = runnable(problem, QUICK)
    assert set(reasons) <= {"scattermoe", "gather"}
    assert set(found) | set(reasons) == set(QUICK)
    for forward in found.values():
        problem.run(forward)()
        assert problem.lora_A.grad is None


@pytest.mark.parametrize(("wrong", "tokens"), [("y", 6), ("dA", 6), ("y", 200), ("dA", 200)])
def test_a_wrong_peer_is_not_timed(wrong, tokens):
    def peer(problem):
        def forward():
            y = problem.remix()
            shift = problem.lora_A - problem.lora_A.detach()  # 0, with a gradient
            return y * 1.001 if wrong == "y" else y + 0.01 * shift.sum()

        return forward

    with pytest.raises(AssertionError, match=rf"bad at SmolLM2-135M-up-T.*{wrong} is off by"):
        runnable(Problem(replace(SMALL, tokens=tokens)), {"bad": peer})


def test_a_peer_that_breaks_is_left_out_and_ours_is_not():
    def peer(problem):
        return lambda: problem.x @ problem.x  # does not fit

    found, reasons = runnable(Problem(FEW), {"theirs": peer})
    assert not found
    assert "shapes cannot be multiplied" in reasons["theirs"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        runnable(Problem(FEW), {"remix": peer})


def test_what_cannot_run_says_why():
    def peer(problem):
        raise Unable("no such thing here")

    assert runnable(Problem(FEW), {"p": peer}) == ({}, {"p": "no such thing here"})
    assert set(OTHERS) & set(PEERS) == {"frozen", "lora_kr", "lora_nr"}


def row(cell, variant, time_ms, auto="dense", frozen=1.0):
    return {
        "cell": str(cell),
        "shape": cell.shape,
        "T": str(cell.tokens),
        "n": str(cell.n),
        "r": str(cell.r),
        "k": str(cell.k),
        "M": str(cell.m),
        "routing": cell.routing,
        "passes": "train" if cell.backward else "infer",
        "auto": auto,
        "variant": variant,
        "time_ms": str(time_ms),
        "over_frozen": str(time_ms / frozen),
    }


def test_growth_finds_the_exponent():
    rows = []
    for n in (4, 8, 16, 32):
        cell = replace(SMALL, n=n)
        rows += [row(cell, "frozen", 5.0), row(cell, "dense", 5.0 + 0.3 * n**0.7)]
        rows += [row(replace(cell, routing="hot"), "dense", 1e3)]  # not of this line
    (found,) = growth(rows)
    assert (found.axis, found.variant, found.sizes) == ("n", "dense", [4, 8, 16, 32])
    assert found.exponent == pytest.approx(0.7)
    assert found.last_exponent == pytest.approx(0.7)
    assert found.formula == "1"


def test_regret_is_over_the_fastest():
    rows = [row(SMALL, "dense", 1.8, "grouped"), row(SMALL, "grouped", 1.5, "grouped")]
    # The model as it is now takes dense, whatever the rows say that it took.
    assert regrets(rows) == {str(SMALL): ("dense", "grouped", pytest.approx(1.2))}
    assert regrets(rows[1:]) == {}  # what auto takes was not timed


def fake(monkeypatch, ratio, spread=0.02):
    """Timings in which ours takes `ratio` of the frozen linear."""

    def interleaved(runs, rounds, **options):
        times = {name: [10.0 * (1 + spread * i / 5) for i in range(5)] for name in runs}
        times["frozen"] = [10.0] * 5
        return {
            name: Timing(values if name == "frozen" else [ratio * t for t in values])
            for name, values in times.items()
        }

    monkeypatch.setattr(bench_layer, "interleaved", interleaved)
    monkeypatch.setattr(bench_layer, "peak_bytes", lambda run, warm: 0)


@pytest.fixture
def rows_file(request, tmp_path, monkeypatch):
    cell = replace(SMALL, tokens=32)
    fake(monkeypatch, 1.5, getattr(request, "param", 0.02))
    rows = bench_layer.measure(cell, ["frozen", "remix", "expert_loop"], 5, 1.0)
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("ratio", "spread", "code"),
    [(1.5, 0.02, 0), (1.62, 0.02, 0), (1.7, 0.02, 1), (1.0, 0.02, 0)],
)
def test_compare_fails_on_a_regression(ratio, spread, code, rows_file, monkeypatch, capsys):
    fake(monkeypatch, ratio, spread)
    assert bench_layer.compare(rows_file, 5, 1.0) == code
    out = capsys.readouterr().out
    assert ("slower: SmolLM2-135M-up-T32" in out) == bool(code)
    assert "expert_loop" not in out.split("compared with")[1]


@pytest.mark.parametrize(("rows_file", "code"), [(0.02, 1), (0.5, 0)], indirect=["rows_file"])
def test_noise_is_no_regression(rows_file, code, monkeypatch):
    fake(monkeypatch, 2.05)
    assert bench_layer.compare(rows_file, 5, 1.0) == code


def test_compare_needs_known_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("cell,variant,over_frozen\nnowhere,remix,1.0\n")
    with pytest.raises(SystemExit, match="no cell that is known"):
        bench_layer.compare(path, 5, 1.0)


def test_the_full_grid_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    cells = [replace(SMALL, tokens=tokens) for tokens in (1, 2, 3)]
    fake(monkeypatch, 1.5)
    monkeypatch.setattr(bench_layer, "every_cell", lambda: cells)
    for module in (bench_layer, common):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_layer, "prepare_cpu", lambda: None)
    options = ["bench_layer", "--full", "--peers", "remix"]
    monkeypatch.setattr("sys.argv", [*options, "--cells", "T1-", "T3-"])
    bench_layer.main()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", options)
    bench_layer.main()
    said = capsys.readouterr().out
    assert "-T2-" in said
    assert "-T1-" not in said
    with (tmp_path / "grid_full.csv").open() as file:
        written = [(row["T"], row["variant"]) for row in csv.DictReader(file)]
    assert written == [(t, v) for t in "132" for v in ("frozen", "remix")]


def test_a_mixture_by_a_loop_is_what_it_says():
    layer = ExpertLoop(torch.nn.Linear(5, 7), n=4, k=2, r=3)
    x = torch.randn(2, 6, 5)
    weights, index = (x @ layer.router.T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    every = torch.einsum("btd,nrd,nor->btno", x, layer.lora_A, layer.lora_B)
    chosen = every.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 7))
    want = layer.base(x) + (weights.unsqueeze(-1) * chosen).sum(2)
    torch.testing.assert_close(layer(x), want)
    layer(x).sum().backward()
    assert layer.router.grad.abs().max() > 0
