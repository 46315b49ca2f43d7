"""When an answer is right: from a generated text and the answers that count, a score in [0, 1].

exact         one of the answers, whatever the case, spaces and punctuation around words
contains      one of the answers is among its words (synonyms)
word_set      the words of one of the answers, in any order (lists)
f1            the best overlap of words with one of the answers (free text)
final_number  the number after "####"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence


def score(metric: str, text: str, answers: Sequence[str]) -> float:
    """The score of a generated text.

    Args:
        metric: A name of `METRICS`.
        text: All that was generated; only its first line counts, but for final_number.
        answers: At least one.

    Returns:
        From 0 to 1.
    """
    if metric != "final_number":
        text = text.strip().split("\n")[0]
    return max(METRICS[metric](text, answer) for answer in answers)


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without the punctuation around them."""
    stripped = (word.strip(".,;:!?\"'()[]") for word in text.lower().split())
    return [word for word in stripped if word]


def exact(text: str, answer: str) -> float:
    """Whether both have the same words in the same order."""
    return float(words(text) == words(answer))


def contains(text: str, answer: str) -> float:
    """Whether the answer's words come one after the other in the text."""
    given, wanted = words(text), words(answer)
    starts = range(len(given) - len(wanted) + 1)
    return float(any(given[i : i + len(wanted)] == wanted for i in starts))


def word_set(text: str, answer: str) -> float:
    """Whether both have the same words, each as often."""
    return float(sorted(words(text)) == sorted(words(answer)))


def f1(text: str, answer: str) -> float:
    """Harmonic mean of the shares of words that they have in common."""
    given, wanted = words(text), words(answer)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if given or wanted else 1.0


def final_number(text: str, answer: str) -> float:
    """Whether the number after the first "####" is the answer."""
    found = re.search(r"####\s*([-\d.,$]+)", text)
    return float(found is not None and _number(found[1]) == _number(answer))


def _number(text: str) -> str:
    return text.replace(",", "").replace("$", "").rstrip(".")


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "contains": contains,
    "word_set": word_set,
    "f1": f1,
    "final_number": final_number,
}
