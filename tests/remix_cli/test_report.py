"""`remix report`: what is on the page, what is left out, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from remix_cli import main
from remix_cli.report.charts import MAX_POINTS, Chart, charts_of, thin
from remix_cli.report.page import page_of, table_of
from remix_cli.report.png import write_pngs
from remix_cli.report.runs import Run, read_runs
from tests.remix_cli.chromium import Chromium, find_chromium
from tests.remix_cli.helpers import cut, fails

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \u2028"
FILES = ("config.yaml", "metrics.json", "routing.jsonl")

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(workspace: Path, tmp_path: Path) -> MakeRun:
    """Copies of the finished run's files, with other metrics and other held-out routing."""

    def make(name: str, layer: dict[str, Any] | None = None, **metrics: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file in FILES:
            shutil.copy(workspace / "run" / file, folder)
        old = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**old, **metrics}))
        lines = [json.loads(text) for text in (folder / "routing.jsonl").open()]
        for line in lines:
            for held_out in line.get("held_out", []):
                held_out.update(layer or {})
        (folder / "routing.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return folder

    return make


def charts(*folders: Path, any_model: bool = False) -> tuple[list[Run], dict[str, Chart]]:
    runs, _ = read_runs(folders, any_model)
    return runs, {chart.id: chart for chart in charts_of(runs)}


# What is on the page ------------------------------------------------------------------------------


def test_charts_hold_what_the_run_did(make_run: MakeRun) -> None:
    share, tasks = [0.5, 0.5, 0.0, 0.0], {"add": [0.1, 0.2, 0.3, 0.4], "sort": [0.25] * 4}
    pairs = [[60, 30, 0, 0], [30, 60, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    given = {"expert_share": share, "task_share": tasks, "co_selection": pairs, "tokens": 100}
    folder = make_run("run", layer=given)
    metrics = json.loads((folder / "metrics.json").read_text())
    (run,), found = charts(folder)
    held_out, training = (view.data[0] for view in found["loss"].views)
    assert held_out["x"] == [0, 8]
    ends = [metrics["eval_loss_before"], metrics["eval_loss_after"]]
    assert held_out["y"] == pytest.approx(ends, rel=1e-4)
    assert training["x"] == [2, 4, 6, 8]
    assert [view.data[0]["y"] for view in found["ess"].views] == [[2.0] * 4] * 3  # k
    every, largest = (view.data["series"][0]["y"] for view in found["weights"].views)
    assert [i for i, s in enumerate(every) if s] == [10]  # all weights are 1 / 2
    assert every[10] == largest[10] == 1
    (experts,) = found["experts"].views
    assert experts.data["values"] == [[4 * s for s in share]] * 6
    assert experts.data["rows"][0] == "0.mlp.gate_proj"
    by_task, *of_layers = (view.data for view in found["tasks"].views)
    assert len(of_layers) == 6
    assert by_task["rows"] == ["add", "sort"]
    assert by_task["values"] == [pytest.approx([0.4, 0.8, 1.2, 1.6]), [1.0] * 4]
    lift = found["pairs"].views[0].data["values"]
    assert lift[0] == pytest.approx([1, 0.3 / 0.36, 0, 0], rel=1e-3)
    headings, (row,) = table_of([run])
    cells = dict(zip(headings, row, strict=True))
    assert cells["held-out loss"] == f"{metrics['eval_loss_after']:.4g}"
    assert (cells["n"], cells["k"], cells["ESS, worst token"]) == ("4", "2", "2")
    assert cells["never chosen"] == "12 of 24"


def test_runs_without_routers_have_losses_only(make_run: MakeRun) -> None:
    lora, remix = make_run("lora", method="lora"), make_run("remix")
    (lora / "routing.jsonl").unlink()
    runs, found = charts(lora, remix)
    assert [run.method for run in runs] == ["lora", "remix"]
    assert [curve["run"] for curve in found["loss"].views[0].data] == [0, 1]
    assert [curve["run"] for curve in found["ess"].views[0].data] == [1]
    (run,), found = charts(lora)
    assert [name for name, chart in found.items() if chart.views] == ["loss"]
    assert "No run here has routers" in page_of([run], [], list(found.values()))


def test_long_curves_are_thinned() -> None:
    points = [(float(i), float(i)) for i in range(10_000)]
    kept = thin(points)
    assert len(kept) == MAX_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert kept == sorted(set(kept))


def test_tasks_of_the_data_reach_the_report(workspace: Path, tmp_path: Path) -> None:
    """And the held-out loss is that of all tokens, though each task was evaluated by itself."""
    rows = [{"question": f"{a}+1?", "answer": "x" * (1 + a % 5)} for a in range(12)]
    losses = []
    for names in ({}, {0: "even", 1: "odd"}):
        data = tmp_path / f"{len(names)}.jsonl"
        tasks = [{"task": names[i % 2]} if names else {} for i in range(12)]
        lines = [json.dumps({**row, **task}) for row, task in zip(rows, tasks, strict=True)]
        data.write_text("\n".join(lines))
        folder = tmp_path / f"run{len(names)}"
        config = ["--config", str(workspace / "c.yaml"), "--dataset", str(data)]
        argv = ["--max-steps", "2", "--num-samples", "0", "--output-dir", str(folder)]
        assert main(["train", *config, *argv]) == 0
        losses.append(json.loads((folder / "metrics.json").read_text())["eval_loss_after"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    _, found = charts(folder)
    assert sorted(found["tasks"].views[0].data["rows"]) == ["even", "odd"]


# What is left out ---------------------------------------------------------------------------------


def test_broken_runs_are_left_out_and_said(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, half, torn, empty = (make_run(name) for name in ("good", "half", "torn", "empty"))
    (half / "metrics.json").unlink()
    cut(torn / "metrics.json")
    (empty / "metrics.json").write_text('{"train_steps": NaN, "loss_history": [3, {}]}')
    cut(good / "routing.jsonl")  # a line is lost, not the run
    page = tmp_path / "new" / "report.html"
    argv = ["report", *map(str, (good, half, torn, empty)), "--output", str(page)]
    assert main(argv) == 0
    text = page.read_text()
    for name, reason in (("half", "not finished"), ("torn", "cannot be read"), ("empty", "no st")):
        assert f"<strong>{name}</strong>: " in text
        assert reason in text
    capsys.readouterr()
    assert "no run can be shown (half: not" in fails(capsys, main(["report", str(half)]))


@pytest.mark.parametrize(
    "layer",
    [
        {"expert_share": "x"},
        {"expert_share": [1.0]},
        {"co_selection": [[1]]},
        {"task_share": {"a": [1, 2]}},
        {"weight_histogram": [float("nan")]},
        {"tokens": None},
        {"name": 3},
    ],
    ids=lambda layer: next(iter(layer)),
)
def test_statistics_of_another_shape_are_no_picture(make_run: MakeRun, layer: Any) -> None:
    runs, found = charts(make_run("run", layer=layer))
    assert not found["experts"].views
    assert found["ess"].views
    page_of(runs, [], list(found.values()))


def test_bad_arguments_are_sentences(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_run("a/run"), make_run("b/run")
    text = (other / "config.yaml").read_text().replace("model: ", "model: /elsewhere/", 1)
    (other / "config.yaml").write_text(text)
    (tmp_path / "plain").mkdir()
    cases = {
        ("nowhere",): "there is no folder nowhere",
        (str(tmp_path / "plain"),): "is no run's folder",
        (str(one), str(one)): "is given twice",
        (str(one), str(other)): "different base models, a/run of .* side by side with --any-model",
        (str(one), "--output", str(tmp_path)): "is a folder: name the page's file",
    }
    for argv, message in cases.items():
        error = fails(capsys, main(["report", *argv]))
        assert re.search(message, error), error
    page = tmp_path / "both.html"
    assert main(["report", str(one), str(other), "--any-model", "--output", str(page)]) == 0
    assert "of different base models: their losses cannot be compared" in page.read_text()


def test_pngs(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remix_cli.report.png._DPI", 100)
    lora, remix = make_run("lora"), make_run("remix", layer={"task_share": {"$a": [0.25] * 4}})
    (lora / "routing.jsonl").unlink()
    folder = tmp_path / "figures"
    page = ["--output", str(tmp_path / "r.html")]
    assert main(["report", str(lora), *page, "--png", str(folder)]) == 0
    runs, found = charts(remix)
    first = [replace(chart, views=chart.views[:1]) for chart in found.values()][1:]
    assert len(write_pngs(first, runs, folder)) == 7
    names = {path.name for path in folder.iterdir()}
    assert {"loss-1-training.png", "ess-0-worst-token-last-layer.png"} < names
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 10  # something is drawn


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install the package chromium, or set CHROMIUM to the program")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(make_run: MakeRun, tmp_path: Path) -> Path:
    """Three runs, one of them hostile, and one that is broken."""
    histogram = [6, 3, *[0] * 15, 2, 9, 0]
    remix = make_run("remix", layer={"task_share": {"add": [0.25] * 4, HOSTILE: [0.25] * 4}})
    mixlora = make_run("mixlora", layer={"weight_histogram": histogram}, method="mixlora")
    config = {"dataset": HOSTILE, "num_experts": HOSTILE, "seed": 10**400}
    hostile = make_run(HOSTILE.replace("/", "")[:60], method=HOSTILE, config=config)
    half = make_run("half")
    (half / "metrics.json").unlink()
    path = tmp_path / "report.html"
    folders = map(str, (remix, mixlora, hostile, half))
    assert main(["report", *folders, "--output", str(path)]) == 0
    return path


@pytest.mark.parametrize("width", [1100, 360], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_quiet_and_fits(browser: Chromium, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]  # and nothing else is fetched
    assert browser.run("document.scrollingElement.scrollWidth <= innerWidth")
    drawn = (
        "[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('.plot *').length)"
    )
    assert len(browser.run(drawn)) == 8
    assert min(browser.run(drawn)) > 10
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, paper[4:-1].split(","))) < 150 if scheme == "dark" else paper.count("255")
    # What the hostile run says is text.
    assert browser.run("[document.scripts.length, document.images.length]") == [2, 0]
    assert "onerror=alert(1)" in browser.run("document.body.innerText")
    assert "{{ 7 * 7 }}" in browser.run("document.body.innerText")


def test_every_picture_is_named_and_every_view_draws(browser: Chromium, page: Path) -> None:
    browser.open(page, 800)
    names = browser.run("[...document.querySelectorAll('.plot svg')].map(s => s.ariaLabel)")
    assert names[1].startswith("Effective sample size of the routing weights, worst token")
    assert "remix from 2 to 2" in names[1]
    assert browser.run("""[...document.querySelectorAll('select')].flatMap(s =>
        [...s.options].map(o => {
            s.value = o.value;
            s.dispatchEvent(new Event('change'));
            return s.closest('figure').querySelectorAll('.plot *').length > 10;
        })).every(Boolean)""")
    assert browser.complaints() == []


def middle(browser: Chromium, figure: str, x: float, y: float) -> None:
    """Hover over a point of a picture, in shares of its size."""
    left, top, width, height = browser.run(
        f"(() => {{ const s = document.querySelector('#{figure} svg'); s.scrollIntoView();"
        "const r = s.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
    )
    browser.hover(left + x * width, top + y * height)


def tip(browser: Chromium, figure: str) -> str | None:
    return browser.run(
        f"(t => t.hidden ? null : t.innerText)(document.querySelector('#{figure} .tip'))"
    )


def test_hovering_and_keys_say_the_values(browser: Chromium, page: Path) -> None:
    browser.open(page, 360)
    assert tip(browser, "ess") is None
    middle(browser, "ess", 0.95, 0.5)
    assert tip(browser, "ess").startswith("step 8\nremix: 2\nmixlora: 2")
    middle(browser, "weights", 0.58, 0.5)
    assert tip(browser, "ess") is None
    assert "remix: 100.0 %" in tip(browser, "weights")
    middle(browser, "tasks", 0.9, 0.3)
    assert tip(browser, "tasks") == "add\nexpert 3: 1"
    assert browser.run("document.scrollingElement.scrollWidth <= innerWidth")
    browser.run("document.querySelector('#tasks svg').focus()")
    for key in ("Escape", "ArrowRight", "ArrowRight", "ArrowDown"):
        browser.press(key)
    assert tip(browser, "tasks").endswith("expert 1: 1")
    assert tip(browser, "tasks").startswith("</script>")
    said = browser.run("document.getElementById('said').textContent")
    assert said.endswith("expert 1: 1")


def test_data_can_be_downloaded(browser: Chromium, page: Path, tmp_path: Path) -> None:
    browser.open(page, 800)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('[data-csv=ess]').click()")
    lines = browser.wait_for(tmp_path / "ess.csv").splitlines()
    assert lines[0] == "view,run,x,y"
    assert lines[1] == '"worst token, last layer",remix,2,2'
    assert len(lines) == 1 + 3 * 3 * 4
    assert browser.run("csv('table')").startswith("run,method,held-out loss before")
    assert browser.run("['=1+1', '-5', '-x', 'a,b', -5].map(csvCell).join(';')") == (
        "'=1+1;-5;'-x;\"a,b\";-5"
    )
    assert browser.complaints() == []
