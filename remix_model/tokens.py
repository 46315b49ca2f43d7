"""Examples to token ids and labels, and batches of them.

Prompt and response are tokenised apart and concatenated, so the boundary is exact and the prompt's
tokens are those that generation will see. A label of -100 carries no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from remix_model.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
DEFAULT_MAX_LENGTH = 1024


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    model_max_length: int | None = None,
    long_examples: str = "error",
    train_on: str = "response",
) -> list[dict[str, Any]]:
    """Turn examples into `input_ids` and `labels`.

    Args:
        examples: As `load_examples` gives them.
        tokenizer: The model's. Its EOS token, where it has one, ends every response (a chat
            template ends its own turns).
        max_length: The longest sequence in tokens; None is 1024, or the model's limit where that is
            less.
        model_max_length: The model's own limit (`config.max_position_embeddings`).
        long_examples: What to do with a longer one: "error", "drop" it, or "truncate" its end.
        train_on: "response" (a chat's assistant turns), or "all" tokens.

    Returns:
        One dictionary per example. Labels are the ids where there is loss and -100 elsewhere. An
        example that names its task has it as `task`, which the collator leaves out.

    Raises:
        ValueError: An example is too long, or has nothing to learn; a chat template that does not
            keep its beginning as turns are added; an argument out of range.
    """
    if long_examples not in ("error", "drop", "truncate"):
        raise ValueError(
            f"long_examples must be 'error', 'drop' or 'truncate', got {long_examples!r}"
        )
    if train_on not in ("response", "all"):
        raise ValueError(f"train_on must be 'response' or 'all', got {train_on!r}")
    max_length = resolve_max_length(max_length, model_max_length)

    rows = []
    for example, (ids, labels) in zip(
        examples, _encode(examples, tokenizer, train_on), strict=True
    ):
        if len(ids) > max_length:
            if long_examples == "drop":
                continue
            if long_examples == "error":
                raise ValueError(_too_long(example, len(ids), max_length, model_max_length))
            ids, labels = ids[:max_length], labels[:max_length]
        # The first token is predicted from nothing, so its label never counts.
        if all(label == IGNORE_INDEX for label in labels[1:]):
            cut = f" within max_length={max_length}" if long_examples == "truncate" else ""
            raise ValueError(
                f"{example.origin} has no response tokens to learn{cut}: remove it"
                + (", raise max_length, or use long_examples=drop" if cut else "")
            )
        task = {"task": example.task} if example.task else {}
        rows.append({"input_ids": ids, "labels": labels, **task})
    if not rows:
        raise ValueError(
            f"all {len(examples)} examples are longer than max_length={max_length} tokens and were "
            f"dropped: raise max_length or use long_examples=truncate"
        )
    return rows


def resolve_max_length(max_length: int | None, model_max_length: int | None) -> int:
    """Return the longest sequence allowed: at most the model's limit, by default 1024 tokens.

    Raises:
        ValueError: max_length is less than 2 or more than the model's limit.
    """
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, model_max_length or DEFAULT_MAX_LENGTH)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    if model_max_length is not None and max_length > model_max_length:
        raise ValueError(
            f"max_length={max_length} is more than the model's limit of {model_max_length} "
            f"positions: lower it to {model_max_length} or less"
        )
    return max_length


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a response follows: the prompt, or a chat up to its last answer."""
    if example.messages is None:
        return _bos(tokenizer) + _plain_ids(tokenizer, [example.prompt])[0]
    roles = [message["role"] for message in example.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return _chat_ids(tokenizer, example.messages[:last], example.origin, add_generation_prompt=True)


class DataCollator:
    """Pad examples on the right into one batch.

    Args:
        pad_token_id: Fills `input_ids`; it is masked out, so any id of the vocabulary does.
        pad_to_multiple_of: Round the batch's length up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        """Pad with the tokenizer's padding token, or its EOS, or 0."""
        for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return cls(token_id)
        return cls(0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, int64 [batch, length].

        Raises:
            ValueError: The rows are packed: several documents in one row, told apart by position or
                segment.
        """
        packed = {"position_ids", "seq_lengths", "cu_seq_lens_q", "segment_ids"} & set(rows[0])
        if packed:
            raise ValueError(
                f"packed batches are not supported, got the columns {sorted(packed)}: give one "
                f"document per row and turn packing off"
            )
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
        }
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            batch["input_ids"][i, :size] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][i, :size] = 1
            batch["labels"][i, :size] = torch.as_tensor(row["labels"])
        return batch


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, labels) of every example, whatever its length."""
    prompts = _plain_ids(tokenizer, [example.prompt for example in examples])
    responses = _plain_ids(tokenizer, [example.response for example in examples])
    bos = _bos(tokenizer)
    eos = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        if example.messages is None:
            ids = bos + prompt + response + eos
            labels = [IGNORE_INDEX] * len(bos + prompt) + response + eos
        elif train_on == "response":
            ids, labels = _encode_chat(example.messages, tokenizer, example.origin)
        else:
            ids, labels = _chat_ids(tokenizer, example.messages, example.origin), []
        yield ids, labels if train_on == "response" else list(ids)


def _encode_chat(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[list[int], list[int]]:
    """Label the assistant's turns, found by templating the chat turn by turn.

    A turn's tokens are what the chat up to and including it has more than the chat before it,
    generation prompt included. That is only true of a template whose output for the first turns is
    a prefix of its output for all.
    """
    ids = _chat_ids(tokenizer, messages, origin)
    labels = [IGNORE_INDEX] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before: list[int] = []
        if i > 0:
            before = _chat_ids(tokenizer, messages[:i], origin, add_generation_prompt=True)
        through = _chat_ids(tokenizer, messages[: i + 1], origin)
        if ids[: len(through)] != through or through[: len(before)] != before:
            raise ValueError(
                f"{origin}: the tokenizer's chat template rewrites earlier text as turns are "
                f"added, so message {i + 1}'s tokens cannot be told apart: use prompt_template and "
                f"response_field, train_on=all, or a template that only appends"
            )
        labels[len(before) : len(through)] = through[len(before) :]
    return ids, labels


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    origin: str,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{origin} is a chat and the model's tokenizer has no chat template: use an instruct "
            f"model, or prompt_template and response_field"
        )
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )
    except Exception as error:  # whatever the template's own code raises
        raise ValueError(f"{origin}: the tokenizer's chat template refuses it: {error}") from error
    return list(ids)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] where the tokenizer starts every text with one, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def _too_long(example: Example, length: int, max_length: int, model_limit: int | None) -> str:
    fix = "shorten it, or set long_examples to drop or truncate"
    if model_limit is None or length <= model_limit:
        return (
            f"{example.origin} is {length} tokens long and max_length is {max_length}: raise "
            f"max_length{f' (the model takes {model_limit})' if model_limit else ''}, {fix}"
        )
    return f"{example.origin} is {length} tokens long and the model takes {model_limit}: {fix}"
