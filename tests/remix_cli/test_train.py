"""The commands on a tiny model, end to end, and what each kind of bad input says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remix_cli import main
from remix_cli.config import CONFIG_HEADER


def make_model(folder: Path, hidden_size: int = 32) -> Path:
    """A random two-layer Llama with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, a configuration and a finished run in `run`."""
    root = tmp_path_factory.mktemp("work space")  # with a space, as a user's path may have
    make_model(root / "model")
    rows = [{"question": f"{a}+{b}?", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "c.yaml").write_text(
        f"model: {root / 'model'}\ndataset: {root / 'sums.jsonl'}\n"
        'prompt_template: "{question}"\nresponse_field: answer\neval_size: 6\n'
        "num_experts: 4\ntop_k: 2\nr: 2\nnum_selections: 2\nlearning_rate: 1e-2\nmax_steps: 8\n"
        "per_device_train_batch_size: 6\nsave_steps: 4\nlogging_steps: 2\nmax_new_tokens: 4\n"
        "device: cpu\n"
    )
    assert main(["train", "--config", str(root / "c.yaml"), "--output-dir", str(root / "run")]) == 0
    return root


def run(workspace: Path, command: str, *argv: str) -> int:
    return main([command, "--config", str(workspace / "c.yaml"), *argv])


def fails(capsys: pytest.CaptureFixture[str], code: int, expected: int = 2) -> str:
    """Check that a command failed as a user's mistake should, and return its sentence."""
    error = capsys.readouterr().err
    assert code == expected, error
    assert error.startswith("remix: error: ")
    assert error.count("\n") == 1, error
    return error


def test_run_folder_holds_all(workspace: Path) -> None:
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert metrics["train_steps"] == 8
    assert metrics["tokens_per_s"] > 0
    assert metrics["peak_rss_mib"] > 50
    per_pool = 3 * 2 * (32 + 48)  # gate, up and down: r (in + out)
    routers = 4 * (32 + 32 + 48)
    assert metrics["trainable_parameters"] == 2 * (4 * per_pool + routers)
    assert metrics["activated_parameters"] == 2 * (2 * per_pool + routers)
    assert [entry["step"] for entry in metrics["loss_history"]] == [2, 4, 6, 8]
    assert len(metrics["routing"]["layers"]) == 6
    assert metrics["config"]["num_selections"] == 2
    assert metrics["versions"]["torch"]
    names = {path.name for path in (workspace / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} < names
    assert {"checkpoint-4", "checkpoint-8", "config.yaml"} < names


def test_base_loss_is_that_of_the_model_alone(workspace: Path) -> None:
    """Independently: mean cross-entropy of the held-out answers under the plain model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from remix_model.data import load_examples, split_examples

    examples = load_examples(
        workspace / "sums.jsonl", prompt_template="{question}", response_field="answer"
    )
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    losses = []
    for example in split_examples(examples, 6, seed=0)[1]:
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = [*prompt, *tokenizer(example.response)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    assert math.isclose(metrics["eval_loss_before"], sum(losses) / len(losses), rel_tol=1e-5)


def test_eval_agrees_with_the_run(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    assert main(["eval", "--adapter", str(workspace / "run"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    assert math.isclose(result["loss_base"], metrics["eval_loss_before"], rel_tol=1e-5)
    assert math.isclose(result["loss_adapter"], metrics["eval_loss_after"], rel_tol=1e-5)
    assert result["examples"] == 6

    # A data set that is given for it is evaluated whole.
    other = ["--dataset", str(workspace / "sums.jsonl"), "--json", str(out)]
    assert main(["eval", "--adapter", str(workspace / "run"), *other]) == 0
    assert json.loads(out.read_text())["examples"] == 36


def test_generate_compares_and_streams(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ["--adapter", str(workspace / "run" / "checkpoint-8")]
    assert main(["generate", *adapter, "--prompt", "1+2?", "--compare"]) == 0
    output = capsys.readouterr().out
    assert output.index("base model") < output.index("with the adapter")
    prompt = workspace / "prompt.txt"
    prompt.write_text("1+2?")
    assert main(["generate", *adapter, "--prompt-file", str(prompt)]) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    assert answer in output
    with prompt.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["generate", *adapter]) == 0
    assert capsys.readouterr().out == answer


def test_validate_counts_what_train_trains_and_changes_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workspace, "validate", "--output-dir", str(tmp_path / "new")) == 0
    output = capsys.readouterr().out
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    for key in ("total_parameters", "trainable_parameters", "activated_parameters"):
        assert f"{metrics[key]:,}" in output
    assert "6 (down_proj, gate_proj, up_proj)" in output
    assert not list(tmp_path.iterdir())


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert "default backend" in output


def test_resumed_run_ends_with_the_same_bits(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(workspace / "run", folder)
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "metrics.json").unlink()
    assert run(workspace, "train", "--output-dir", str(folder), "--resume") == 0
    straight = load_file(workspace / "run" / "adapter_model.safetensors")
    resumed = load_file(folder / "adapter_model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["loss_history"]] == [2, 4, 6, 8]


def test_another_run_is_never_lost(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(workspace / "run", folder)
    (folder / "notes.txt").write_text("mine")
    before = sorted(str(path) for path in folder.rglob("*"))
    out = ["--output-dir", str(folder)]

    assert "holds another run" in fails(capsys, run(workspace, "train", *out))
    assert "exclude each other" in fails(
        capsys, run(workspace, "train", *out, "--overwrite", "--resume")
    )
    assert "learning_rate=0.01 and cannot go on with 0.5" in fails(
        capsys, run(workspace, "train", *out, "--resume", "--learning-rate", "0.5")
    )
    # A bad new run does not cost the old one.
    fails(capsys, run(workspace, "train", *out, "--overwrite", "--top-k", "9"))
    assert sorted(str(path) for path in folder.rglob("*")) == before

    assert run(workspace, "train", *out, "--overwrite", "--max-steps", "1") == 0
    assert json.loads((folder / "metrics.json").read_text())["train_steps"] == 1
    assert not (folder / "checkpoint-8").exists()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--overwrite", "--no-overwrite"])
def test_folder_that_no_run_wrote_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    code = run(workspace, "train", "--output-dir", str(tmp_path), flag)
    assert "holds files that no run wrote" in fails(capsys, code)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_folder_that_cannot_be_made_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(workspace, "train", "--output-dir", str(workspace / "c.yaml" / "run"))
    assert "cannot be written" in fails(capsys, code)


def test_nothing_to_resume(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path), "--resume"]
    assert "no run to resume" in fails(capsys, run(workspace, "train", *out))
    (tmp_path / "config.yaml").write_text(CONFIG_HEADER)
    (tmp_path / "checkpoint-4").mkdir()  # cut short: without its last file
    assert "before its first checkpoint" in fails(capsys, run(workspace, "train", *out))


def test_non_finite_loss_stops_and_keeps_the_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path / "run"), "--save-steps", "1", "--max-steps", "4"]
    # The first step of the warm-up has the rate 0.
    code = run(workspace, "train", *out, "--learning-rate", "1e39", "--warmup-ratio", "0.5")
    error = fails(capsys, code, expected=1)
    assert "training stopped" in error
    assert "step 2" in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-1'}" in error
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k", "5"], "top_k"),
        (["--top-k", "0"], "top_k"),
        (["--r", "0"], "r"),
        (["--num-selections", "1"], "num_selections=1"),
        (["--model", "/no/such/model"], "no model folder '/no/such/model'"),
        (["--dataset", "missing.jsonl"], "no data file missing.jsonl"),
        (["--response-field", "reply"], "line 1 has no field 'reply', only 'question', 'answer'"),
        (["--prompt-template", "{q}"], "line 1 has no field 'q'"),
        (["--eval-size", "36"], "holds out 36 of 36 examples"),
        (["--eval-size", "0", "--eval-steps", "1"], "eval_steps needs held-out data"),
        (["--warmup-ratio", "10"], "warmup_ratio must be a share below 1, got 10.0"),
        (["--max-length", "100"], "max_length=100 is more than the model's limit of 64"),
        (["--max-length", "4"], "tokens long and max_length is 4"),
        (["--target-modules", "no_such_proj"], "no_such_proj"),
        (["--target-modules", "embed_tokens"], "embed_tokens"),
        (["--target-modules", "input_layernorm"], "input_layernorm"),
        (["--layers-to-transform", "7"], "7"),
    ],
    ids=lambda value: " ".join(value)[2:] if isinstance(value, list) else "",
)
def test_bad_input_is_found_before_weights_are_loaded(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
) -> None:
    def too_late(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("remix_cli.train.load_base", too_late)
    code = run(workspace, "train", "--output-dir", str(tmp_path / "run"), *argv)
    assert message in fails(capsys, code)
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k"):
        run(workspace, "train", "--output-dir", str(tmp_path / "run"), "--top-k", "9", "--debug")


def test_bad_adapters_are_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    generate = ["generate", "--prompt", "a", "--adapter", str(folder)]
    assert "no adapter folder" in fails(capsys, main(generate))
    folder.mkdir()
    assert "holds no adapter_config.json" in fails(capsys, main(generate))
    for name in ("adapter_config.json", "config.yaml"):
        shutil.copy(workspace / "run" / name, folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    assert "read from safetensors only" in fails(capsys, main(generate))

    weights = (workspace / "run" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "truncated or damaged" in fails(capsys, main(generate))

    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert main(generate) == 0
    capsys.readouterr()
    other = make_model(tmp_path / "other", hidden_size=16)
    assert "trained for base model" in fails(capsys, main([*generate, "--model", str(other)]))


def test_bad_prompts_are_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = ["generate", "--adapter", str(workspace / "run")]
    assert "the prompt is empty" in fails(capsys, main([*generate, "--prompt", ""]))
    assert "exceed the model's 64 positions" in fails(
        capsys, main([*generate, "--prompt", "a" * 61])
    )
    assert "no chat template" in fails(capsys, main([*generate, "--prompt", "a", "--chat"]))
    assert "no-file.txt: No such file" in fails(
        capsys, main([*generate, "--prompt-file", "no-file.txt"])
    )


def test_missing_lm_eval_gives_the_command(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code = main(["eval", "--adapter", str(workspace / "run"), "--tasks", "arc_easy"])
    assert "pip install 'remix-lora[eval]'" in fails(capsys, code)
