"""`remix generate`: answer prompts with an adapter, word by word."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import TextStreamer, set_seed

from remix_cli.answers import answer
from remix_cli.display import console
from remix_cli.prepare import (
    adapter_config,
    adapter_folder,
    check_vocabulary,
    load_adapter,
    quiet_libraries,
)
from remix_model.data import Example
from remix_model.tokens import prompt_ids


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix generate --help`."""
    quiet_libraries()
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError(
            f"temperature must be a number of at least 0 and top_p in (0, 1], got "
            f"{args.temperature} and {args.top_p}"
        )
    folder = adapter_folder(args.adapter)
    config = adapter_config(folder, overrides)
    prompts = args.prompt or [_read_prompt(args.prompt_file or "-")]
    if not all(prompts):
        raise ValueError("the prompt is empty: give at least one character")
    model, tokenizer = load_adapter(folder, config)
    for prompt in prompts:
        ids = prompt_ids(_example(prompt, args.chat), tokenizer)
        check_vocabulary(max(ids, default=0), config, model.config)
        for title, is_base in (("base model", True), ("with the adapter", False)):
            if is_base and not args.compare:
                continue
            if args.compare or len(prompts) > 1:
                console.rule(title if args.compare else prompt.splitlines()[-1], align="left")
            set_seed(args.seed)
            with model.disable_adapter() if is_base else nullcontext():
                answer(
                    model,
                    tokenizer,
                    ids,
                    max_new_tokens=config.max_new_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                )


def _example(prompt: str, chat: bool) -> Example:
    if not chat:
        return Example("the prompt", prompt=prompt)
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""})
    return Example("the prompt", messages=messages)


def _read_prompt(path: str) -> str:
    if path != "-":
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None
    if sys.stdin.isatty():
        print("type the prompt and end it with Ctrl-D:", file=sys.stderr)
    return sys.stdin.read()
