"""The set-ups in examples/: accelerate's own loader and ours take them."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from remix_cli.config import build_config

EXAMPLES = Path(__file__).parents[2] / "examples"
SET_UPS = {
    "1gpu": (1, "NO"),
    "8gpu_ddp": (8, "MULTI_GPU"),
    "8gpu_fsdp2": (8, "FSDP"),
    "8gpu_zero2": (8, "DEEPSPEED"),
    "8gpu_zero3": (8, "DEEPSPEED"),
}


def test_there_is_no_other_set_up():
    assert {file.stem for file in (EXAMPLES / "accelerate").glob("*.yaml")} == set(SET_UPS)


@pytest.mark.parametrize("name", SET_UPS)
def test_accelerate_reads_the_set_up(name):
    processes, kind = SET_UPS[name]
    file = EXAMPLES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))  # raises for a key that it does not know
    assert (config.num_processes, config.distributed_type) == (processes, DistributedType(kind))
    assert config.mixed_precision == "bf16"
    assert f"--config_file examples/accelerate/{name}.yaml" in file.read_text()


def test_accelerate_shards_with_fsdp2():
    """What the launcher tells the processes."""
    file = EXAMPLES / "accelerate" / "8gpu_fsdp2.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments = _validate_launch_command(arguments)[0]
    environment = prepare_multi_gpu_env(arguments)
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }.items():
        assert environment[name] == value


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_shards_with_deepspeed(stage):
    """Stage 3 gathers adapters when it saves them."""
    file = EXAMPLES / "accelerate" / f"8gpu_zero{stage}.yaml"
    config = load_config_from_file(str(file)).deepspeed_config
    assert config["zero_stage"] == stage
    assert config.get("zero3_save_16bit_model", False) == (stage == 3)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_8b_qlora"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_remix_reads_the_run(name, ranks, tmp_path):
    from remix_cli.prepare import method_config, training_arguments

    overrides = {"device": "cpu", "output_dir": str(tmp_path), "selection_parallel": ranks}
    config = build_config(overrides, EXAMPLES / f"{name}.yaml")
    assert method_config(config).num_experts == 8
    assert training_arguments(config).remix_selection_parallel == ranks
