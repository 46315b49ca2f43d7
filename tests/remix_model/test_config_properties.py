"""Random configurations: a valid one computes the formula, any other one is refused."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from remix_kernels import reference
from remix_model import ReMixConfig, RoutedLoRALinear
from remix_model.layer import routing_scaling
from remix_model.routers import make_router


@st.composite
def pools(draw: Any) -> dict[str, Any]:
    n = draw(st.integers(1, 9))
    return {
        "num_experts": n,
        "top_k": draw(st.integers(1, n)),
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.floats(1e-3, 1e3)),
        "use_rslora": draw(st.booleans()),
        "router_init_range": draw(st.floats(0.01, 3.0)),
        "router_temperature": draw(st.floats(0.1, 10.0)),
        "router_detach_input": draw(st.booleans()),
    }


SIZES = st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9))
STRATEGIES = st.sampled_from(["auto", "dense", "grouped", "gather"])


@given(pools(), SIZES, STRATEGIES, st.booleans())
def test_a_pool_computes_the_formula(
    pool: dict[str, Any], sizes: tuple[int, int, int], strategy: str, bias: bool
) -> None:
    """y = W x + b + omega sum of B A x over the k largest logits, in fp64."""
    rows, width, out = sizes
    ReMixConfig(**pool)
    base = nn.Linear(width, out, bias=bias).double()
    layer = RoutedLoRALinear(base, **pool, init_lora_weights=False, strategy=strategy).double()
    x = torch.randn(rows, width, dtype=torch.float64)
    with torch.no_grad():
        logits = (x.float() @ layer.router.float().T) / pool["router_temperature"]
        index = logits.topk(pool["top_k"], dim=-1).indices
        rank = pool["top_k"] * pool["r"]
        scaling = pool["lora_alpha"] / (math.sqrt(rank) if pool["use_rslora"] else rank)
        arguments = (base.weight, base.bias, layer.lora_A, layer.lora_B, index, scaling)
        expected = reference.routed_linear_ref(x, *arguments)
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-9, atol=1e-9)


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-3, 9),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [field.name for field in fields(ReMixConfig) if field.name != "peft_type"]


@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, min_size=1, max_size=3))
def test_any_other_configuration_is_refused(values: dict[str, Any]) -> None:
    """With a message; and what is accepted is what it says, and survives being saved."""
    try:
        config = ReMixConfig(**values)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 10
        return
    assert 1 <= config.top_k <= config.num_experts and config.r >= 1
    router = make_router(config.router_type, config.num_experts, config.top_k, config.router_kwargs)
    assert math.isfinite(routing_scaling(router, config.lora_alpha, 1, config.use_rslora))
    saved = config.to_dict()
    saved.pop("peft_type")
    assert ReMixConfig(**saved).to_dict() == config.to_dict()
