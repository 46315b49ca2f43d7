"""Three data sets as prompts and responses; read where they lie, never copied into the project.

| task | train | dev | test |
| --- | --- | --- | --- |
| instruction_induction | `induce_*`, 150 an instruction at most | | `execute_*`, 10 each |
| trec | `TREC.train.all` but dev | 200 of `TREC.train.all` | `TREC.test.all` |
| gsm8k | `train.jsonl` | | the first 64 of `test.jsonl` |

What is in test or dev is taken out of train, by its prompt. The files that `remix train` reads are
written to a folder of the runner's.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[3] / "shared" / "data"
VERSION = 1  # to be raised when prompts, splits or metrics change: rows of another one do not count
PER_INSTRUCTION = {"train": 150, "test": 10}
DEV = 200
GSM8K_TEST = 64


@dataclass(frozen=True)
class Item:
    """One example.

    Attributes:
        prompt: What the model is given.
        response: What it learns to say, or the reference whose loss is taken; begins with a space.
        group: The instruction, or the data set where there is only one.
        answers: What counts as right.
        metric: A name of `metrics.METRICS`.
    """

    prompt: str
    response: str
    group: str
    answers: tuple[str, ...]
    metric: str = "exact"


Split = dict[str, list[Item]]

# How each of the 24 tasks is asked for, in a few words: prompts are most of a step's tokens.
INSTRUCTIONS = {
    "active_to_passive": "Make passive",
    "antonyms": "Opposite",
    "cause_and_effect": "Which is the cause?",
    "common_concept": "What do they share?",
    "diff": "Subtract",
    "first_word_letter": "First letter",
    "informal_to_formal": "Make formal",
    "larger_animal": "The larger animal",
    "letters_list": "Spell out",
    "negation": "Negate",
    "num_to_verbal": "In words",
    "orthography_starts_with": "Words that start with the letter",
    "rhymes": "A rhyme",
    "second_word_letter": "Second letter",
    "sentence_similarity": "Similarity from 0 to 5",
    "sentiment": "Sentiment",
    "singular_to_plural": "Plural",
    "sum": "Add",
    "synonyms": "Synonym",
    "taxonomy_animal": "Only the animals",
    "translation_en-de": "German",
    "translation_en-es": "Spanish",
    "translation_en-fr": "French",
    "word_in_context": "Same meaning?",
}
# As the data set's authors score them; all others are exact matches of one of the answers.
METRIC_OF = {
    "common_concept": "f1",
    "informal_to_formal": "f1",
    "orthography_starts_with": "word_set",
    "taxonomy_animal": "word_set",
    "synonyms": "contains",
}
ANSWERS_OF = {
    "rhymes": "other_rhymes",
    "translation_en-de": "possible_translations",
    "translation_en-es": "possible_translations",
    "translation_en-fr": "possible_translations",
    "word_in_context": "possible_outputs",
}
TREC_LABELS = ("description", "entity", "abbreviation", "human", "location", "numeric")


def data_root(given: str | Path | None = None) -> Path:
    """The folder of data sets: what is given, else $REMIX_TEST_DATA, else ../shared/data.

    Raises:
        FileNotFoundError: It is not there.
    """
    root = Path(given or os.environ.get("REMIX_TEST_DATA") or SHARED).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder of data sets {root}: give --data, or set REMIX_TEST_DATA"
        )
    return root


def write_splits(task: str, root: Path, folder: Path) -> Path:
    """Write train, dev and test of a task as jsonl; the same files every time.

    Args:
        task: A name of `READERS`.
        root: The folder of data sets.
        folder: Gets a folder of the task's name.

    Returns:
        That folder.

    Raises:
        OSError: The data set is not there.
    """
    target = folder / task
    target.mkdir(parents=True, exist_ok=True)
    for name, items in without_leaks(READERS[task](root / task)).items():
        temporary = target / f".{name}.jsonl"
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(target / f"{name}.jsonl")
    return target


def read_items(path: Path) -> list[Item]:
    """What `write_splits` wrote."""
    rows = map(json.loads, _lines(path))
    return [Item(**{**row, "answers": tuple(row["answers"])}) for row in rows]


def without_leaks(splits: Split) -> Split:
    """The splits, without what of train or dev is also held out later."""
    seen: set[str] = set()
    kept: Split = {}
    for name in ("test", "dev", "train"):
        items = splits.get(name, [])
        kept[name] = [item for item in items if item.prompt not in seen]
        seen |= {item.prompt for item in items}
    return kept


def read_instruction_induction(folder: Path) -> Split:
    """24 small tasks, mixed."""
    splits: Split = {"train": [], "test": []}
    for name in INSTRUCTIONS:
        for split, kind in (("train", "induce"), ("test", "execute")):
            text = (folder / f"{kind}_{name}.json").read_text(encoding="utf-8")
            records = list(json.loads(text)["examples"].values())
            chosen = random.Random(name).sample(records, min(len(records), PER_INSTRUCTION[split]))
            splits[split] += [_instruction(name, i, record) for i, record in enumerate(chosen)]
    random.Random(0).shuffle(splits["train"])
    return splits


def _instruction(name: str, number: int, record: dict[str, Any]) -> Item:
    answers: Sequence[str] = record.get(ANSWERS_OF.get(name, ""), [])
    if name == "cause_and_effect":  # the two sentences in either order
        pair = [record["cause"], record["effect"]][:: 1 if number % 2 else -1]
        given = f"Sentence 1: {pair[0]} Sentence 2: {pair[1]}"
        response = record["cause"]
    elif name == "common_concept":
        given, response = ", ".join(record["items"]), record["concept"]
        answers = record["all_common_concepts"]
    else:
        given, response = record["input"], record["output"]
    right = [answer for answer in (response, *answers) if name != "rhymes" or answer != given]
    return Item(
        prompt=f"{INSTRUCTIONS[name]}: {given}\nAnswer:",
        response=f" {response}",
        group=name,
        answers=tuple(dict.fromkeys(right)),
        metric=METRIC_OF.get(name, "exact"),
    )


def read_trec(folder: Path) -> Split:
    """Six kinds of question."""
    train = _trec_items(folder / "TREC.train.all")
    random.Random(0).shuffle(train)
    return {
        "train": train[DEV:],
        "dev": train[:DEV],
        "test": _trec_items(folder / "TREC.test.all"),
    }


def _trec_items(path: Path) -> list[Item]:
    pairs = (line.split(" ", 1) for line in path.read_text(encoding="latin-1").splitlines())
    return [
        Item(f"{question.strip()}\nType:", f" {label}", "trec", (label,))
        for number, question in pairs
        for label in [TREC_LABELS[int(number)]]
    ]


def read_gsm8k(folder: Path) -> Split:
    """Sums in words, with worked solutions."""
    return {
        "train": list(_gsm8k_items(_lines(folder / "train.jsonl"))),
        "test": list(_gsm8k_items(_lines(folder / "test.jsonl")[:GSM8K_TEST])),
    }


def _lines(path: Path) -> list[str]:
    """The lines of a jsonl file; `splitlines` would also end them inside a text."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _gsm8k_items(lines: Sequence[str]) -> Iterable[Item]:
    for line in lines:
        record = json.loads(line)
        prompt = f"Question: {record['question']}\nAnswer:"
        final = record["answer"].rsplit("####", 1)[1].strip()
        yield Item(prompt, f" {record['answer']}", "gsm8k", (final,), "final_number")


READERS: dict[str, Callable[[Path], Split]] = {
    "instruction_induction": read_instruction_induction,
    "trec": read_trec,
    "gsm8k": read_gsm8k,
}
