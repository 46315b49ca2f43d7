"""`remix report`: what is on the page, what is left out, and the page in a real browser."""

from __future__ import annotations

import csv
import io
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
from remix_cli.report.png import COLOURS, _style, write_pngs
from remix_cli.report.runs import MAX_RUNS, Run, read_runs
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
    headings, (row,), (values,) = table_of([run])
    cells = dict(zip(headings, row, strict=True))
    assert cells["held-out loss"] == f"{metrics['eval_loss_after']:.4g}"
    assert (cells["n"], cells["k"], cells["ESS, worst token"]) == ("4", "2", "2")
    assert cells["never chosen"] == "12 of 24"
    plain = dict(zip(headings, values, strict=True))
    assert plain["held-out loss"] == metrics["eval_loss_after"]
    assert (plain["n"], plain["trainable"]) == (4, metrics["trainable_parameters"])


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
    text, said = page.read_text(), " ".join(capsys.readouterr().out.split())
    assert f"1runisin{page}" in said.replace(" ", "")  # lines end inside the path
    for name, reason in (("half", "not finished"), ("torn", "cannot be read"), ("empty", "no st")):
        assert f"<strong>{name}</strong>: " in text
        assert reason in text
        assert re.search(f"left out: {name}: .*{reason}", said)
    assert "<strong>good</strong>: lines of routing.jsonl" in text
    assert "shown in part: good: lines of routing.jsonl" in said
    assert "no run can be shown (half: not" in fails(capsys, main(["report", str(half)]))


@pytest.mark.parametrize("kept", [None, [], [0, 1, 2], [0, 1, 3, 4, 5]], ids=str)
def test_lost_routing_is_said(make_run: MakeRun, kept: list[int] | None) -> None:
    good, torn = make_run("good"), make_run("torn")
    routing = torn / "routing.jsonl"
    if kept is None:
        routing.unlink()
    else:
        lines = routing.open().readlines()
        assert len(lines) == 6  # layers, four logs, held-out data
        routing.write_text("".join(lines[i] for i in kept))
    runs, _ = charts(good, torn)
    assert runs[0].damage == ""
    assert "routing.jsonl, which says what its routers did" in runs[1].damage


def test_runs_that_were_scored_on_other_data_are_said(make_run: MakeRun) -> None:
    one, other = make_run("one"), make_run("other", eval_loss_before=1.0)
    runs, found = charts(one, other)
    assert "have different held-out losses" in page_of(runs, [], list(found.values()))
    runs, found = charts(one)
    assert "have different held-out losses" not in page_of(runs * 2, [], list(found.values()))


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


@pytest.mark.parametrize("count", [1, 2])
def test_one_log_entry_is_a_point(make_run: MakeRun, tmp_path: Path, count: int) -> None:
    """Where nothing is drawn, only the legend has the curve's colour."""
    entries = [{"step": step, "loss": 2.0} for step in range(count)]
    runs, found = charts(make_run("run", loss_history=entries))
    training = replace(found["loss"], views=found["loss"].views[1:])
    (path,) = write_pngs([training], runs, tmp_path)
    with Image.open(path) as image:
        picture = image.convert("RGB").crop((0, image.height // 3, *image.size))
    colour = tuple(bytes.fromhex(COLOURS[0][1:]))
    assert colour in [found for _, found in picture.getcolors(2**24)]


def test_curves_of_24_runs_differ() -> None:
    assert len({tuple(_style(run).values()) for run in range(MAX_RUNS)}) == MAX_RUNS


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
    history = [{"step": 4, "eval_loss": 3.25}, {"step": 8, "eval_loss": 2.5}]
    losses = {"eval_loss_before": 4.0, "eval_loss_after": 2.5, "eval_history": history}
    mixlora = make_run("mixlora", {"weight_histogram": histogram}, method="mixlora", **losses)
    config = {"dataset": HOSTILE, "num_experts": HOSTILE, "seed": 10**400}
    hostile = make_run(HOSTILE.replace("/", "")[:60], method=HOSTILE, config=config)
    half = make_run("half" + "w" * 90)  # longer than a phone is wide
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


CONTRAST = """(() => {
    const share = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = (css) => {
        const [r, g, b] = css.match(/[\\d.]+/g).map((v) => share(Number(v)));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return (selector, colour) => Math.min(...[...document.querySelectorAll(selector)].map((e) => {
        const own = light(getComputedStyle(e)[colour]);
        return Math.max(own, paper) / Math.min(own, paper);
    }));
})()"""
VARIABLES = """[...document.styleSheets[0].cssRules[0].style].map(
    (name) => getComputedStyle(document.documentElement).getPropertyValue(name))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_stands_out_from_the_paper(browser: Chromium, page: Path, scheme: str) -> None:
    """Contrast as WCAG 2 asks for: 4.5 for text, 3 for curves."""
    browser.open(page, 800, scheme=scheme)
    assert browser.run(f"{CONTRAST}('.plot text', 'fill')") >= 4.5
    assert browser.run(f"{CONTRAST}('h2, td, th, figcaption, .legend li, button', 'color')") >= 4.5
    assert browser.run(f"{CONTRAST}('.curve', 'stroke')") >= 3


def test_dark_mode_has_every_colour(browser: Chromium, page: Path) -> None:
    found = []
    for scheme in ("light", "dark"):
        browser.open(page, 800, scheme=scheme)
        found.append(browser.run(VARIABLES))
    assert len(found[0]) == len(found[1]) == 15
    assert [a for a, b in zip(*found, strict=True) if a == b] == []


def test_axes_and_curves_can_be_told_apart(browser: Chromium, page: Path) -> None:
    browser.open(page, 800)
    steps = [5e-7, 2e-5, 5e-4, 0.1, 2, 500, 1e5, 2e6]
    for start in (0, 0.003, 5.58, 1234, 3e6):
        for step in steps:
            ticks = f"[0, 1, 2, 3].map((i) => tickText({start} + i * {step}, {step}))"
            assert len(set(browser.run(ticks))) == 4, (start, step)
    styles = "new Set(Array.from({length: 24}, (_, i) => `${runClass(i)} ${dash(i)}`)).size"
    assert browser.run(styles) == 24


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
    middle(browser, "loss", 0.98, 0.5)
    before, after = browser.run("DATA.charts[0].views[0].data[0].y").copy()
    assert tip(browser, "loss").splitlines()[:3] == [
        "step 8", f"remix: {after:g}", "mixlora: 2.5"
    ]  # fmt: skip
    middle(browser, "loss", 0.55, 0.5)
    assert tip(browser, "loss") == "step 4\nmixlora: 3.25"  # the others were not scored there
    middle(browser, "loss", 0.16, 0.5)
    assert tip(browser, "loss").startswith(f"step 0\nremix: {before:g}\nmixlora: 4")
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
    assert said.startswith("</script>")


def plotted(chart: Chart) -> list[float]:
    """All values of a chart, view by view."""
    data = [view.data for view in chart.views]
    if chart.kind == "heat":
        return [value for view in data for row in view["values"] for value in row]
    series = [s for view in data for s in (view["series"] if chart.kind == "bars" else view)]
    return [value for s in series for value in s["y"]]


def test_data_can_be_downloaded(browser: Chromium, page: Path, tmp_path: Path) -> None:
    browser.open(page, 800)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('[data-csv=ess]').click()")
    lines = browser.wait_for(tmp_path / "ess.csv").splitlines()
    assert lines[0] == "view,run,x,y"
    assert lines[1] == '"worst token, last layer",remix,2,2'
    assert len(lines) == 1 + 3 * 3 * 4
    runs, _ = read_runs(sorted(folder for folder in page.parent.glob("*") if folder.is_dir()))
    names = browser.run("DATA.runs.map((run) => run.name)")
    runs.sort(key=lambda run: names.index(run.name))
    for chart in charts_of(runs):
        lines = list(csv.reader(io.StringIO(browser.run(f"csv('{chart.id}')"))))
        assert [line[-1] for line in lines[1:]] == [f"{v:g}" for v in plotted(chart)], chart.id
        assert {line[0] for line in lines[1:]} >= {view.label for view in chart.views[:1]}
    headings, *rows = csv.reader(io.StringIO(browser.run("csv('table')")))
    assert headings[:3] == ["run", "method", "held-out loss before"]
    cells = dict(zip(headings, rows[0], strict=True))
    assert float(cells["held-out loss"]) == runs[0].metrics["eval_loss_after"]
    assert int(cells["trainable"]) == runs[0].metrics["trainable_parameters"]
    assert dict(zip(headings, rows[2], strict=True))["n"] == ""  # a text, and so none
    assert browser.run("['=1+1', '-5', '-x', 'a,b', -5].map(csvCell).join(';')") == (
        "'=1+1;-5;'-x;\"a,b\";-5"
    )
    assert browser.complaints() == []


def test_a_single_point_and_the_last_tick_are_seen(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("run")
    metrics = json.loads((run / "metrics.json").read_text())
    entry = metrics["loss_history"][0]
    metrics |= {"eval_loss_before": None, "eval_loss_after": None, "eval_history": []}
    (run / "metrics.json").write_text(json.dumps({**metrics, "loss_history": [entry]}))
    long = make_run("long", loss_history=[{**entry, "step": step} for step in (0, 100_000)])
    for folder in (run, long):
        assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0
        browser.open(tmp_path / "r.html", 390)
        browser.run(
            "document.querySelectorAll('#loss select').forEach(s => {"
            "s.value = 1; s.dispatchEvent(new Event('change')); })"
        )
        points = browser.run("document.querySelectorAll('#loss circle').length")
        assert points == (1 if folder == run else 0)
        assert browser.run("""[...document.querySelectorAll('#loss svg text')].every((t) => {
            const own = t.getBoundingClientRect(), all = t.ownerSVGElement.getBoundingClientRect();
            return own.left >= all.left - 0.5 && own.right <= all.right + 0.5;
        })""")
