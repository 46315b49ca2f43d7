"""Answers to prompts, from the base model and from the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from remix_model.architecture import prompt_positions


def max_answer_end(model: Any) -> int | None:
    """Return how many tokens prompt and answer may have together; None: there is no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit) - prompt_positions(model)[0]


def answer(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
) -> str:
    """Generate after a prompt.

    Args:
        model: A causal language model, or an adapter on one.
        tokenizer: Its tokenizer; the answer ends at its EOS token.
        ids: The prompt's tokens, at least one.
        max_new_tokens: The longest answer.
        temperature: 0 is greedy.
        top_p: Sample from the most likely tokens that together have this probability.
        streamer: Gets the tokens as they come; see transformers.

    Returns:
        The answer's text, without special tokens.

    Raises:
        ValueError: The prompt is empty, or prompt and answer are longer than the model allows.
    """
    limit = max_answer_end(model)
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"model's {limit} positions: shorten one of them"
        )
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    input_ids = torch.tensor([list(ids)], device=model.device)
    eos = tokenizer.eos_token_id
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos,
            streamer=streamer,
            top_k=None,
            **sampling,
        )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
