"""The trainers' arguments: what `sample_routing` takes, and the router's own optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from remix_model.options import SamplingOptions
from remix_model.parallel import check_shares


@dataclass
class ReMixArguments:
    """Fields that ReMixTrainingArguments and ReMixSFTConfig add to their parents.

    Args:
        remix_num_selections: M, the selections sampled for each input; at least 2 to train the
            routers.
        remix_grad_selections: G of them keep a graph for the backward pass; the others run without
            and still train the routers. None: all.
        remix_selection_chunk_size: Selections in memory at once, see `sample_routing`.
        remix_selection_parallel: Neighbouring ranks that share the selections of a batch; divides
            the number of processes, remix_num_selections and remix_grad_selections. The others are
            data parallel. See docs/distributed.md.
        remix_credit: As in `sample_routing`, but "causal" by default: as unbiased as the paper's
            "sequence", with less variance at the same cost (docs/estimators.md).
        remix_log_prob: As in `sample_routing`, but "unordered" by default: as unbiased as the
            paper's "ordered", and never noisier.
        remix_logprob_tokens: As in `sample_routing`.
        remix_router_learning_rate: None: the same as learning_rate.
        remix_router_max_grad_norm: Clips the routers' gradient by itself; None: max_grad_norm, 0:
            no clipping.
        remix_expert_rate_scale: Times learning_rate, the rate of the experts' A and B; n/k makes up
            for tokens that an expert does not see. Ours, not the paper's.
        remix_router_wait: Steps before the routers' first update, in which the experts part. Then
            they begin with a fresh optimizer state, at the schedule's rate. Ours.
        remix_dense_start: Steps over which the experts of a token fall from all n to k, each with
            its share of the same weight (remix_model.dense_start). Ours.
        remix_advantage_norm: As advantage_norm in `sample_routing`. Biased unless "none".
        remix_router_entropy_coef: As in `sample_routing`. Biased unless 0.
        remix_load_balancing_coef: As in `sample_routing`. Biased unless 0.
        remix_temperature: Of the sampled policy at the first step, see `sample_routing`.
        remix_temperature_end: The same at the last step, and linear in between. None:
            remix_temperature throughout.
    """

    remix_num_selections: int = field(default=4, metadata={"help": "Selections sampled per input."})
    remix_grad_selections: int | None = field(
        default=None, metadata={"help": "Selections with a backward pass; default: all."}
    )
    remix_selection_chunk_size: int | None = field(
        default=None, metadata={"help": "Selections in memory at once."}
    )
    remix_selection_parallel: int = field(
        default=1, metadata={"help": "Ranks that share the selections of a batch."}
    )
    remix_credit: str = field(
        default="causal",
        metadata={"help": "Credit of a selection: causal, or the paper's sequence."},
    )
    remix_log_prob: str = field(
        default="unordered",
        metadata={"help": "Probability of a selection: unordered, or the paper's ordered."},
    )
    remix_logprob_tokens: str = field(
        default="all", metadata={"help": "Positions that draw: all or response."}
    )
    remix_router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the routers; default: learning_rate."}
    )
    remix_router_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clips the routers' gradient; default: max_grad_norm."}
    )
    remix_expert_rate_scale: float = field(
        default=1.0, metadata={"help": "Times learning_rate: the rate of the experts."}
    )
    remix_router_wait: int = field(
        default=0, metadata={"help": "Steps before the routers' first update."}
    )
    remix_dense_start: int = field(
        default=0, metadata={"help": "Steps in which a token's experts fall from n to k."}
    )
    remix_advantage_norm: str = field(
        default="none", metadata={"help": "What advantages are divided by: none, input, batch."}
    )
    remix_router_entropy_coef: float = field(
        default=0.0, metadata={"help": "Entropy bonus of the routers; biased unless 0."}
    )
    remix_load_balancing_coef: float = field(
        default=0.0, metadata={"help": "Load balancing of the routers; biased unless 0."}
    )
    remix_temperature: float = field(
        default=1.0, metadata={"help": "Of the sampled policy, at the first step."}
    )
    remix_temperature_end: float | None = field(
        default=None, metadata={"help": "The same at the last step; default: no schedule."}
    )

    def sampling_options(self, progress: float = 0.0) -> SamplingOptions:
        """What `sample_routing` is given; `progress` is the share of the steps that are done."""
        start, end = self.remix_temperature, self.remix_temperature_end
        temperature = start if end is None else start + (end - start) * min(max(progress, 0.0), 1.0)
        return SamplingOptions(
            num_selections=self.remix_num_selections,
            credit=self.remix_credit,
            log_prob=self.remix_log_prob,
            logprob_tokens=self.remix_logprob_tokens,
            grad_selections=self.remix_grad_selections,
            selection_chunk_size=self.remix_selection_chunk_size,
            advantage_norm=self.remix_advantage_norm,
            router_entropy_coef=self.remix_router_entropy_coef,
            load_balancing_coef=self.remix_load_balancing_coef,
            temperature=temperature,
        )

    def check_remix(self) -> None:
        """Raise ValueError for a value that is out of range or unknown."""
        self.sampling_options().check("remix_")
        ranks = self.remix_selection_parallel
        if not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"remix_selection_parallel={ranks!r}; it must be at least 1")
        check_shares(self.remix_num_selections, self.remix_grad_selections, ranks, "remix_")
        end = self.remix_temperature_end
        if end is not None and not (isinstance(end, (int, float)) and 0 < end < float("inf")):
            raise ValueError(f"remix_temperature_end={end!r}; it must be a positive number or None")
        scale = self.remix_expert_rate_scale
        if not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
            raise ValueError(
                f"remix_expert_rate_scale={scale!r}; it must be a number, not negative"
            )
        for name in ("remix_router_wait", "remix_dense_start"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise ValueError(f"{name}={steps!r}; it must be a number of steps, 0 or more")
        for name in ("remix_router_learning_rate", "remix_router_max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}; it must not be negative")


@dataclass
class ReMixTrainingArguments(ReMixArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the fields of `ReMixArguments`."""

    def __post_init__(self) -> None:
        """Validate both parts."""
        self.check_remix()
        super().__post_init__()
