"""PEFT's own tests against ReMix: python -m conformance.peft_tests [options of pytest].

They are in the source package of the installed PEFT, which pip fetches once into the cache folder
($REMIX_CACHE, else ~/.cache/remix). Which of them cannot pass, and why: peft_cases.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from conformance.peft_cases import TASKS
from remix_model.models import cache_dir

PACKAGE = "peft_tests"  # not "tests", which is ours


def fetch() -> Path:
    """The folder of the installed PEFT's tests, in the cache."""
    name = f"peft-{version('peft')}"
    folder = cache_dir() / name
    if folder.is_dir():
        return folder / PACKAGE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        options = ["--no-deps", "--no-binary", "peft", "--no-build-isolation", "--dest", made]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *options]
        if subprocess.run([*pip, name.replace("-", "==")]).returncode:
            raise SystemExit(f"pip could not fetch the source package of {name}, see above")
        with tarfile.open(f"{made}/{name}.tar.gz") as archive:
            tests = [one for one in archive if one.name.startswith(f"{name}/tests/")]
            archive.extractall(made, tests, filter="data")
        tests_folder = Path(made, name, "tests")
        (tests_folder / "__init__.py").touch()  # they import each other, and come without it
        tests_folder.rename(tests_folder.with_name(PACKAGE))
        Path(made, name).rename(folder)
    return folder / PACKAGE


def main() -> None:
    """Exit with pytest's code."""
    folder = fetch()
    files = [str(folder / f"{name}.py") for name in TASKS]
    plugins = ["-p", "conformance.peft_plugin", "-p", "no:cacheprovider"]
    options = ["-c", os.devnull, "--rootdir", str(folder.parent), "-q", "-rfEs"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *plugins, *options, *files, *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
