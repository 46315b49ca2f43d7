"""Labels where there is loss and nowhere else, lengths within limits, and padding."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from remix_model.data import Example
from remix_model.tokens import DataCollator, prompt_ids, resolve_max_length, tokenize

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ok"},
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that every expected length can be counted by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", "<bos>", *alphabet])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", bos_token="<bos>")


def learned(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    """What the labels say, with | at each gap."""
    text = ""
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        text += "|" if label == -100 else tokenizer.decode([token])
    return "|".join(part for part in text.split("|") if part)


def test_only_the_response_and_its_end_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = tokenize([Example("x", "ab", "cde")], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "abcde<eos>"
    assert learned(tokenizer, row) == "cde<eos>"
    assert row["input_ids"][:2] == prompt_ids(Example("x", "ab", "cde"), tokenizer)


def test_train_on_all(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = tokenize([Example("x", "ab", "cde")], tokenizer, train_on="all")
    assert learned(tokenizer, row) == "abcde<eos>"


def test_bos_comes_first_where_the_tokenizer_adds_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    (row,) = tokenize([Example("x", "ab", "c")], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<bos>abc<eos>"
    assert learned(tokenizer, row) == "c<eos>"


def test_every_assistant_turn_of_a_chat_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    example = Example("x", messages=CHAT)
    (row,) = tokenize([example], tokenizer)
    assert learned(tokenizer, row) == "yo<eos>|ok<eos>"
    assert tokenizer.decode(prompt_ids(example, tokenizer)).endswith("bye<eos><assistant>")
    (row,) = tokenize([example], tokenizer, train_on="all")
    assert -100 not in row["labels"]


def test_chat_template_that_rewrites_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"f line 3: .*rewrites earlier text.*message 2"):
        tokenize([Example("f line 3", messages=CHAT)], tokenizer)


def test_chat_without_or_against_a_template_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no chat template: use an instruct model"):
        tokenize([Example("x", messages=CHAT)], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"f line 3.*refuses it: roles must alternate"):
        tokenize([Example("f line 3", messages=CHAT)], tokenizer)


LONG = [Example("f line 1", "a", "b"), Example("f line 2", "a" * 10, "b" * 9)]  # 3, 20 tokens


def test_too_long_is_an_error_by_default(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenize(LONG, tokenizer, max_length=20)) == 2
    with pytest.raises(ValueError, match=r"f line 2 is 20 tokens long and max_length is 19"):
        tokenize(LONG, tokenizer, max_length=19, model_max_length=64)
    with pytest.raises(ValueError, match=r"f line 2 is 20 tokens long and the model takes 16"):
        tokenize(LONG, tokenizer, model_max_length=16)


def test_too_long_may_be_dropped_or_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenize(LONG, tokenizer, max_length=19, long_examples="drop")) == 1
    rows = tokenize(LONG, tokenizer, max_length=12, long_examples="truncate")
    assert [len(row["input_ids"]) for row in rows] == [3, 12]
    assert learned(tokenizer, rows[1]) == "bb"


def test_nothing_left_to_learn_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"f line 2 has no response tokens.*within max_length=10"):
        tokenize(LONG, tokenizer, max_length=10, long_examples="truncate")
    with pytest.raises(ValueError, match="all 1 examples are longer than max_length=5"):
        tokenize(LONG[1:], tokenizer, max_length=5, long_examples="drop")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="x has no response tokens"):
        # The only token would be predicted from nothing.
        tokenize([Example("x", "", "b")], tokenizer)


def test_max_length_is_checked_against_the_model() -> None:
    assert resolve_max_length(None, None) == resolve_max_length(None, 8192) == 1024
    assert resolve_max_length(None, 512) == resolve_max_length(512, 512) == 512
    with pytest.raises(ValueError, match="max_length=600 is more than the model's limit of 512"):
        resolve_max_length(600, 512)
    with pytest.raises(ValueError, match="at least 2"):
        resolve_max_length(1, None)


@pytest.mark.parametrize("name", ["long_examples", "train_on"])
def test_unknown_option_is_an_error(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* got 'x'"):
        tokenize(LONG, tokenizer, **{name: "x"})


def test_collator_pads_right() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = DataCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert DataCollator(9, pad_to_multiple_of=4)(rows)["labels"].shape == (2, 4)


def test_collator_refuses_packed_rows() -> None:
    row = {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 0]}
    with pytest.raises(ValueError, match=r"packed batches are not supported, got .*position_ids"):
        DataCollator(0)([row])
