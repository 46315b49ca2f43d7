"""MixLoRA: softmax, the k largest renormalised, and a load-balancing loss.

    pi = softmax over the k largest of P x        y = W x + s sum_j pi_j B_j A_j x
    loss + coef * n sum_i f_i p_i                 averaged over the routed layers

s is LoRA's own scaling, f_i the share of (token, slot) pairs that expert i took and p_i the mean of
softmax(P x)_i. `mixlora` mixes LoRAs in every linear, each with its router: the form that ReMix
compares itself with (its eq. 2). `mixlora_block` is the authors' form: one router for a block, and
an expert is the whole feed-forward block with its own LoRAs, y = sum_j pi_j FFN_j(x).

The load-balancing loss needs `sample_routing` or our trainers, which know padding and the loss's
scale; a plain backward pass trains everything else.

Source: Li et al. 2024, arXiv 2404.15159, sections 3.2 and 3.3; its coefficient 0.01.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from remix_model.routers.base import Router, register_router


@register_router("mixlora")
class MixLoRARouter(Router):
    """One router a linear (or, with router_sharing="block", one a block)."""

    options: ClassVar[Mapping[str, Any]] = {**Router.options, "load_balancing_coef": 0.01}


@register_router("mixlora_block")
class MixLoRABlockRouter(MixLoRARouter):
    """One router a block, whose experts are whole feed-forward blocks."""

    whole_blocks: ClassVar[bool] = True
