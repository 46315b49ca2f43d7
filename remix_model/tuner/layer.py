"""`ReMixLayer`: one adapted linear inside a PEFT model.

All experts of an adapter are stacked: `remix_lora_A[adapter] [n, r, in]`, `remix_lora_B[adapter]
[n, out, r]` and `remix_router[adapter]`, [n, in] for most types. Stacked parameters give experts
that were not chosen a zero gradient rather than none (so DDP needs no search for unused
parameters), and leave nothing that PEFT's FSDP policy would shard apart from the layer that reads
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from remix_kernels import RoutedShape
from remix_model.block_experts import in_block
from remix_model.decode import is_plain
from remix_model.granularity import SequencePass, only_groups
from remix_model.layer import (
    Pool,
    empty_b,
    init_pool,
    make_parameter,
    make_site,
    routing_scaling,
)
from remix_model.routers import make_router
from remix_model.sharing import FollowingSite, SharedSelection
from remix_model.site import RoutedModule, RoutingSite
from remix_model.tuner.config import ReMixConfig, ReMixRuntimeConfig
from remix_model.tuner.loading import check_stored

CANNOT_MERGE = (
    "a ReMix adapter cannot be merged: which LoRAs apply depends on each token, so no single "
    "weight equals base plus adapter. Keep the adapter separate, or unload() it without merging."
)
CANNOT_ADD = (
    "ReMix adapters cannot be added up: the experts of one mean nothing to the router of another. "
    "Keep both (set_adapter, or adapter_names= for each row of a batch), or train one on both data "
    "sets."
)


class ReMixLayer(nn.Module, BaseTunerLayer, RoutedModule):
    """A linear with one or several named pools of LoRAs beside it."""

    adapter_layer_names = ("remix_lora_A", "remix_lora_B", "remix_router")
    other_param_names = (
        "r", "num_experts", "top_k", "scaling", "remix_dropout", "sites", "runtime",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ReMixConfig) -> None:
        """Wrap base_layer and give it its first adapter."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.remix_lora_A = nn.ParameterDict()
        self.remix_lora_B = nn.ParameterDict()
        self.remix_router = nn.ParameterDict()
        self.remix_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.top_k: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.sites: dict[str, RoutingSite | FollowingSite] = {}
        self.sequence_pass: SequencePass | None = None
        self.runtime: dict[str, ReMixRuntimeConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: ReMixConfig) -> None:
        """Add the adapter `adapter_name`, or replace it."""
        n, r = config.num_experts, config.r
        router = make_router(config.router_type, n, config.top_k, config.router_kwargs)
        shared = 1 if router.shared_a else n
        check_stored(config, (shared, r, self.in_features), (n, self.out_features, r))
        weight_shape = router.parameter_shape(self.in_features)
        if weight_shape is not None:
            known: tuple[int | None, ...] = tuple(weight_shape)
            if config.router_sharing == "block":
                # Those that follow another linear's router, of another width perhaps, lose theirs
                # at once, and it is in no file.
                others = router.parameter_shape(2 * self.in_features) or ()
                pairs = zip(weight_shape, others, strict=True)
                known = tuple(size if size == other else None for size, other in pairs)
            check_stored(config, known)
        self.r[adapter_name], self.num_experts[adapter_name] = r, n
        self.top_k[adapter_name] = router.top_k
        self.scaling[adapter_name] = routing_scaling(
            router, config.lora_alpha, r, config.use_rslora
        )
        self.runtime[adapter_name] = config.runtime_config  # type: ignore[assignment]
        self.remix_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.sites[adapter_name] = make_site(
            router,
            config.router_temperature,
            detached=config.router_detach_input,
            per_sequence=config.routing_granularity == "sequence",
        )
        lora_a = nn.Parameter(torch.empty(shared, r, self.in_features))
        lora_b = nn.Parameter(empty_b(n, self.out_features, r))
        init_pool(lora_a, lora_b, zero_b=config.init_lora_weights)
        self.remix_lora_A[adapter_name], self.remix_lora_B[adapter_name] = lora_a, lora_b
        weight = make_parameter(router, self.in_features, config.router_init_range)
        if adapter_name in self.remix_router:  # of the adapter that is replaced
            del self.remix_router[adapter_name]
        if weight is not None:
            self.remix_router[adapter_name] = weight
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active_sites(self) -> dict[str, tuple[RoutingSite, Tensor | None]]:
        """Site and router of every active adapter that chooses here."""
        return {
            name: (site, self.remix_router.get(name))
            for name in self.active_adapters
            if isinstance(site := self.sites.get(name), RoutingSite)
        }

    def follow(self, adapter_name: str, name: str, leader: ReMixLayer, leader_name: str) -> None:
        """Have `leader`, of the same block, choose this layer's experts too: without a router.

        Args:
            adapter_name: Of which adapter.
            name: This layer's.
            leader: The block's first layer.
            leader_name: Its name.
        """
        site = leader.sites[adapter_name]
        assert isinstance(site, RoutingSite)
        if site.shared is None:
            site.shared = SharedSelection(leader_name)
        self.sites[adapter_name] = FollowingSite(site.router, name, site.shared)
        if adapter_name in self.remix_router:
            del self.remix_router[adapter_name]

    def routed_shapes(self) -> list[RoutedShape]:
        """Of every active adapter; x in the frozen weight's dtype, a quantised one's in ours."""
        weight: Any = self.get_base_layer().weight
        names = [name for name in self.active_adapters if name in self.sites]
        base: Any = self._modules["base_layer"]
        plain = len(names) == 1 and is_plain(base)
        shapes: list[RoutedShape] = []
        for name in names:
            pool = self._pool(name)
            dtype = weight.dtype if weight.is_floating_point() else pool.lora_A.dtype
            shapes += pool.shapes(dtype, plain, self.remix_dropout[name])
        return shapes

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see CANNOT_MERGE."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refuse: nothing was merged."""
        raise ValueError(CANNOT_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether one LoRA could replace the adapter: no, its delta depends on the token."""
        return False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        rows = kwargs.pop("adapter_names", None)
        if rows is not None and not self._disable_adapters:
            return self._mixed(x, rows, *args, **kwargs)
        names = [] if self._disable_adapters else self.active_adapters
        names = [name for name in names if name in self.sites]
        base: Any = self._modules["base_layer"]
        if any(self.sites[name].whole_blocks for name in names):
            return self._in_block(x, names, *args, **kwargs)
        if len(names) == 1 and not args and not kwargs and is_plain(base):
            dropout: Any = self.remix_dropout[names[0]] if self.training else None
            if dropout is None or dropout.p == 0.0:
                return self._pool(names[0]).linear(x, base, self.training)
        y = base(x, *args, **kwargs)
        with self._brought_in():
            for name in names:
                y = self._pool(name).add(x, y, self.remix_dropout[name], self.training)
        return y

    def _in_block(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """As forward, where experts are whole blocks: the rows are k-fold inside of one."""
        if len(names) > 1:
            raise ValueError(
                f"adapters {', '.join(names)} are active together, and one of them mixes whole "
                "feed-forward blocks, which leaves no room for another: use set_adapter"
            )
        with self._brought_in():
            dropout: Any = self.remix_dropout[names[0]]
            base: Any = self.base_layer
            return in_block(
                self._pool(names[0]),
                partial(base, *args, **kwargs),
                x,
                dropout if self.training and dropout.p > 0.0 else None,
                base if not args and not kwargs and is_plain(base) else None,
                self.training,
            )

    def _mixed(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """As forward; x is len(names) groups of equally many rows, group i for adapter names[i]."""
        base: Any = self.base_layer
        whole = next((n for n in names if n in self.sites and self.sites[n].whole_blocks), None)
        if whole is not None:
            raise ValueError(
                f"adapter_names names {whole!r}, which mixes whole feed-forward blocks: its rows "
                "cannot share a batch with other adapters'"
            )
        y = base(x, *args, **kwargs)
        if len(x) % len(names):
            raise ValueError(wrong_length(names, len(x)))
        x, y = x.unflatten(0, (len(names), -1)), y.unflatten(0, (len(names), -1))
        with self._brought_in():
            for name in (name for name in dict.fromkeys(names) if name in self.sites):
                groups = [i for i, other in enumerate(names) if other == name]
                with only_groups(self.sequence_pass, groups, len(names)):
                    chosen = self._pool(name).add(
                        x[groups].flatten(0, 1),
                        y[groups].flatten(0, 1),
                        self.remix_dropout[name],
                        self.training,
                    )
                y[groups] = chosen.unflatten(0, (len(groups), -1))
        return y.flatten(0, 1)

    @contextmanager
    def _brought_in(self) -> Iterator[None]:
        """Where accelerate offloads: the adapter's weights, for a while.

        Its hooks bring a module's weights in around the module's forward; a ParameterDict has none.
        """
        parts = (self.remix_lora_A, self.remix_lora_B, self.remix_router)
        hooked: list[Any] = [part for part in parts if "_hf_hook" in part.__dict__]
        for part in hooked:
            part._hf_hook.pre_forward(part)
        try:
            yield
        finally:
            for part in hooked:
                part._hf_hook.post_forward(part, None)

    def _pool(self, name: str) -> Pool:
        # Straight from the dictionaries: attribute look-ups of modules are what decoding waits for.
        modules: Any = self._modules
        return Pool(
            self.sites[name],
            modules["remix_lora_A"]._parameters[name],
            modules["remix_lora_B"]._parameters[name],
            modules["remix_router"]._parameters.get(name),
            self.scaling[name],
            self.runtime[name].backend,
            self.runtime[name].strategy,
        )

    def __repr__(self) -> str:
        """As PEFT's layers print."""
        return "remix." + super().__repr__()


def wrong_length(names: Sequence[str], rows: int) -> str:
    """What is said when adapter_names do not fit the rows."""
    return (
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} and {rows} respectively."
    )


def linear_features(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a linear, quantised or GPT-2's Conv1D included.

    Raises:
        ValueError: The module is not a linear.
    """
    if isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    ):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.nf)
    raise ValueError(
        f"target module {type(module).__name__} is not a linear; ReMix adapts linears only: name "
        "linears in target_modules, or others in exclude_modules"
    )
