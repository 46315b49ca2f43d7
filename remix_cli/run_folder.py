"""A run's folder: told apart from other folders, never overwritten unasked, written atomically.

A folder is a run's when it holds the `config.yaml` that `remix train` writes there first.
Overwriting removes what a run writes, by name, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from remix_cli.config import (
    CONFIG_HEADER,
    RunConfig,
    absolute_path,
    merge,
    option_fields,
    read_yaml,
    write_text,
    write_yaml,
)
from remix_cli.display import console
from remix_model.routing_log import ROUTING_FILE
from remix_model.saving import PARTIAL, PARTIAL_FILES, REMOVED, discard

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
# PEFT's and the tokenizer's files beside our own two. README.md is PEFT's model card.
_RUN_FILES = (
    METRICS_FILE,
    ROUTING_FILE,
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "training_args.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    CONFIG_FILE,  # last: until it is gone the folder is still known as a run's
)
_REPLACED = ".replaced-run"  # waits here until the run that replaces it has done a step
_REMOVED = ".removed-run"  # and is removed here: half a run must never be brought back
# What a killed run leaves half-written or half-removed.
_LEFTOVERS = (_REMOVED, PARTIAL, PARTIAL_FILES, REMOVED)
_REPLACED_FILES = (CONFIG_FILE, METRICS_FILE, ROUTING_FILE)
_LEFT_FILES = re.compile(rf"\.({'|'.join(map(re.escape, _REPLACED_FILES))})\.\d+")
# What training must find in a checkpoint to go on as if it had never stopped.
_CHECKPOINT_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer*|global_step*",  # .pt; under FSDP .bin, or a folder; DeepSpeed's folder
    "scheduler.pt",
    "rng_state*.pth",  # one for each process
    "trainer_state.json",  # the last file that is written
)
# All that may be left of one that was removed in place, and not to the end.
_PARTS = (
    *(pattern for name in _CHECKPOINT_FILES for pattern in name.split("|")),
    *_RUN_FILES,
    "pytorch_model_fsdp*",
    "latest",  # this and the next are DeepSpeed's
    "zero_to_*.py",
)
# A resumed run may be longer and be logged otherwise; all else would make it another run.
_RESUME_MAY_CHANGE = {
    *(item.name for item in option_fields("output")),
    "device",
    "max_steps",
    "num_train_epochs",
    "per_device_eval_batch_size",
}


def check_output_dir(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that training must not write into.

    Raises:
        ValueError: It holds another run and neither flag is given, it holds something else, or it
            cannot be written.
    """
    if overwrite and resume:
        raise ValueError("--overwrite and --resume exclude each other: give one of them")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: choose a folder")
    replaced = folder / _REPLACED
    killed = (
        f"the run that began in {folder} was killed before its first step: start it again with "
        f"--overwrite, or move the files of the one that it was to replace back from {replaced}"
    )
    whole = {path for _, path in checkpoints(folder)}
    for path in folder.glob("checkpoint-*"):
        # Checkpoints that are no longer kept are removed by their names.
        foreign = path not in whole and not (path / "adapter_config.json").is_file()
        if foreign and not _is_half_removed(path) and path.is_dir() and any(path.iterdir()):
            raise ValueError(
                f"{path} is named like a checkpoint and is none: move it away, or choose another "
                f"output_dir"
            )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"output_dir {folder} cannot be written: {existing} is not a folder of yours"
        )
    if resume:
        if is_run(replaced):
            raise ValueError(killed)
        if not is_run(folder):
            raise ValueError(f"there is no run to resume in {folder}: check output_dir")
        if last_checkpoint(folder) is None:
            raise ValueError(
                f"the run in {folder} stopped before its first checkpoint: "
                f"start it again with --overwrite"
            )
        return
    if not folder.exists() or set(folder.iterdir()) <= set(_leftovers(folder)):
        return
    if is_run(replaced) and not overwrite:
        raise ValueError(killed)
    if not is_run(folder) and not is_run(replaced):
        raise ValueError(
            f"output_dir {folder} holds files that no run wrote: choose a new or empty folder"
        )
    if not overwrite:
        raise ValueError(
            f"output_dir {folder} holds another run: choose another folder, continue it with "
            f"--resume, or replace it with --overwrite"
        )


def is_run(folder: Path) -> bool:
    """Return whether `remix train` wrote this folder."""
    try:
        with (folder / CONFIG_FILE).open(encoding="utf-8") as file:
            return file.read(len(CONFIG_HEADER)) == CONFIG_HEADER
    except (OSError, UnicodeDecodeError):
        return False


class RunStart:
    """A run's first minutes: until `commit`, `undo` leaves the folder as it was found.

    The run that is to be replaced waits in a hidden folder inside. It is whole there when its
    configuration is there, which goes in last and comes out first. So whenever the process is
    killed, the next start finds out what is whose.
    """

    def __init__(self, folder: Path) -> None:
        """Touches nothing yet."""
        self._folder = folder
        self._old = folder / _REPLACED
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._holds_new = self._committed = False

    def begin(self, config: RunConfig) -> None:
        """Put the run that is in the folder aside and write the new one's configuration."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        if is_run(self._folder) and not is_run(self._old):
            self._old.mkdir(exist_ok=True)
            for path in _run_paths(self._folder):
                path.rename(self._old / path.name)
        self._holds_new = True
        _remove(self._folder)  # what a start that was killed has left
        write_yaml(config, self._folder / CONFIG_FILE)

    def commit(self) -> None:
        """The new run has done its first step: the old one goes."""
        self._committed = True
        if self._old.exists():
            removed = self._old.rename(self._folder / _REMOVED)
            shutil.rmtree(removed, ignore_errors=True)

    def undo(self) -> None:
        """The new run failed to start: the old one, or nothing, comes back."""
        if self._committed:
            return
        if self._holds_new:
            _remove(self._folder)
            remove_leftovers(self._folder)
        for path in reversed(_run_paths(self._old)):
            path.rename(self._folder / path.name)
        for path in (self._old, *self._made):
            with suppress(OSError):  # it is not there, or it is not empty
                path.rmdir()


def _run_paths(folder: Path) -> list[Path]:
    """Return what a run wrote into its folder, the configuration last."""
    paths = [checkpoint for _, checkpoint in checkpoints(folder)]
    return paths + [folder / name for name in _RUN_FILES if (folder / name).is_file()]


def _remove(folder: Path) -> None:
    """Remove what a run wrote; whatever else is in the folder stays."""
    for path in _run_paths(folder):
        discard(path) if path.is_dir() else path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing, or removing, when it was killed."""
    for path in _leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _leftovers(folder: Path) -> list[Path]:
    hidden = [
        path
        for path in folder.glob(".*")
        if path.name in _LEFTOVERS or _LEFT_FILES.fullmatch(path.name)
    ]
    return hidden + [path for path in folder.glob("checkpoint-*") if _is_half_removed(path)]


def _is_half_removed(checkpoint: Path) -> bool:
    """Whether a folder holds some of a checkpoint's files, and nothing else."""
    if not re.fullmatch(r"checkpoint-\d+", checkpoint.name) or not checkpoint.is_dir():
        return False
    names = {path.name for path in checkpoint.iterdir()}
    known = {name for name in names for pattern in _PARTS if fnmatch(name, pattern)}
    return "trainer_state.json" not in names and names == known and names != {"README.md"}


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the complete checkpoints, the oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / "trainer_state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint's folder, None where there is none."""
    found = checkpoints(folder)
    return found[-1][1] if found else None


def checkpoint_to_resume(folder: Path) -> tuple[Path, list[str]]:
    """Return the latest checkpoint that can be read, and what is wrong with later ones.

    Raises:
        ValueError: There is none.
    """
    damages: list[str] = []
    for _, path in reversed(checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return path, damages
        damages.append(damage)
    raise ValueError(
        f"no checkpoint of the run in {folder} can be read ({'; '.join(damages)}): start it again "
        f"with --overwrite"
    )


def _damage(checkpoint: Path) -> str | None:
    """Return what keeps a checkpoint from being read, None for a sound one."""
    for name in _CHECKPOINT_FILES:
        if not any(path for pattern in name.split("|") for path in checkpoint.glob(pattern)):
            return f"{checkpoint / name} is missing"
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{path} is damaged"
        except (ValueError, OSError, SafetensorError, zipfile.BadZipFile):
            return f"{path} is damaged"
    return None


def write_json(values: Any, path: Path) -> None:
    """Write JSON: all of it or, where a number is not finite (and so not JSON), nothing."""
    write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", path)


def resolve_config(file: str | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a run: file and flags, over the saved one where a run is resumed.

    Raises:
        ValueError: As `build_config`; or a resumed run would change what it is computing.
    """
    in_file = read_yaml(file) if file else {}
    start = {**in_file, **overrides}
    folder = Path(start.get("output_dir", RunConfig.output_dir)).expanduser()
    saved: dict[str, Any] = {}
    if start.get("resume") and is_run(folder):
        saved = read_yaml(folder / CONFIG_FILE)
        saved.pop("trust_remote_code", None)  # a folder must not decide that code is run
        saved.setdefault("method", saved.get("router_type", "remix"))
    given, left_out = merge(overrides, in_file, saved, place=file)
    changed = [
        name
        for name in given
        if name in saved
        and name not in _RESUME_MAY_CHANGE
        and absolute_path(name, given[name]) != saved[name]
    ]
    if changed:
        name = changed[0]
        raise ValueError(
            f"the run in {folder} has {name}={saved[name]!r} and cannot go on with "
            f"{given[name]!r}: leave it out, or start a run in another folder"
        )
    config = RunConfig(**{**saved, **given})
    if left_out:
        console.print(f"method={config.method} has no {', '.join(left_out)}: not taken from {file}")
    return config
