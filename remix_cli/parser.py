"""The command line's flags, made from the fields of `RunConfig`.

Imports nothing heavy: help is instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, NoReturn, get_origin

from remix_cli.config import (
    check_value,
    closest,
    option_fields,
    option_types,
)

GROUP_TITLES = {
    "model": "base model",
    "data": "data",
    "method": "what is trained",
    "peft": "PEFT's own methods",
    "training": "training",
    "output": "output",
}
# What evaluation and generation take from the other groups.
_RUNTIME_FIELDS = ("backend",)
_EVAL_FIELDS = (*_RUNTIME_FIELDS, "per_device_eval_batch_size")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse a command line.

    Args:
        argv: The arguments after the program's name. Flags may have underscores in place of
            hyphens.

    Returns:
        (the command and its own flags, the RunConfig fields that were given).

    Raises:
        SystemExit: Help was asked for (code 0), or an argument is wrong (code 2).
    """
    parser, commands = build_parser()
    args, unknown = parser.parse_known_args([_hyphenate(token) for token in argv])
    command = commands[args.command] if args.command else parser
    if unknown:
        flag = next((token for token in unknown if token.startswith("-")), unknown[0])
        flags = [option for option in command._option_string_actions if option.startswith("--")]
        hint = closest(flag.split("=")[0], flags)
        command.error(f"unknown argument {flag!r}{hint} (`{command.prog} --help` lists them)")
    if not args.command:
        parser.print_help()
        raise SystemExit(2)
    overrides = {}
    for name, raw in vars(args).pop("config_fields", {}).items():
        try:
            overrides[name] = parse_flag(name, raw)
        except ValueError as error:
            command.error(str(error))
    return args, overrides


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser and, by command, its subparsers."""
    parser = _Parser(
        prog="remix",
        description="Finetune language models with ReMix: mixtures of LoRAs whose routers are "
        "trained by reinforcement.",
        epilog="`remix COMMAND --help` lists a command's flags.",
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    train = _add_command(commands, "train", "finetune a model and keep the adapter")
    _add_config(train, *GROUP_TITLES)
    validate = _add_command(
        commands, "validate", "check configuration and data, count parameters, estimate memory"
    )
    validate.add_argument("--adapter", metavar="DIR", help="check a saved adapter, and only that")
    _add_config(validate, *GROUP_TITLES)

    evaluate = _add_command(commands, "eval", "compare an adapter's loss with the base model's")
    evaluate.add_argument("--adapter", required=True, metavar="DIR", help="a run or adapter folder")
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval tasks, not the loss")
    evaluate.add_argument("--include-path", metavar="DIR", help="a folder of task files of yours")
    evaluate.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in a task's prompt"
    )
    evaluate.add_argument("--task-limit", type=int, metavar="N", help="documents per task")
    evaluate.add_argument("--json", metavar="FILE", help="write the results to a file too")
    _add_fields(evaluate, "model", "data", extra=_EVAL_FIELDS)

    generate = _add_command(commands, "generate", "answer prompts with an adapter")
    generate.add_argument("--adapter", required=True, metavar="DIR", help="a run or adapter folder")
    prompts = generate.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given repeatedly"
    )
    prompts.add_argument("--prompt-file", metavar="FILE", help="one prompt; - (default) is stdin")
    generate.add_argument("--chat", action="store_true", help="send it through the chat template")
    generate.add_argument("--compare", action="store_true", help="answer with the base model first")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from this much probability"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the sampled answers")
    _add_fields(generate, "model", extra=(*_RUNTIME_FIELDS, "max_new_tokens"))

    report = _add_command(commands, "report", "show runs side by side on one page of HTML")
    report.usage = "remix report RUN [RUN ...] [--flag value ...]"
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders that `remix train` wrote")
    report.add_argument(
        "--output", default="report.html", metavar="FILE", help="default: report.html"
    )
    report.add_argument("--png", metavar="DIR", help="write the figures as PNG files too")
    report.add_argument(
        "--any-model", action="store_true", help="runs of different base models, side by side"
    )

    export = _add_command(
        commands, "export", "write the experts that are chosen most as a plain LoRA"
    )
    export.add_argument("--adapter", required=True, metavar="DIR", help="a run or adapter folder")
    export.add_argument("--output", required=True, metavar="DIR", help="a new folder for the LoRA")
    export.add_argument(
        "--selection",
        default="most_frequent",
        metavar="FILE",
        help="JSON with the experts of each linear; default: those that held-out tokens take most",
    )
    _add_fields(export, "model", "data", extra=_EVAL_FIELDS)

    bench = _add_command(
        commands, "bench", "time the adapters' strategies on this machine's processor"
    )
    bench.add_argument(
        "--calibrate", action="store_true", help="fit the cost model to this machine, and keep it"
    )
    bench.add_argument(
        "--seconds", type=float, default=2.0, metavar="X", help="for each shape (default: 2)"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="torch's (default: as it chooses)")

    _add_command(commands, "env", "print versions, devices and settings, for a report of a problem")
    return parser, dict(commands.choices)


def parse_flag(name: str, raw: str | list[str] | None) -> Any:
    """Turn a field's text from the command line into its value.

    Raises:
        ValueError: It does not fit the field's type or choices.
    """
    kinds = option_types(name)
    if raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null")):
        return check_value(name, None)
    if isinstance(raw, list):
        words = [word for item in raw for word in item.split(",") if word]
        if str in kinds and len(raw) == 1 and len(words) == 1:
            return check_value(name, words[0])
        numbers = Sequence[int] in kinds
        return check_value(name, [_int(word) for word in words] if numbers else words)
    if name == "prompt_template":  # a shell passes these two characters on as they are
        raw = raw.replace("\\n", "\n").replace("\\t", "\t")
    value: Any = raw
    if any(get_origin(kind) is Mapping for kind in kinds):
        value = _mapping(raw)
    elif bool in kinds:
        value = {"true": True, "yes": True, "false": False, "no": False}.get(raw.lower(), raw)
    elif int in kinds:
        value = _int(raw)
    return check_value(name, value)


def _mapping(raw: str) -> Any:
    """A mapping, written as in YAML or JSON; what cannot be read stays text."""
    import yaml

    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _StoreField(argparse.Action):
    """Collect the given RunConfig fields in one dictionary, apart from a command's own flags."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = dict(getattr(namespace, "config_fields", {}))
        given[self.dest] = self.const if values in (None, []) else values
        namespace.config_fields = given


def _add_command(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        usage=f"remix {name} [--flag value ...]",
    )
    parser.set_defaults(command=name)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_config(parser: argparse.ArgumentParser, *groups: str) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with the options below as keys")
    _add_fields(parser, *groups)


def _add_fields(parser: argparse.ArgumentParser, *groups: str, extra: tuple[str, ...] = ()) -> None:
    for group in groups:
        section = parser.add_argument_group(GROUP_TITLES[group])
        for item in option_fields(group):
            _add_field(section, item)
    for item in option_fields(*GROUP_TITLES):
        if item.name in extra and item.metadata["group"] not in groups:
            _add_field(parser, item)


def _add_field(parser: Any, item: Field[Any]) -> None:
    kinds = option_types(item.name)
    flag = "--" + item.name.replace("_", "-")
    help = item.metadata["help"].replace("%", "%%")
    if item.default is not None:
        help += f" (default: {item.default})"
    nargs, metavar = None, "TEXT"
    if bool in kinds:
        nargs, metavar = "?", "BOOL"
    elif any(get_origin(kind) is Sequence for kind in kinds):
        nargs, metavar = "+", "NAME" if str in kinds else "N"
    elif any(get_origin(kind) is Mapping for kind in kinds):
        metavar = "MAPPING"
    elif int in kinds:
        metavar = "N"
    elif float in kinds:
        metavar = "X"
    if item.metadata["choices"]:
        metavar = "{" + ",".join(item.metadata["choices"]) + "}"
    common: dict[str, Any] = {
        "dest": item.name,
        "action": _StoreField,
        "default": argparse.SUPPRESS,
    }
    parser.add_argument(flag, nargs=nargs, const="true", metavar=metavar, help=help, **common)
    if bool in kinds:
        no = "--no-" + item.name.replace("_", "-")
        parser.add_argument(no, nargs=0, const="false", help=argparse.SUPPRESS, **common)


def _hyphenate(token: str) -> str:
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value


def _int(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text
