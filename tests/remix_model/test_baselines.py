"""PEFT's methods in our trainer: the loss is PEFT's own, the prompt is never a label's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from remix_model import token_losses
from remix_model.adapter_trainer import AdapterTrainer
from remix_model.baselines import METHODS, activated_parameters, baseline_config, check_targets
from remix_model.peft_files import add_adapter, load_peft_adapter, without_adapter
from remix_model.tokens import DataCollator

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 4} for name in ("lora", "rslora", "dora")},
    "ia3": {},
    **{name: {"num_virtual_tokens": 5} for name in ("prefix", "prompt", "ptuning")},
    "vblora": {"rank": 4, "num_vectors": 16},
    "xlora": {},
}
LINEARS = 5 * 3  # gate, up and down of five layers, 64 -> 172
ROWS = [
    {"input_ids": [1, *ids], "labels": [-100, -100, *ids[1:]]}
    for ids in ([5, 6, 7], [9, 6, 8, 3, 5, 20], [4, 8, 15, 16], [4, 2])
]


@pytest.fixture
def make_base(stories260k: Path) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(stories260k)


@pytest.fixture(scope="session")
def two_loras(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of two LoRAs whose B is not zero."""
    folders = []
    for i in range(2):
        model = AutoModelForCausalLM.from_pretrained(stories260k)
        model = get_peft_model(model, baseline_config("lora", model, rank=4))
        torch.manual_seed(i)
        _shake(model)
        folders.append(str(tmp_path_factory.mktemp("lora")))
        model.save_pretrained(folders[-1])
    return folders


def _shake(model: Any) -> None:
    """Leave no trained parameter where it makes no difference."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "prompt_encoder" not in name:
            torch.nn.init.normal_(parameter, 0.2, 0.2)


@pytest.fixture
def make_model(make_base: Callable[[], Any], two_loras: list[str]) -> Callable[[str], Any]:
    def make(method: str) -> Any:
        base = make_base()
        own = {"xlora_adapters": two_loras} if method == "xlora" else {}
        return add_adapter(base, baseline_config(method, base, **OPTIONS[method], **own))

    return make


def batch() -> dict[str, torch.Tensor]:
    return DataCollator(0)(ROWS)


def mean_loss(model: Any) -> torch.Tensor:
    losses, mask = token_losses(model, batch())
    return losses.sum() / mask.sum()


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_pefts_own_forward(make_model, make_base, method):
    """Also without the adapter, which is the base model's."""
    model = make_model(method).eval()
    _shake(model)
    gradients = []
    for loss in (model(**batch(), use_cache=False).loss, mean_loss(model)):
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append((loss.detach(), *torch.autograd.grad(loss, trained)))
    for peft, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, peft, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), model.disable_adapter():
        without = mean_loss(model)
    torch.testing.assert_close(without, make_base()(**batch()).loss.detach())
    assert abs(without - gradients[0][0]) > 1e-3


def test_activated_parameters_are_counted_as_the_paper_counts_them(make_model):
    """From the shapes: feed-forward blocks 64 -> 172 -> 64 and a prompt of 5 tokens."""
    config = make_model("lora").config
    kv = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    outs = 5 * (172 + 172 + 64)
    lora = LINEARS * 4 * (64 + 172)
    pieces = LINEARS * 4 * (64 + 172) // 4  # of vectors of 4: what divides 64 and 172
    wanted = {
        "lora": lora,
        "rslora": lora,
        "dora": lora + outs,
        "ia3": 5 * (2 * kv + 172),
        "prefix": 5 * 5 * 2 * kv,
        "prompt": 5 * 64,
        "ptuning": 5 * 64,
        "vblora": pieces * 16 + 16 * 4,
        "xlora": 2 * lora + 2 * 64 + 2,
    }
    assert {method: activated_parameters(make_model(method)) for method in METHODS} == wanted


def make_trainer(model: Any, folder: Path, **options: Any) -> AdapterTrainer:
    arguments: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.02, "logging_steps": 1}
    return AdapterTrainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_steps=2,
            **{**arguments, **options},
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=DataCollator(0),
    )


def train(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> AdapterTrainer:
    trainer = make_trainer(model, folder, **options)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def test_lora_is_pefts_lora_in_a_plain_loop(make_base, tmp_path):
    """Batches of other lengths, so that a mean of means would show; accumulated over two."""
    base = make_base()
    torch.manual_seed(0)
    model = add_adapter(base, baseline_config("lora", base, rank=4, lora_alpha=2.0))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]) if module.training else None,
        with_kwargs=True,
    )
    trainer = train(model, tmp_path, max_grad_norm=0.5, lr_scheduler_type="constant")
    ours = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    by_ids = {tuple(row["input_ids"]): row for row in ROWS}
    lora = LoraConfig(r=4, lora_alpha=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    plain = get_peft_model(make_base(), lora)
    plain.load_state_dict(start)
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0
    )
    theirs = []
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        rows = [
            by_ids[tuple(i for n, i in enumerate(ids.tolist()) if n == 0 or i != 0)]
            for ids in (*first, *second)
        ]
        loss = plain(**DataCollator(0)(rows)).loss  # of all four in one batch: the token mean
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss))
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert ours[-1] < ours[0] - 0.1


@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_reloads_and_resumes_to_the_bit(make_model, make_base, tmp_path, method):
    torch.manual_seed(0)
    model = make_model(method)
    trainer = train(model, tmp_path / "run", learning_rate=0.1 if method == "ia3" else 0.02)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    trainer.save_model(str(tmp_path / "adapter"))
    after = trainer.evaluate()["eval_loss"]

    loaded = load_peft_adapter(make_base(), tmp_path / "adapter")
    with torch.no_grad():
        assert float(mean_loss(loaded)) == pytest.approx(after, rel=1e-5)
        torch.testing.assert_close(loaded(**batch()).loss, mean_loss(loaded))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not names & {"0", "1", "prompt_encoder.safetensors"}

    torch.manual_seed(1)  # another start, which the checkpoint replaces
    again = make_model(method)
    train(
        again,
        tmp_path / "run",
        learning_rate=0.1 if method == "ia3" else 0.02,
        resume=tmp_path / "run" / "checkpoint-2",
    )
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_prompts_train_in_mixed_precision_after_an_evaluation_without(
    make_model, make_base, tmp_path
):
    model = make_model("prompt")
    trainer = make_trainer(model, tmp_path, max_steps=1, bf16=True)
    seen: list[torch.dtype] = []
    with without_adapter(model):
        base = trainer.evaluate()["eval_loss"]
    model.get_decoder().layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert base == pytest.approx(float(make_base()(**batch()).loss), rel=1e-2)


def test_a_loss_that_is_not_finite_is_named(make_model, tmp_path):
    model = make_model("lora")
    torch.nn.init.constant_(next(p for p in model.parameters() if p.requires_grad), torch.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan \(step 1; the first module .*lora"):
        train(model, tmp_path)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("lora", {"r": 10**9}, "adapter_model.safetensors|which needs to be"),
        ("lora", {"r": -1}, "r"),
        ("lora", {"target_modules": ["q_proj"]}, "tensors missing"),
        (
            "prompt",
            {"num_virtual_tokens": 10**9},
            r"as \[5, 64\], which needs to be \[1000000000, 64\]",
        ),
        ("vblora", {"num_vectors": 10**9}, "which needs to be"),
        ("xlora", {"adapters": {"0": "/nowhere", "1": "/nowhere"}}, "holds no adapter_config"),
        ("xlora", {"xlora_depth": 10**9}, "do not belong together"),
        ("xlora", {"hidden_size": 65}, "which needs to be"),
    ],
)
def test_a_configuration_that_its_weights_do_not_bear_out(
    make_model, make_base, tmp_path, method, change, message
):
    """Nothing is allocated by a number of the file before it is compared with the weights."""
    model = make_model(method)
    trainer = train(model, tmp_path / "run", max_steps=1)
    trainer.save_model(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(make_base(), tmp_path / "adapter")


def test_weights_that_are_damaged_or_a_pickle_are_refused(make_model, make_base, tmp_path):
    model = make_model("lora")
    torch.nn.init.constant_(next(p for p in model.parameters() if p.requires_grad), torch.inf)
    model.save_pretrained(tmp_path / "inf")
    with pytest.raises(ValueError, match="not finite"):
        load_peft_adapter(make_base(), tmp_path / "inf")
    (tmp_path / "inf" / "adapter_model.safetensors").rename(tmp_path / "inf" / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle that can run code"):
        load_peft_adapter(make_base(), tmp_path / "inf")


def test_what_does_not_fit_is_named(make_base, two_loras):
    base = make_base()
    with pytest.raises(ValueError, match="method must be one of lora, rslora"):
        baseline_config("lora2", base)
    with pytest.raises(ValueError, match="names 1: give the folders of two or more"):
        baseline_config("xlora", base, xlora_adapters=two_loras[:1])
    with pytest.raises(ValueError, match="vblora_topk=5 of num_vectors=4"):
        baseline_config("vblora", base, rank=2, num_vectors=4, vblora_topk=5)
    with pytest.raises(ValueError, match="'gate', which is not there; the linears"):
        check_targets(base, ["up_proj", "gate"])
    base.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="'unheard_of' are not known: give target_modules"):
        baseline_config("lora", base, rank=2)
