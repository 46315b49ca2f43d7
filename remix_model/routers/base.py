"""What a type of router is: how it scores the experts of a row, and what the chosen ones weigh.

A router is a plain object without tensors of its own: the layer keeps its one parameter and hands
it in, so that it is trained, sharded, saved and loaded like every other. There are two kinds.

    a policy (learned = False)   the k experts weigh the same (omega). In training they are drawn
                                 from softmax(logits), and RLOO trains the router
    learned = True               the k largest are taken in training too, each times its weight, and
                                 the weights carry the loss's gradient to the router

To add one, subclass `Router`, say how it scores, and register it under a name:

    @register_router("cosine")
    class CosineRouter(Router):
        options = {**Router.options, "sharpness": 10.0}

        def logits(self, x, weight):
            x, keys = F.normalize(x, dim=-1), F.normalize(weight, dim=-1)
            return self.kwargs["sharpness"] * F.linear(x, keys)

and `ReMixConfig(router_type="cosine", router_kwargs={"sharpness": 5.0})` uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn


class Router:
    """Scores and weighs the experts of one layer's pool. A subclass says what differs."""

    name: ClassVar[str] = ""  # under which it was registered
    learned: bool = True  # else a policy
    dense: ClassVar[bool] = False  # rows take all n experts, whatever top_k says
    shared_a: ClassVar[bool] = False  # all experts have one A
    # Experts are whole feed-forward blocks, not linears: learned weights only, which add up to 1.
    whole_blocks: ClassVar[bool] = False
    random: ClassVar[bool] = False  # drawn outside sampling too
    linear: ClassVar[bool] = False  # logits are weight @ x
    # router_kwargs and their defaults.
    options: ClassVar[Mapping[str, Any]] = {
        "load_balancing_coef": 0.0,  # of the load-balancing term, see remix_model.regularize
        "detach_input": False,  # whether the weights' gradient stops at the router
    }

    def __init__(self, num_experts: int, top_k: int, **kwargs: Any) -> None:
        """Take the pool's sizes and the options.

        Args:
            num_experts: n.
            top_k: k.
            kwargs: Of `options`, those that differ from their defaults.

        Raises:
            ValueError: An option is unknown, or out of range.
        """
        unknown = sorted(set(kwargs) - set(self.options))
        if unknown:
            known = f"it has {', '.join(self.options)}" if self.options else "it has no options"
            raise ValueError(
                f"router_kwargs={kwargs}: router_type={self.name!r} knows no {unknown[0]!r}; "
                f"{known}"
            )
        self.num_experts = num_experts
        self.top_k = num_experts if self.dense else top_k
        self.kwargs: dict[str, Any] = {**self.options, **kwargs}
        self.check()

    def check(self) -> None:
        """Raise ValueError for an option that is out of range; a subclass adds its own."""
        coef = self.kwargs.get("load_balancing_coef", 0.0)
        number = isinstance(coef, (int, float)) and not isinstance(coef, bool)
        if not number or not 0 <= coef < math.inf:
            raise ValueError(
                f"router_kwargs: load_balancing_coef={coef!r} must be a number, not negative"
            )
        detach = self.kwargs.get("detach_input", False)
        if not isinstance(detach, bool):
            raise ValueError(f"router_kwargs: detach_input={detach!r} must be True or False")

    def parameter_shape(self, in_features: int) -> tuple[int, ...] | None:
        """Of the router's parameter; None: it has none."""
        return (self.num_experts, in_features)

    def init(self, weight: Tensor, std: float) -> None:
        """Give the parameter its first values, in place: N(0, std^2)."""
        nn.init.normal_(weight, std=std)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Scores of the experts; their softmax is the policy, or what the weights come from.

        Args:
            x: [..., in] fp32.
            weight: The parameter, fp32.

        Returns:
            [..., n].
        """
        return nn.functional.linear(x, weight)

    def weights(self, logits: Tensor, top_k_index: Tensor) -> Tensor:
        """What the chosen experts weigh, where that is learned: softmax over the chosen.

        Args:
            logits: [..., n].
            top_k_index: Integer [..., k].

        Returns:
            [..., k]; multiplied by LoRA's own scaling afterwards.
        """
        return logits.gather(-1, top_k_index.long()).softmax(-1)

    def gradient(
        self, dlogits: Tensor, x: Tensor, weight: Tensor, need_dx: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A policy's gradients, from that of its logits.

        Args:
            dlogits: [rows, n] fp32.
            x: [rows, in] fp32.
            weight: The parameter, fp32.
            need_dx: Whether that of x is wanted.

        Returns:
            Like weight, and like x or None.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_(need_dx)
            weight = weight.detach().requires_grad_()
            wanted = (weight, x) if need_dx else (weight,)
            found = torch.autograd.grad(self.logits(x, weight), wanted, dlogits)
        return found[0], found[1] if need_dx else None


ROUTERS: dict[str, type[Router]] = {}
_R = TypeVar("_R", bound=type[Router])


def register_router(name: str) -> Callable[[_R], _R]:
    """Make a `Router` known under a name for `router_type`. For use as a decorator.

    A process that loads an adapter of that type has to register it first.

    Raises:
        ValueError: The name is taken by another class.
        TypeError: It is no `Router`.
    """

    def register(kind: _R) -> _R:
        if not (isinstance(kind, type) and issubclass(kind, Router)):
            raise TypeError(f"{kind!r} must be a subclass of remix_model.Router")
        before = ROUTERS.get(name)
        if before is not None and before.__qualname__ != kind.__qualname__:
            raise ValueError(f"router_type {name!r} is {before.__qualname__} already: take another")
        kind.name = name
        ROUTERS[name] = kind
        return kind

    return register


def make_router(router_type: Any, num_experts: int, top_k: int, kwargs: Any = None) -> Router:
    """The router of a pool.

    Raises:
        ValueError: The type is unknown, an option is unknown or out of range, or the class says
            what cannot be had together.
    """
    if not isinstance(router_type, str) or router_type not in ROUTERS:
        raise ValueError(
            f"router_type={router_type!r} is unknown; choose one of {', '.join(ROUTERS)}, or "
            "register your own before (remix_model.register_router)"
        )
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f"router_kwargs={kwargs!r} must be a mapping from names")
    router = ROUTERS[router_type](num_experts, top_k, **kwargs)
    if router.whole_blocks and not router.learned:
        raise ValueError(
            f"router_type={router_type!r}: a policy (learned = False) cannot have whole_blocks, "
            "whose experts are mixed by learned weights"
        )
    return router
