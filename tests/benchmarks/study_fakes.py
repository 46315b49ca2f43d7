"""Cells that do no work, for tests of the study's runner; loads no torch."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.study.plan import TASKS, Cell
from benchmarks.study.run import run_study

CELLS = [Cell("main", TASKS["trec"], name, 0, 1e-3, {}, 2) for name in "abc"]
# A cell of no work. The first time that b runs, it takes the runner with it.
FAKE = """
import json, os, pathlib, signal, sys
spec, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
method, done = spec["cell"]["method"], folder.parent.parent / "done"
with done.open("a") as file:
    file.write(method)
if done.read_text() == "ab":
    os.kill(os.getppid(), signal.SIGKILL)
if method == "c":
    sys.exit("broken")
(folder / "row.json").write_text(json.dumps({"digest": DIGESTS[method], "loss": "1"}))
"""
RUNNER = """
import sys
from pathlib import Path
from tests.benchmarks.study_fakes import run_fakes
run_fakes(Path(sys.argv[1]))
"""


def run_fakes(folder: Path) -> list[str]:
    """Run the study with them; returns what failed."""
    digests = {cell.method: cell.digest for cell in CELLS}
    (folder / "fake.py").write_text(f"DIGESTS = {digests}\n" + FAKE)
    return run_study(
        lambda rows: [cell for cell in CELLS if cell.digest not in rows],
        folder,
        folder / "data",
        folder / "study.csv",
        command=(sys.executable, str(folder / "fake.py")),
    )


def write_trec(root: Path) -> None:
    """A small data set in the layout of trec."""
    folder = root / "trec"
    folder.mkdir(parents=True)
    lines = [f"{i % 6} What is {i} ?" for i in range(230)]
    (folder / "TREC.train.all").write_text("\n".join(lines))
    (folder / "TREC.test.all").write_text("\n".join([*lines[:2], "0 How ?", "1 Who ?"]))
