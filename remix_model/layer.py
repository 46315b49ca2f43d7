"""`RoutedLoRALinear`: a frozen linear with a pool of LoRAs and a router, as one plain nn.Module."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remix_kernels import RoutedShape, routed_linear, routed_lora
from remix_model.decode import decode_row, is_plain
from remix_model.learned import LearnedSite
from remix_model.routers import Router, make_router
from remix_model.sharing import FollowingSite
from remix_model.site import RoutedModule, RoutingSite, Selection

GRANULARITIES = ("token", "sequence")


def routing_scaling(router: Router, lora_alpha: float, r: int, use_rslora: bool) -> float:
    """What weights are multiplied by: omega, or LoRA's own where they are learned.

    Omega is that of one LoRA of rank k r, alpha / sqrt(k r) or alpha / (k r) (section 3.1); LoRA's
    own is alpha / sqrt(r) or alpha / r, and learned weights are shares of it.
    """
    rank = r if router.learned else router.top_k * r
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


def make_site(
    router: Router, temperature: float, *, detached: bool, per_sequence: bool
) -> RoutingSite:
    """The site that a type of router needs."""
    kind = LearnedSite if router.learned else RoutingSite
    return kind(router, temperature, detached=detached, per_sequence=per_sequence)


def check_pool(
    num_experts: int,
    top_k: int,
    r: int,
    *,
    scale: Mapping[str, Any],
    lora_dropout: Any,
    flags: Mapping[str, Any],
) -> None:
    """Raise ValueError unless these describe a pool of adapters.

    Args:
        num_experts: n.
        top_k: k.
        r: Rank.
        scale: lora_alpha, router_temperature and router_init_range.
        lora_dropout: In [0, 1).
        flags: use_rslora, router_detach_input and init_lora_weights.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")
    for name, value in (("num_experts", num_experts), ("top_k", top_k), ("r", r)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be an integer")
    for name, value in (*scale.items(), ("lora_dropout", lora_dropout)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name}={value!r} must be a finite number")
        if name in ("lora_alpha", "router_temperature") and value <= 0:
            raise ValueError(f"{name}={value}; it must be positive")
        if value < 0:
            raise ValueError(f"{name}={value}; it must not be negative")
    if lora_dropout >= 1:
        raise ValueError(f"lora_dropout={lora_dropout}; it must be in [0, 1)")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}; it must be at least 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k={top_k} is out of range: choose 1 <= top_k <= num_experts = {num_experts}"
        )
    if r < 1:
        raise ValueError(f"r={r}; the rank of each LoRA must be at least 1")


def empty_b(num_experts: int, out_features: int, r: int, **like: Any) -> Tensor:
    """[n, out, r], laid out as [n, r, out]: so the dense strategy packs it without a copy."""
    return torch.empty(num_experts, r, out_features, **like).transpose(1, 2)


@torch.no_grad()
def init_pool(lora_A: Tensor, lora_B: Tensor, zero_b: bool = True) -> None:
    """A uniform as Kaiming (a = sqrt 5) per expert, B zero.

    Args:
        lora_A: [n, r, in].
        lora_B: [n, out, r].
        zero_b: False gives B the Kaiming bounds of its own fan-in: an adapter that is not a no-op.
    """
    bound = 1.0 / math.sqrt(lora_A.shape[-1])
    nn.init.uniform_(lora_A, -bound, bound)
    if zero_b:
        nn.init.zeros_(lora_B)
    else:
        bound = 1.0 / math.sqrt(lora_B.shape[-1])
        nn.init.uniform_(lora_B, -bound, bound)


def make_parameter(
    router: Router, in_features: int, init_range: float, **like: Any
) -> nn.Parameter | None:
    """A router's parameter with its first values; None where its type has none."""
    shape = router.parameter_shape(in_features)
    if shape is None:
        return None
    weight = nn.Parameter(torch.empty(shape, **like))
    with torch.no_grad():
        router.init(weight, init_range)
    return weight


class Pool(NamedTuple):
    """One pool of LoRAs with its router and site: what a routed layer runs."""

    site: Any  # RoutingSite or FollowingSite
    lora_A: Tensor  # [n, r, in], or [1, r, in] for all experts
    lora_B: Tensor  # [n, out, r]
    router: Any  # the router's parameter; None where it has none, or another linear's chooses
    scaling: float
    backend: str
    strategy: str

    def linear(self, x: Tensor, base: nn.Linear, training: bool) -> Tensor:
        """base(x) plus the chosen adapters, in one op. x [..., in] -> [..., out]."""
        compiling = torch.compiler.is_compiling()
        if not compiling and x.numel() == self.lora_A.shape[2] and not torch.is_grad_enabled():
            y = decode_row(x, base, self, training)
            if y is not None:
                return y
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        selection = self.site.select(x, self.router, training)
        y = routed_linear(
            x,
            base.weight,
            base.bias,
            self.lora_A,
            self.lora_B,
            selection.index,
            self.weights(selection),
            backend=self.backend,
            strategy=self.strategy,
            check=False,
        )
        return self.site.deliver(y, self.router, selection, training)

    def weights(self, selection: Selection) -> Tensor | float:
        """What the chosen experts are multiplied by: [..., k], or the same for all.

        More than k of them (remix_model.dense_start) share what k would have.
        """
        if selection.weights is not None:
            return selection.weights * self.scaling
        return self.scaling * (self.site.router.top_k / selection.index.shape[-1])

    def shapes(self, dtype: torch.dtype, plain: bool, dropout: nn.Module) -> list[RoutedShape]:
        """What the kernels are compiled for.

        Args:
            dtype: Of x.
            plain: Whether one op runs the frozen linear too.
            dropout: On the adapters' input, in training: then two ops run.

        Returns:
            One or two; none of the last linear of experts that are whole blocks.
        """
        n, out_features, r = self.lora_B.shape
        blocks = self.site.whole_blocks  # whose chosen experts are selections, unweighted
        if blocks and isinstance(self.site, FollowingSite) and self.site.is_last_of_block():
            return []
        shape = RoutedShape(
            self.lora_A.shape[2],
            out_features,
            n,
            1 if blocks else self.site.top_k,
            r,
            dtype,
            self.lora_A.dtype,
            self.backend,
            self.strategy,
            self.lora_A.device,
            weighted=self.site.router.learned and not blocks,
            selections=self.site.top_k if blocks else 1,
        )
        dropped = isinstance(dropout, nn.Dropout) and dropout.p > 0.0
        kinds = {not plain, dropped or not plain}
        return [shape._replace(alone=alone) for alone in sorted(kinds)]

    def add(self, x: Tensor, base: Tensor, dropout: nn.Module, training: bool) -> Tensor:
        """The chosen adapters of x [..., in], after dropout, added to base [..., out]."""
        selection = self.site.select(x, self.router, training)
        y = routed_lora(
            dropout(x).to(base.dtype),
            self.lora_A,
            self.lora_B,
            selection.index,
            self.weights(selection),
            base=base,
            backend=self.backend,
            strategy=self.strategy,
            check=False,
        )
        return self.site.deliver(y, self.router, selection, training)


class RoutedLoRALinear(nn.Module, RoutedModule):
    """y = W x + b + omega * sum over the k chosen experts of B_i A_i x.

    Outside `sample_routing` the experts are the k largest of `router @ x`; inside they are drawn,
    and the loss's backward pass gives the router its gradient.

    Source: ReMix (arXiv 2603.10160) sections 3.1 to 3.3.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        num_experts: int,
        top_k: int,
        r: int,
        lora_alpha: float = 2.0,
        use_rslora: bool = True,
        lora_dropout: float = 0.0,
        router_init_range: float = 0.02,
        router_temperature: float = 1.0,
        router_detach_input: bool = True,
        routing_granularity: str = "token",
        init_lora_weights: bool = True,
        router_type: str = "remix",
        router_kwargs: Mapping[str, Any] | None = None,
        backend: str = "auto",
        strategy: str = "auto",
    ) -> None:
        """Put a pool of adapters beside `base`, which is frozen in place.

        Args:
            base: The linear to adapt; kept as `self.base_layer`.
            num_experts: n, LoRAs in the pool.
            top_k: k, LoRAs a row takes.
            r: Rank of each LoRA.
            lora_alpha: Numerator of omega.
            use_rslora: omega = alpha / sqrt(k r) rather than alpha / (k r).
            lora_dropout: On the adapters' input; its noise is not the selection's, so 0 is best.
            router_init_range: Standard deviation of the router's initial weights.
            router_temperature: Divides the logits.
            router_detach_input: The router's gradient stops at the router.
            routing_granularity: "token", or "sequence": one decision for each x[b] of x [B, T, in],
                from the mean of its rows (while sampling, of its prompt's: see
                `RoutingState.expand`).
            init_lora_weights: B starts at zero; False starts it random, for tests.
            router_type: How experts are chosen and weighed, see `remix_model.routers`.
            router_kwargs: Options of the router type.
            backend: As in `remix_kernels.routed_linear`.
            strategy: As in `remix_kernels.routed_linear`.

        Raises:
            ValueError: A size is out of range, or a name unknown.
            TypeError: base is not a linear.
        """
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
        scale = {
            "lora_alpha": lora_alpha,
            "router_temperature": router_temperature,
            "router_init_range": router_init_range,
        }
        flags = {
            "use_rslora": use_rslora,
            "router_detach_input": router_detach_input,
            "init_lora_weights": init_lora_weights,
        }
        check_pool(num_experts, top_k, r, scale=scale, lora_dropout=lora_dropout, flags=flags)
        router = make_router(router_type, num_experts, top_k, router_kwargs)
        if router.whole_blocks:
            raise ValueError(
                f"router_type={router_type!r} mixes whole feed-forward blocks, and this is one "
                "linear: use get_peft_model(model, ReMixConfig(...)), or 'mixlora'"
            )
        self.base_layer = base.requires_grad_(False)
        self.num_experts, self.top_k, self.r = num_experts, router.top_k, r
        self.scaling = routing_scaling(router, lora_alpha, r, use_rslora)
        self.dropout = nn.Dropout(lora_dropout)
        self.router_detach_input = router_detach_input
        self.backend, self.strategy = backend, strategy
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        shared = 1 if router.shared_a else num_experts
        self.lora_A = nn.Parameter(torch.empty(shared, r, base.in_features, **like))
        self.lora_B = nn.Parameter(empty_b(num_experts, base.out_features, r, **like))
        self.router = make_parameter(router, base.in_features, router_init_range, **like)
        if routing_granularity not in GRANULARITIES:
            raise ValueError(
                f"routing_granularity={routing_granularity!r} is unknown; choose one of "
                f"{', '.join(GRANULARITIES)}"
            )
        self.site = make_site(
            router,
            router_temperature,
            detached=router_detach_input,
            per_sequence=routing_granularity == "sequence",
        )
        init_pool(self.lora_A, self.lora_B, init_lora_weights)

    def active_sites(self) -> dict[str, tuple[RoutingSite, Tensor | None]]:
        """One site, one router."""
        return {"default": (self.site, self.router)}

    def routed_shapes(self) -> list[RoutedShape]:
        """One pool's."""
        base = self.base_layer
        return self._pool().shapes(base.weight.dtype, is_plain(base), self.dropout)

    def _pool(self) -> Pool:
        return Pool(
            self.site,
            self.lora_A,
            self.lora_B,
            self.router,
            self.scaling,
            self.backend,
            self.strategy,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        pool = self._pool()
        if is_plain(self.base_layer) and not (self.training and self.dropout.p > 0.0):
            return pool.linear(x, self.base_layer, self.training)
        return pool.add(x, self.base_layer(x), self.dropout, self.training)
