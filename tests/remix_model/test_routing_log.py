"""`routing.jsonl`: a line a log, cut where training resumes, never worth a run."""

from __future__ import annotations

import pytest

from remix_model.routing_log import ROUTING_FILE, SERIES, read_lines
from remix_model.site import find_sites
from tests.remix_model.trainer_helpers import logged


def test_a_line_for_every_log(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path), logging_steps=2)
    trainer.train()
    header, *lines = read_lines(tmp_path / ROUTING_FILE)
    assert header["layers"] == list(find_sites(trainer.model))
    assert [line["step"] for line in lines] == [2, 4]
    shares = logged(trainer, "remix/expert_share")
    for line, share, ess in zip(lines, shares, logged(trainer, "remix/ess_min"), strict=True):
        assert line["expert_share"] == [pytest.approx(s, rel=1e-3) for s in share.values()]
        assert min(line["ess_min"]) == ess == 2.0
        assert all(len(line[name]) == len(header["layers"]) for name in SERIES)
        assert sum(line["weight_histogram"]) == line["tokens"] * 2 * len(header["layers"])


def test_resumed_run_has_the_lines_of_a_straight_one(make_trainer, tmp_path):
    """Also after a line that was cut off, and lines from beyond the checkpoint."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    for folder in (straight, resumed):
        make_trainer(output_dir=str(folder), **options).train()
    path = resumed / ROUTING_FILE
    path.write_text(path.read_text()[:-9])
    make_trainer(output_dir=str(resumed), **options).train(
        resume_from_checkpoint=str(resumed / "checkpoint-2")
    )
    assert path.read_bytes() == (straight / ROUTING_FILE).read_bytes()
    make_trainer(output_dir=str(resumed), **options).train()  # from the start
    assert path.read_bytes() == (straight / ROUTING_FILE).read_bytes()


def test_a_file_that_cannot_be_written_is_a_warning(make_trainer, tmp_path):
    (tmp_path / ROUTING_FILE).mkdir()
    with pytest.warns(UserWarning, match="training goes on"):
        trainer = make_trainer(output_dir=str(tmp_path), max_steps=2)
        trainer.train()
    assert trainer.state.global_step == 2
