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
# A cell that waits for another one to be running.
PAIRED = """
import json, pathlib, sys, time
spec, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
(folder / "here").touch()
until = time.monotonic() + 30
while len(list(folder.parent.glob("*/here"))) < 2:
    if time.monotonic() > until:
        sys.exit("alone")
    time.sleep(0.01)
(folder / "row.json").write_text(json.dumps({"digest": DIGESTS[spec["cell"]["method"]]}))
"""
# A cell without an end.
ENDLESS = """
import os, pathlib, sys, time
(pathlib.Path(sys.argv[2]).parent.parent / "pid").write_text(str(os.getpid()))
time.sleep(600)
"""
RUNNER = """
import sys
from pathlib import Path
from tests.benchmarks.study_fakes import run_fakes
run_fakes(Path(sys.argv[1]))
"""
STOPPABLE = """
import sys
from pathlib import Path
from benchmarks.study.run import end_with_cells
from tests.benchmarks.study_fakes import ENDLESS, run_fakes
end_with_cells()
run_fakes(Path(sys.argv[1]), ENDLESS)
"""


def run_fakes(folder: Path, fake: str = FAKE, workers: int = 1) -> list[str]:
    """Run the study with them; returns what failed."""
    digests = {cell.method: cell.digest for cell in CELLS}
    (folder / "fake.py").write_text(f"DIGESTS = {digests}\n" + fake)
    return run_study(
        lambda rows: [cell for cell in CELLS if cell.digest not in rows],
        folder,
        folder / "data",
        folder / "study.csv",
        command=(sys.executable, str(folder / "fake.py")),
        workers=workers,
    )


def write_trec(root: Path) -> None:
    """A small data set in the layout of trec."""
    folder = root / "trec"
    folder.mkdir(parents=True)
    lines = [f"{i % 6} What is {i} ?" for i in range(230)]
    (folder / "TREC.train.all").write_text("\n".join(lines))
    (folder / "TREC.test.all").write_text("\n".join([*lines[:2], "0 How ?", "1 Who ?"]))
