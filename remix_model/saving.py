"""What a trainer saves is whole or not there, whenever the process is killed or the disk is full.

A checkpoint is written under a hidden name, brought to the disk (fsync) and renamed; what replaces
files that are there already is written beside them and takes their places one by one. A checkpoint
that is no longer kept gets a hidden name before it is removed. So a folder named `checkpoint-N` is
always complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import Trainer

from remix_model.errors import SavingError

PARTIAL = ".partial-checkpoint"  # is being written
PARTIAL_FILES = ".partial-files"  # likewise, to take the places of files
REMOVED = ".removed-checkpoint"  # is being removed
_CARD = "README.md"  # PEFT adds to the one that is there

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class WholeSaves(_Base):
    """Mixed into a `transformers.Trainer`: saves that are whole or not there.

    With several processes they may write into one folder: it is renamed when all have written.
    """

    _in_checkpoint = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._in_checkpoint else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The parent's, under a hidden name until it is whole.

        Raises:
            SavingError: It could not be written; what was saved before is intact.
        """
        run = Path(self._get_output_dir(trial))
        place = run / f"checkpoint-{self.state.global_step}"
        partial = run / PARTIAL
        self._on_one_process(_remove, partial)
        self._in_checkpoint = True
        try:
            with saving(place):
                super()._save_checkpoint(model, trial)
                self._name_best_checkpoint(partial, run)
                self._on_one_process(publish, partial / place.name, place)
        finally:
            self._in_checkpoint = False
            self._on_one_process(_remove, partial, wait=False)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(place))
        if self.args.should_save:
            kept = {place, Path(self.state.best_model_checkpoint or place)}
            rotate(run, self.args.save_total_limit, kept)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._in_checkpoint:  # it is pushed once it is whole
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        """The parent's, for which no checkpoint is left to remove: it would do so file by file."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            rotate(Path(self._get_output_dir(trial)), 1, {Path(best)})
        return super()._finalize_training(trial, *args)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's; files that are there already are replaced by whole ones.

        Raises:
            SavingError: They could not be written; those that are there are intact.
        """
        if self._in_checkpoint:
            super()._save(output_dir, state_dict)
            return
        place = Path(output_dir or str(self.args.output_dir))
        partial = place / PARTIAL_FILES
        with saving(place):
            if self.args.should_save:
                _remove(partial)
                partial.mkdir(parents=True)
                if (place / _CARD).is_file():
                    shutil.copy(place / _CARD, partial)
            try:
                super()._save(str(partial), state_dict)
                if self.args.should_save:
                    replace_files(partial, place)
            finally:
                if self.args.should_save:
                    _remove(partial)

    def _on_one_process(self, action: Any, *paths: Path, wait: bool = True) -> None:
        """Do something to a folder once on each machine, when all processes have come here."""
        if wait:
            self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            action(*paths)
        if wait:
            self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self, partial: Path, run: Path) -> None:
        """The best checkpoint, when it is this one, was found under its hidden name."""
        best = Path(self.state.best_model_checkpoint or run)
        if best.parent == partial:
            self.state.best_model_checkpoint = str(run / best.name)
            if self.args.should_save:
                self.state.save_to_json(str(best / "trainer_state.json"))


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """Say what could not be saved, and why, in one sentence.

    Args:
        place: Where it was to go.

    Raises:
        SavingError: Something inside could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SavingError):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise SavingError(
            f"{place} could not be saved: {reason} ({_free_mib(place)} MiB are free there); "
            "what was saved before is intact"
        ) from error


def publish(partial: Path, place: Path) -> None:
    """Bring a folder to the disk and give it its name.

    What has that name already, a damaged checkpoint or another run's, is replaced. On a disk
    that several machines share, the first to rename it does all this, and the others nothing.
    """
    claimed = partial.with_name(f"{partial.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        partial.rename(claimed)
    except FileNotFoundError:
        return
    for path in sorted(claimed.rglob("*")):
        _to_disk(path)
    _to_disk(claimed)
    discard(place)
    claimed.rename(place)
    _to_disk(place.parent)


def replace_files(partial: Path, place: Path) -> None:
    """Bring a folder's files to the disk and put them into another one, weights last."""
    paths = sorted(partial.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    for path in paths:
        for part in [path, *path.rglob("*")]:
            _to_disk(part)
        if path.is_dir():
            discard(place / path.name)
        path.replace(place / path.name)
    _to_disk(place)


def rotate(run: Path, limit: int | None, kept: set[Path]) -> None:
    """Remove the oldest checkpoints of a run.

    Args:
        run: The run's folder.
        limit: How many checkpoints stay; None or 0: all.
        kept: Those that stay in any case.
    """
    if not limit or limit < 0:
        return
    found = [path for path in run.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    safe = {path.resolve() for path in kept}
    old = [path for path in found if path.resolve() not in safe]
    old.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in old[: max(len(found) - limit, 0)]:
        discard(path)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there, so that half of it is never taken for the whole."""
    hidden = folder.parent / REMOVED
    _remove(hidden)
    if folder.is_dir():
        folder.rename(hidden)
        _remove(hidden)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's names, now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every file system can do that with folders
            raise
    finally:
        os.close(descriptor)


def _free_mib(place: Path) -> int:
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free // 2**20
