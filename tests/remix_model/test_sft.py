"""`ReMixSFTTrainer` on in-memory prompt/completion and chat data with a tokenizer made here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback

from remix_model import ReMixConfig, ReMixSFTConfig, ReMixSFTTrainer
from remix_model.site import find_sites

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANIMALS = ("cat", "dog", "cow", "hen", "pig", "fox")
SOUNDS = ("meow", "woof", "moo", "cluck", "oink", "ring")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of 280 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*ANIMALS, *SOUNDS, "the says what"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", model_max_length=64
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(make_llama, tokenizer):
    model = make_llama(dtype=torch.float32, vocab_size=len(tokenizer))
    model.config.update(
        {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    )
    model.config.bos_token_id = None
    model.generation_config.update(**model.config.to_dict())
    return model


PROMPTS = Dataset.from_list(
    [
        {"prompt": f"what says the {animal}", "completion": f" {sound}"}
        for animal, sound in zip(ANIMALS, SOUNDS, strict=True)
    ]
)
CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"what says the {animal}"},
                {"role": "assistant", "content": sound},
            ]
        }
        for animal, sound in zip(ANIMALS, SOUNDS, strict=True)
    ]
)


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        defaults = {
            "output_dir": str(tmp_path),
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "per_device_train_batch_size": 3,
            "max_steps": 20,
            "logging_steps": 5,
            "learning_rate": 2e-2,
            "max_length": 48,
            "dataset_num_proc": None,
            "remix_num_selections": 3,
        }
        return ReMixSFTConfig(**{**defaults, **options})

    return make


def config():
    torch.manual_seed(1)
    return ReMixConfig(r=4, num_experts=4, top_k=2)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        pytest.param(PROMPTS, {}, id="prompt-completion"),
        pytest.param(CHATS, {}, id="chat"),
        pytest.param(CHATS, {"assistant_only_loss": True}, id="chat-assistant-only"),
        pytest.param(PROMPTS, {"remix_logprob_tokens": "response"}, id="response"),
        pytest.param(PROMPTS, {"gradient_checkpointing": True}, id="checkpointed"),
        pytest.param(
            PROMPTS,
            {"remix_grad_selections": 1, "remix_credit": "causal", "remix_log_prob": "unordered"},
            id="G1-causal-unordered",
        ),
        pytest.param(PROMPTS, {"gradient_accumulation_steps": 2}, id="accumulated"),
    ],
)
def test_it_learns(dataset, options, model, tokenizer, arguments):
    trainer = ReMixSFTTrainer(
        model=model,
        args=arguments(**options),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=config(),
    )
    routers = {n: p.clone() for n, p in trainer.model.named_parameters() if "router" in n}
    assert routers
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.5
    assert all(not torch.equal(trainer.model.get_parameter(n), p) for n, p in routers.items())
    for entry in entries:
        for name in ("loss_spread", "advantage_std", "entropy", "grad_norm_router"):
            assert math.isfinite(entry[f"remix/{name}"])
        assert list(entry["remix/expert_share"]) == list(find_sites(trainer.model))


TURNS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"what says the {animal}"},
                {"role": "assistant", "content": sound},
                {"role": "user", "content": "what"},
                {"role": "assistant", "content": f"the {animal} says {sound}"},
            ]
        }
        for animal, sound in zip(ANIMALS, SOUNDS, strict=True)
    ]
)


def prompt_and_completion(row):
    return [(row["prompt"], False), (f"{row['completion']}<eos>", True)]


def assistant_turns(row):
    pieces = []
    for message in row["messages"]:
        answer = message["role"] == "assistant"
        pieces += [(f"<|{message['role']}|>", False)]
        pieces += [(message["content"] + ("<eos>" if answer else ""), answer)]
    return pieces


def everything(pieces):
    return lambda row: [(text, True) for text, _ in pieces(row)]


@pytest.mark.parametrize(
    ("dataset", "options", "pieces"),
    [
        pytest.param(PROMPTS, {}, prompt_and_completion, id="completion"),
        pytest.param(
            PROMPTS,
            {"completion_only_loss": False},
            everything(prompt_and_completion),
            id="prompts",
        ),
        pytest.param(TURNS, {"assistant_only_loss": True}, assistant_turns, id="assistant"),
        pytest.param(TURNS, {}, everything(assistant_turns), id="chat"),
    ],
)
def test_what_the_loss_is_on(dataset, options, pieces, model, tokenizer, arguments):
    """B = 0 makes the first loss the base model's: a mean over tokens, here by hand."""
    trainer = ReMixSFTTrainer(
        model=model,
        args=arguments(per_device_train_batch_size=6, max_steps=1, logging_steps=1, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=config(),
    )
    total, count = 0.0, 0
    for row in dataset:
        split = [(tokenizer(text)["input_ids"], counted) for text, counted in pieces(row)]
        ids = torch.tensor([token for tokens, _ in split for token in tokens])
        counts = torch.tensor([counted for tokens, counted in split for _ in tokens])[1:]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + float(losses[counts].sum()), count + int(counts.sum())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_evaluation_is_top_k(model, tokenizer, arguments):
    trainer = ReMixSFTTrainer(
        model=model,
        args=arguments(max_steps=8, eval_strategy="steps", eval_steps=4),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        processing_class=tokenizer,
        peft_config=config(),
    )
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def test_evaluation_checkpoints_and_the_best_model(model, tokenizer, arguments):
    """A falling loss that should grow: the first checkpoint is the best, patience ends at 2."""
    trainer = ReMixSFTTrainer(
        model=model,
        args=arguments(
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        ),
        train_dataset=CHATS,
        eval_dataset=CHATS,
        processing_class=tokenizer,
        peft_config=config(),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    saved = load_file(best / "adapter_model.safetensors")
    last = load_file(best.parent / "checkpoint-2" / "adapter_model.safetensors")
    routers = [name for name in saved if "router" in name]
    assert routers
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[name.replace(".default", "")]), name
    assert all(not torch.equal(last[name], saved[name]) for name in routers)
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    assert 0 < tokens[0] < tokens[1]
    assert tokens[1] == sum(len(row["input_ids"]) for row in trainer.train_dataset)  # one epoch


def test_a_model_that_is_already_adapted(model, tokenizer, arguments, make_remix):
    trainer = ReMixSFTTrainer(
        model=make_remix(model),
        args=arguments(max_steps=2, logging_steps=1),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["remix/loss_spread"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, r"packing=True.*set it to False"),
        ({"eval_packing": True}, r"eval_packing=True.*set it to False"),
        ({"padding_free": True}, r"padding_free=True.*set it to False"),
        ({"loss_type": "dft"}, r"loss_type='dft'.*'nll'"),
        ({"remix_credit": "karma"}, r"remix_credit='karma'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_cannot_be_credited_is_refused(options, message, arguments):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


def test_wrong_arguments_class(model, tokenizer, tmp_path, make_remix, monkeypatch):
    """Said before the data is tokenized."""
    from trl import SFTConfig

    monkeypatch.setattr(Dataset, "map", lambda *args, **options: pytest.fail("the data was read"))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=r"args is SFTConfig; use .*ReMixSFTConfig"):
        ReMixSFTTrainer(
            model=make_remix(model),
            args=args,
            train_dataset=PROMPTS,
            processing_class=tokenizer,
        )


def test_one_selection_with_trained_routers(model, tokenizer, arguments):
    with pytest.raises(ValueError, match="remix_num_selections=1 with trainable routers"):
        ReMixSFTTrainer(
            model=model,
            args=arguments(remix_num_selections=1),
            train_dataset=PROMPTS,
            processing_class=tokenizer,
            peft_config=config(),
        )


def test_model_without_routers(model, tokenizer, arguments):
    with pytest.raises(ValueError, match="no routed layer"):
        ReMixSFTTrainer(
            model=model, args=arguments(), train_dataset=PROMPTS, processing_class=tokenizer
        )
