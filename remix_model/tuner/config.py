"""`ReMixConfig`: everything that is saved with an adapter, validated when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from remix_kernels import BACKENDS, STRATEGIES
from remix_model.layer import GRANULARITIES, check_pool
from remix_model.routers import make_router
from remix_model.tuner.fields import check_fields

PEFT_TYPE = "REMIX"
SHARINGS = ("module", "block")
BIASES = ("none", "all", "remix_only")


@dataclass
class ReMixRuntimeConfig:
    """How to compute, not what: never saved with the adapter.

    Args:
        backend: As in `remix_kernels.routed_linear`.
        strategy: As in `remix_kernels.routed_linear`.
    """

    backend: str = "auto"
    strategy: str = "auto"

    def __post_init__(self) -> None:
        """Reject unknown names."""
        for name, value, known in (
            ("backend", self.backend, BACKENDS),
            ("strategy", self.strategy, STRATEGIES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")


@dataclass
class ReMixConfig(PeftConfig):
    """Configuration of a ReMix adapter.

    Args:
        r: Rank of each LoRA.
        rank_pattern: Other ranks for some linears: {name or regular expression: rank}. The routing
            weight follows the rank.
        num_experts: n, LoRAs in each layer's pool.
        top_k: k, LoRAs active for each token; n where the router type mixes all ("hydralora").
        lora_alpha: Numerator of the constant routing weight omega; where weights are learned, of
            LoRA's own scaling, which they are shares of.
        use_rslora: omega = lora_alpha / sqrt(k r); False: lora_alpha / (k r).
        lora_dropout: Dropout on the adapters' input. 0 is best: its noise is not the selection's.
        target_modules: Names or a regular expression of the linears to adapt; None: the
            feed-forward block's.
        exclude_modules: Names or a regular expression of linears to leave alone.
        layers_to_transform: Indices of the layers to adapt; None: all.
        layers_pattern: Name of the list of layers, when it is not a common one.
        modules_to_save: Other modules to train and save in full.
        trainable_token_indices: Token embeddings to train, as in PEFT's LoRA.
        bias: "none", "all" or "remix_only": which biases are trained.
        init_lora_weights: True starts B at zero; False starts it random, for tests.
        routing_granularity: "token", or "sequence": experts are chosen once for a sequence, from
            the mean of its prompt's hidden states, and kept while decoding.
        router_sharing: "module": one router a linear. "block": one for the linears of a block (of
            one parent module), which reads the first one's input.
        router_type: How experts are chosen and weighed: "remix", "uniform", "mixlora",
            "mixlora_block", "hydralora", "mor", or one of your own (`remix_model.routers`).
        router_kwargs: Options of the router type; "remix" has none.
        router_init_range: Standard deviation of the router's initial weights.
        router_temperature: Divides the logits.
        router_detach_input: A policy's gradient stops at the router (learned weights have
            router_kwargs={"detach_input": ...}, by default False).
        runtime_config: Backend and strategy; never saved.

    Raises:
        ValueError: A value is out of range or unknown.

    Source: ReMix (arXiv 2603.10160); defaults as in its rsLoRA type (Table 3).
    """

    r: int = field(default=8, metadata={"help": "Rank of each LoRA."})
    num_experts: int = field(default=8, metadata={"help": "LoRAs in each layer's pool."})
    top_k: int = field(default=4, metadata={"help": "LoRAs active for each token."})
    lora_alpha: float = field(default=2.0, metadata={"help": "Numerator of the routing weight."})
    use_rslora: bool = field(default=True, metadata={"help": "alpha/sqrt(k r), not alpha/(k r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears to adapt; default: the feed-forward block's."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layers to adapt; default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks, by name of the linear."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save in full."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all, remix_only."})
    init_lora_weights: bool = field(default=True, metadata={"help": "Start B at zero."})
    routing_granularity: str = field(
        default="token", metadata={"help": "Routed per token or sequence."}
    )
    router_sharing: str = field(
        default="module", metadata={"help": "One router a linear, or a block."}
    )
    router_type: str = field(default="remix", metadata={"help": "How experts are chosen."})
    router_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the router type."}
    )
    router_init_range: float = field(default=0.02, metadata={"help": "Router's initial std."})
    router_temperature: float = field(default=1.0, metadata={"help": "Divides the logits."})
    router_detach_input: bool = field(
        default=True, metadata={"help": "The router's gradient stops at the router."}
    )
    runtime_config: ReMixRuntimeConfig | dict[str, Any] = field(
        default_factory=ReMixRuntimeConfig, metadata={"help": "Backend and strategy; not saved."}
    )

    def __post_init__(self) -> None:
        """Validate, and normalise what JSON cannot hold."""
        super().__post_init__()
        from peft.utils.peft_types import PeftType

        self.peft_type = PeftType[PEFT_TYPE]
        for name in ("target_modules", "exclude_modules"):
            _check_names(name, getattr(self, name))
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.runtime_config, dict):
            self.runtime_config = ReMixRuntimeConfig(**self.runtime_config)
        scale = {
            "lora_alpha": self.lora_alpha,
            "router_temperature": self.router_temperature,
            "router_init_range": self.router_init_range,
        }
        flags = {
            "use_rslora": self.use_rslora,
            "router_detach_input": self.router_detach_input,
            "init_lora_weights": self.init_lora_weights,
        }
        check_pool(
            self.num_experts,
            self.top_k,
            self.r,
            scale=scale,
            lora_dropout=self.lora_dropout,
            flags=flags,
        )
        check_fields(self)
        _check_ranks(self.rank_pattern)
        for name, known in (
            ("routing_granularity", GRANULARITIES),
            ("router_sharing", SHARINGS),
            ("bias", BIASES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
        router = make_router(self.router_type, self.num_experts, self.top_k, self.router_kwargs)
        self.top_k = router.top_k
        if router.whole_blocks:
            self.router_sharing = "block"
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform to say which "
                "layers"
            )

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it: without runtime_config."""
        saved: dict[str, Any] = super().to_dict()
        saved.pop("runtime_config", None)
        return saved


def _check_ranks(pattern: Any) -> None:
    """Raise ValueError unless pattern is ranks by names or regular expressions."""
    if not isinstance(pattern, dict):
        raise ValueError(f"rank_pattern={pattern!r} must be a dict of ranks by names of linears")
    for name, rank in pattern.items():
        _check_names("rank_pattern", name)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank_pattern[{name!r}]={rank!r}; a rank must be an integer above 0")


def _check_names(option: str, value: Any) -> None:
    """Raise ValueError unless value is None, names, or a regular expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{option}={value!r} is not a regular expression: {error}; give a list of names"
            ) from None
    elif value is not None and not (
        isinstance(value, (set, list, tuple)) and all(isinstance(item, str) for item in value)
    ):
        raise ValueError(f"{option}={value!r} must be a list of names or a regular expression")
