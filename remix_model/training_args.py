"""The trainers' arguments: what `sample_routing` takes, and the router's own optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from remix_model.routing import check_sampling


@dataclass
class ReMixArguments:
    """Fields that ReMixTrainingArguments and ReMixSFTConfig add to their parents.

    Args:
        remix_num_selections: M, the selections sampled for each input; at least 2 to train the
            routers.
        remix_grad_selections: Forward-only selections; not available in this version, leave None.
        remix_selection_chunk_size: Chunked selections; not available in this version, leave None.
        remix_credit: As in `sample_routing`.
        remix_log_prob: As in `sample_routing`.
        remix_logprob_tokens: As in `sample_routing`.
        remix_router_learning_rate: None: the same as learning_rate.
        remix_router_max_grad_norm: Clips the routers' gradient by itself; None: max_grad_norm, 0:
            no clipping.
        remix_advantage_norm: "none"; other normalisations are not available in this version.
        remix_router_entropy_coef: 0.0; an entropy bonus is not available in this version.
    """

    remix_num_selections: int = field(default=4, metadata={"help": "Selections sampled per input."})
    remix_grad_selections: int | None = field(
        default=None, metadata={"help": "Not available in this version."}
    )
    remix_selection_chunk_size: int | None = field(
        default=None, metadata={"help": "Not available in this version."}
    )
    remix_credit: str = field(default="sequence", metadata={"help": "Credit of a selection."})
    remix_log_prob: str = field(default="ordered", metadata={"help": "Probability of a selection."})
    remix_logprob_tokens: str = field(
        default="all", metadata={"help": "Positions that draw: all or response."}
    )
    remix_router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the routers; default: learning_rate."}
    )
    remix_router_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clips the routers' gradient; default: max_grad_norm."}
    )
    remix_advantage_norm: str = field(
        default="none", metadata={"help": "Only none in this version."}
    )
    remix_router_entropy_coef: float = field(
        default=0.0, metadata={"help": "Only 0 in this version."}
    )

    def check_remix(self) -> None:
        """Raise ValueError for a value that is out of range, unknown or not available."""
        check_sampling(
            self.remix_num_selections,
            self.remix_credit,
            self.remix_log_prob,
            self.remix_logprob_tokens,
            prefix="remix_",
        )
        for name, known in (
            ("remix_advantage_norm", ("none",)),
            ("remix_router_entropy_coef", (0.0,)),
            ("remix_grad_selections", (None, self.remix_num_selections)),
            ("remix_selection_chunk_size", (None, self.remix_num_selections)),
        ):
            value = getattr(self, name)
            if value not in known:
                choices = ", ".join(str(choice) for choice in known)
                raise ValueError(f"{name}={value!r} is not available; choose one of {choices}")
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
