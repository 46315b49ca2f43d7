"""LLaMA-Factory with ReMix inside: what the file may say, and a run where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from remix_model import ReMixConfig
from remix_model.integrations.llamafactory import read_file, train
from tests.remix_cli.helpers import make_model


def written(folder: Path, **arguments: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"stage": "sft", "finetuning_type": "lora", **arguments}))
    return path


def test_the_files_two_parts(tmp_path: Path) -> None:
    path = written(tmp_path, lora_rank=4, remix={"top_k": 2}, remix_num_selections=3)
    arguments, options = read_file(path)
    assert options == {"top_k": 2}
    assert arguments["remix_num_selections"] == 3
    assert "remix" not in arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "dpo"}, "stage='dpo': ReMix trains stage: sft"),
        ({"finetuning_type": "full"}, "finetuning_type='full': ReMix trains finetuning_type: lora"),
        ({"packing": True}, "packing=True does not go with ReMix"),
        ({"use_dora": True}, "use_dora=True does not go with ReMix"),
        ({"remix": {"r": 4}}, "r: LLaMA-Factory's lora_rank, lora_target"),
        ({"remix": {"experts": 4}}, "experts: it is no field of ReMixConfig"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_file(written(tmp_path, **arguments))


@pytest.mark.skipif(
    importlib.util.find_spec("llamafactory") is None,
    reason="needs LLaMA-Factory, which has its own pins: docs/ways-in-and-out.md",
)
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its data, its checkpointing and its evaluation; routers are trained."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    make_model(tmp_path / "model")
    rows = [{"instruction": f"{a}+3?", "input": "", "output": str(a + 3)} for a in range(12)]
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text('{"sums": {"file_name": "sums.json"}}')
    path = written(
        tmp_path,
        model_name_or_path=str(tmp_path / "model"),
        do_train=True,
        lora_rank=2,
        lora_target="up_proj,down_proj",
        dataset_dir=str(tmp_path),
        dataset="sums",
        template="empty",
        val_size=4,
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        remix={"num_experts": 4, "top_k": 2, "init_lora_weights": False},
        remix_num_selections=3,
    )
    train(path)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["remix/grad_norm_router"] > 0
    assert history[0]["remix/ess"] == 2
    arguments = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert arguments.remix_num_selections == 3
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"]
    assert isinstance(config, ReMixConfig)
    assert (config.r, config.num_experts, config.target_modules) == (2, 4, {"up_proj", "down_proj"})
    from llamafactory.model import adapter

    assert adapter.LoraConfig.__name__ == "LoraConfig", "its own names are back"
