"""Bad arguments: the error names the value that came and says what would be right."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from remix_kernels import routed_linear, routed_lora, sample_top_k, selection_log_prob

T, IN, OUT, N, K, R = 6, 10, 12, 4, 2, 3
BACKENDS = "choose one of auto, torch, triton, reference"
STRATEGIES = "choose one of auto, dense, grouped, gather"
NO_TRITON = "'triton' is not available ... use backend='torch'"


def routed(**changes: Any) -> dict[str, Any]:
    """Valid arguments of routed_lora, some of them changed."""
    valid = {
        "x": torch.ones(T, IN),
        "lora_A": torch.ones(N, R, IN),
        "lora_B": torch.ones(N, OUT, R),
        "top_k_index": rows([0, 1], [2, 3], [1, 0], [3, 1], [2, 0], [0, 3]),
        "top_k_weights": torch.ones(T, K),
    }
    return {**valid, **changes}


def linear(**changes: Any) -> dict[str, Any]:
    return routed(**{"weight": torch.ones(OUT, IN), "bias": torch.ones(OUT), **changes})


def rows(*values: list[int]) -> torch.Tensor:
    return torch.tensor(values)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


# name: (arguments changed, parts of the message: the value, then what would be right)
ROUTED = {
    "x-list": ({"x": [1.0]}, "x must be a tensor, got list"),
    "A-none": ({"lora_A": None}, "lora_A must be a tensor, got NoneType"),
    "B-list": ({"lora_B": [1.0]}, "lora_B must be a tensor, got list"),
    "index-list": ({"top_k_index": [[0, 1]]}, "top_k_index must be a tensor, got list"),
    "weights-list": (
        {"top_k_weights": [1.0]},
        "top_k_weights must be a tensor or a number, got list",
    ),
    "x-int": ({"x": whole(T, IN)}, "x is torch.int64 ... floating point"),
    "A-int": ({"lora_A": whole(N, R, IN)}, "lora_A is torch.int64 ... floating point"),
    "B-int": ({"lora_B": whole(N, OUT, R)}, "lora_B is torch.int64 ... floating point"),
    "A-meta": ({"lora_A": meta(N, R, IN)}, "lora_A is on meta ... x on cpu ... move one"),
    "B-meta": ({"lora_B": meta(N, OUT, R)}, "lora_B is on meta ... x on cpu ... move one"),
    "index-meta": ({"top_k_index": meta(T, K).long()}, "top_k_index is on meta ... on cpu"),
    "weights-meta": ({"top_k_weights": meta(T, K)}, "top_k_weights is ... on meta ... on cpu"),
    "x-0d": ({"x": torch.tensor(1.0)}, "x [] ... [..., in]"),
    "A-2d": ({"lora_A": ones(R, IN)}, "lora_A [3, 10] ... [n, r, in]"),
    "B-2d": ({"lora_B": ones(OUT, R)}, "lora_B [12, 3] ... [n, out, r]"),
    "A-in": ({"lora_A": ones(N, R, IN + 1)}, "lora_A is [4, 3, 11] ... be [4, 3, 10]"),
    "A-n": ({"lora_A": ones(N - 1, R, IN)}, "lora_A is [3, 3, 10] ... [1, ...] when shared"),
    "A-r": ({"lora_A": ones(N, R + 1, IN)}, "lora_A is [4, 4, 10] ... be [4, 3, 10]"),
    "r-0": (
        {"lora_A": ones(N, 0, IN), "lora_B": ones(N, OUT, 0)},
        "lora_A is [4, 0, 10] ... r >= 1",
    ),
    "index-float": ({"top_k_index": ones(T, K)}, "top_k_index is torch.float32 ... integer"),
    "index-bool": ({"top_k_index": ones(T, K).bool()}, "top_k_index is torch.bool ... integer"),
    "index-0d": ({"top_k_index": torch.tensor(1)}, "top_k_index is [] ... 1 <= k <= n = 4"),
    "k-0": ({"top_k_index": whole(T, 0)}, "top_k_index is [6, 0] ... 1 <= k <= n = 4"),
    "k-above-n": ({"top_k_index": whole(T, 5)}, "top_k_index is [6, 5] ... 1 <= k <= n = 4"),
    "index-rows": (
        {"top_k_index": rows(*[[0, 1]] * 5)},
        "top_k_index is [5, 2] ... x [6, 10] ... be [6, 2], or ['M', 6, 2]",
    ),
    "index-too-high": (
        {"top_k_index": rows(*[[0, 1]] * 5, [0, 4])},
        "top_k_index holds 4 ... 0 to 3",
    ),
    "index-negative": (
        {"top_k_index": rows([0, -1], *[[0, 1]] * 5)},
        "top_k_index holds -1 ... 0 to 3",
    ),
    "index-twice": (
        {"top_k_index": rows(*[[0, 1]] * 4, [3, 3], [2, 2])},
        "top_k_index chooses an expert twice in row 4: [3, 3] ... distinct",
    ),
    "index-twice-apart": (
        {"top_k_index": rows(*[[0, 1, 2]] * 5, [3, 1, 3]), "top_k_weights": 1.0},
        "top_k_index chooses an expert twice in row 5: [3, 1, 3] ... distinct",
    ),
    "index-twice-shared-x": (
        {"top_k_index": rows(*[[0, 1]] * 11, [3, 3]).view(2, T, K), "top_k_weights": 1.0},
        "top_k_index chooses an expert twice in row 11: [3, 3] ... distinct",
    ),
    "weights-shape": (
        {"top_k_weights": ones(T)},
        "top_k_weights is [6] ... a number or shaped like top_k_index, [6, 2]",
    ),
    "weights-int": (
        {"top_k_weights": whole(T, K)},
        "top_k_weights is ... int64 ... floating point",
    ),
    "backend": ({"backend": "cuda"}, f"backend='cuda' is unknown; {BACKENDS}"),
    "triton": ({"backend": "triton"}, NO_TRITON),
    "strategy": ({"strategy": "fast"}, f"strategy='fast' is unknown; {STRATEGIES}"),
    "strategy-of-the-reference": (
        {"strategy": "fast", "backend": "reference"},
        f"strategy='fast' is unknown; {STRATEGIES}",
    ),
}
BASE = {
    "base-list": ({"base": [1.0]}, "base must be a tensor, got list"),
    "base-shape": ({"base": ones(OUT)}, "base is [12] ... must be [6, 12]"),
    "base-dtype": ({"base": ones(T, OUT).half()}, "base is ... torch.float16 ... torch.float32"),
    "base-meta": ({"base": meta(T, OUT)}, "base is ... on meta ... on cpu"),
}
FROZEN = {
    "weight-none": ({"weight": None}, "weight must be a tensor, got NoneType"),
    "weight-shape": ({"weight": ones(IN, OUT)}, "weight is [10, 12] ... [12, 10]"),
    "weight-int": ({"weight": whole(OUT, IN)}, "weight is ... int64 ... floating point"),
    "weight-meta": ({"weight": meta(OUT, IN)}, "weight is on meta ... x on cpu ... move one"),
    "bias-list": ({"bias": [1.0]}, "bias must be a tensor, got list"),
    "bias-shape": ({"bias": ones(IN)}, "bias is [10] ... [12]"),
    "bias-int": ({"bias": whole(OUT)}, "bias is ... int64 ... floating point"),
    "bias-meta": ({"bias": meta(OUT)}, "bias is ... on meta ... cpu"),
}
SAMPLE = {
    "logits-list": ({"logits": [0.0]}, "logits must be a tensor, got list"),
    "logits-int": ({"logits": whole(3, 4)}, "logits is [3, 4] torch.int64 ... floating point"),
    "logits-0d": ({"logits": torch.tensor(1.0)}, "logits is [] ... [..., n]"),
    "no-experts": ({"logits": ones(3, 0)}, "logits is [3, 0] ... n >= 1"),
    "k-above-n": ({"k": 5}, "k=5 ... 1 <= k <= n = 4"),
    "k-0": ({"k": 0}, "k=0 ... 1 <= k <= n = 4"),
    "offset": ({"offset": -1}, "offset=-1 is negative"),
    "backend": ({"backend": "gpu"}, f"backend='gpu' is unknown; {BACKENDS}"),
    "triton": ({"backend": "triton"}, NO_TRITON),
}
LOG_PROB = {
    "logits-list": ({"logits": [0.0]}, "logits must be a tensor, got list"),
    "logits-int": ({"logits": whole(2, 4)}, "logits is [2, 4] torch.int64 ... floating point"),
    "index-list": ({"top_k_index": [[0, 1]]}, "top_k_index must be a tensor, got list"),
    "index-float": ({"top_k_index": ones(2, 2)}, "top_k_index is torch.float32 ... integer"),
    "index-meta": ({"top_k_index": meta(2, 2).long()}, "top_k_index is on meta ... cpu"),
    "rows": ({"top_k_index": rows([0, 1])}, "top_k_index is [1, 2] ... logits [2, 4]"),
    "k-above-n": ({"top_k_index": whole(2, 5)}, "top_k_index is [2, 5] ... 1 <= k <= n = 4"),
    "too-high": ({"top_k_index": rows([0, 9], [0, 1])}, "top_k_index holds 9 ... 0 to 3"),
    "twice": ({"top_k_index": rows([0, 1], [1, 1])}, "twice in row 1: [1, 1] ... distinct"),
    "backend": ({"backend": "gpu"}, f"backend='gpu' is unknown; {BACKENDS}"),
    "triton": ({"backend": "triton"}, NO_TRITON),
}
UNORDERED = {
    k: ({**changes, "unordered": True}, message) for k, (changes, message) in LOG_PROB.items()
}


def check(op: Any, arguments: dict[str, Any], message: str) -> None:
    """The op raises TypeError for no tensor, else ValueError, with these parts in this order."""
    with pytest.raises((TypeError, ValueError)) as caught:
        op(**arguments)
    pattern = ".*".join(re.escape(part) for part in message.split(" ... "))
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert caught.type is (TypeError if "must be a tensor" in message else ValueError)
    assert "  " not in str(caught.value)


def table(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("changes,message", list(cases.values()), ids=list(cases))


@table({**ROUTED, **BASE})
def test_routed_lora(changes: dict[str, Any], message: str) -> None:
    check(routed_lora, routed(**changes), message)


@table({**ROUTED, **FROZEN})
def test_routed_linear(changes: dict[str, Any], message: str) -> None:
    check(routed_linear, linear(**changes), message)


@table(SAMPLE)
def test_sample_top_k(changes: dict[str, Any], message: str) -> None:
    check(sample_top_k, {"logits": ones(3, 4), "k": 2, "seed": 0, **changes}, message)


@table({**LOG_PROB, **{f"unordered-{name}": case for name, case in UNORDERED.items()}})
def test_selection_log_prob(changes: dict[str, Any], message: str) -> None:
    valid = {"logits": ones(2, 4), "top_k_index": rows([0, 1], [2, 3])}
    check(selection_log_prob, {**valid, **changes}, message)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's machine without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_check_false_trusts_the_caller() -> None:
    """For tensors that are known to be right; names are still checked."""
    twice = rows(*[[0, 1]] * 5, [3, 3])
    assert routed_lora(**routed(top_k_index=twice), check=False).shape == (T, OUT)
    assert routed_linear(**linear(top_k_index=twice), check=False).shape == (T, OUT)
    check(routed_lora, routed(strategy="fast", check=False), "strategy='fast' ... choose one of")


def test_the_valid_arguments_are_valid() -> None:
    assert routed_lora(**routed()).shape == (T, OUT)
    assert routed_linear(**linear()).shape == (T, OUT)


@pytest.mark.parametrize("name,part", [("fast", "choose one of"), ("triton", "not available")])
def test_a_bad_environment_is_named(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMIX_BACKEND", name)
    message = f"REMIX_BACKEND='{name}' ... {part}"
    check(routed_lora, routed(), message)
    check(routed_linear, linear(), message)
    check(sample_top_k, {"logits": ones(3, 4), "k": 2, "seed": 0}, message)
    check(selection_log_prob, {"logits": ones(1, 4), "top_k_index": rows([0, 1])}, message)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [[0, 4], [3, 3]], ids=["too-high", "twice"])
def test_strict_checks_values_on_a_gpu(bad: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading an index on the host waits for the device: only under REMIX_STRICT=1."""
    monkeypatch.setenv("REMIX_STRICT", "1")
    arguments = {k: v.cuda() for k, v in routed(top_k_index=rows(*[bad] * T)).items()}
    check(routed_lora, arguments, "top_k_index")
