"""Saves that are whole or not there: the folder's part, without a training run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from remix_model import saving
from remix_model.errors import SavingError


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def checkpoint(run: Path, step: int, age: int = 0) -> Path:
    path = make(run / f"checkpoint-{step}", "trainer_state.json")
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_publish_replaces_what_is_there(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-4", "old")
    make(tmp_path / ".partial" / "checkpoint-4", "new")
    saving.publish(tmp_path / ".partial" / "checkpoint-4", tmp_path / "checkpoint-4")
    assert names(tmp_path / "checkpoint-4") == {"new"}
    assert names(tmp_path) == {".partial", "checkpoint-4"}


def test_publish_finds_that_another_machine_has_done_it(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-4", "new")
    saving.publish(tmp_path / ".partial" / "checkpoint-4", tmp_path / "checkpoint-4")
    assert names(tmp_path / "checkpoint-4") == {"new"}


def test_machines_on_one_disk_publish_once(tmp_path: Path, monkeypatch) -> None:
    """The other one comes while the first brings files to the disk."""
    partial, place = tmp_path / ".partial" / "checkpoint-4", tmp_path / "checkpoint-4"
    make(partial, "new")
    to_disk, calls = saving._to_disk, []

    def meanwhile(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            saving.publish(partial, place)
        to_disk(path)

    monkeypatch.setattr(saving, "_to_disk", meanwhile)
    saving.publish(partial, place)
    assert names(place) == {"new"}


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / ".partial" / "checkpoint-4", "a", "b")
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(f"-> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    saving.publish(tmp_path / ".partial" / "checkpoint-4", tmp_path / "checkpoint-4")
    claimed = events[0].removeprefix("-> ")
    assert claimed.startswith("checkpoint-4.")
    assert events[1:] == ["a", "b", claimed, "-> checkpoint-4", tmp_path.name]


def test_replaced_files_leave_the_others_alone(tmp_path: Path) -> None:
    place = make(tmp_path / "run", "adapter_config.json", "mine.txt")
    make(place / "second", "old")
    partial = make(place / saving.PARTIAL_FILES, "adapter_config.json", "new.safetensors")
    make(partial / "second", "new")
    saving.replace_files(partial, place)
    assert names(place / "second") == {"new"}
    assert names(place) == {
        "adapter_config.json",
        "mine.txt",
        "new.safetensors",
        "second",
        saving.PARTIAL_FILES,
    }


def test_weights_are_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds new weights finds what belongs to them."""
    place, order = make(tmp_path / "run"), []
    partial = make(tmp_path / "partial", "a.safetensors", "b.json", "z.json")
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        order.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    saving.replace_files(partial, place)
    assert order == ["b.json", "z.json", "a.safetensors"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """A damaged checkpoint of a later step, from which nobody could resume, is older."""
    best, old, late, new = (
        checkpoint(tmp_path, step, age) for step, age in ((2, 9), (4, 8), (9, 7), (6, 0))
    )
    make(tmp_path / "checkpoint-mine", "notes.txt")
    saving.rotate(tmp_path, 2, {Path(os.path.relpath(best)), new})
    assert names(tmp_path) == {best.name, new.name, "checkpoint-mine"}
    assert not old.exists()
    assert not late.exists()


@pytest.mark.parametrize("limit", [None, 0, 3, 4])
def test_rotation_keeps_all_that_may_be_kept(tmp_path: Path, limit: int | None) -> None:
    kept = [checkpoint(tmp_path, step) for step in (1, 2, 3)]
    saving.rotate(tmp_path, limit, {kept[-1]})
    assert all(path.exists() for path in kept)


def test_a_checkpoint_is_hidden_before_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it removes: what is left is not taken for a checkpoint."""
    checkpoint(tmp_path, 2)
    monkeypatch.setattr(saving, "_remove", lambda folder: None)
    saving.discard(tmp_path / "checkpoint-2")
    assert names(tmp_path) == {saving.REMOVED}


def test_errors_say_what_and_why(tmp_path: Path) -> None:
    with (
        pytest.raises(SavingError, match=r"x could not be saved: disk full .* MiB are free"),
        saving.saving(tmp_path / "not" / "yet" / "x"),
    ):
        raise RuntimeError("disk full\nand a stack trace")
    with (
        pytest.raises(SavingError, match=r"^[^:]*inner could not be saved: No space[^:]*$"),
        saving.saving(tmp_path / "outer"),
        saving.saving(tmp_path / "inner"),
    ):
        raise OSError(28, "No space left on device")


def test_the_best_checkpoint_is_known_by_its_last_name(make_trainer, tmp_path) -> None:
    """Also when it is the one that is being saved."""
    from tests.remix_model.trainer_helpers import examples

    trainer = make_trainer(
        evaluate=examples(),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "run"
    assert (best / "adapter_model.safetensors").is_file()
    saved = (best / "trainer_state.json").read_text()
    assert f'"best_model_checkpoint": "{best}"' in saved
    assert not [name for name in names(tmp_path / "run") if name.startswith(".")]


def test_checkpoints_that_go_at_the_end_are_hidden_first(
    make_trainer, tmp_path, monkeypatch
) -> None:
    """transformers would remove all but the best in place, a file at a time."""
    from tests.remix_model.trainer_helpers import examples

    removed, rmtree = [], shutil.rmtree

    def note(path, *args, **kwargs) -> None:
        removed.append(Path(path).name)
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", note)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = make_trainer(
        evaluate=examples(),
        max_steps=4,
        save_total_limit=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is the best
        learning_rate=1e-2,
        **options,
    )
    trainer.train()
    assert names(tmp_path / "run") == {"checkpoint-2", "routing.jsonl"}
    assert not [name for name in removed if name == "checkpoint-4"]
