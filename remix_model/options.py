"""What `sample_routing` takes, checked in one place for it and for the trainers' arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from remix_model.credit import ADVANTAGE_NORMS, CREDITS
from remix_model.eligibility import CAUSAL_BLOCKS
from remix_model.parts import Part, plan_parts

LOGPROB_TOKENS = ("all", "response")
LOG_PROBS = ("ordered", "unordered")


@dataclass(frozen=True)
class SamplingOptions:
    """The arguments of `sample_routing`, which documents them."""

    num_selections: int = 4
    credit: str = "sequence"
    log_prob: str = "ordered"
    logprob_tokens: str = "all"
    grad_selections: int | None = None
    selection_chunk_size: int | None = None
    advantage_norm: str = "none"
    router_entropy_coef: float = 0.0
    load_balancing_coef: float = 0.0
    temperature: float = 1.0

    @property
    def credit_blocks(self) -> int:
        """Blocks of positions that forward-only selections answer for."""
        return 1 if self.credit == "sequence" else CAUSAL_BLOCKS

    def plan(self, *, detached: bool, checkpointed: bool, ranks: int = 1) -> list[Part]:
        """The parts in which the selections of one rank run, counted from 0.

        Args:
            detached: Whether all routers' gradients stop at the router.
            checkpointed: Whether activations are recomputed.
            ranks: That share the selections.
        """
        return plan_parts(
            self.num_selections // ranks,
            (self.grad_selections or self.num_selections) // ranks,
            self.selection_chunk_size,
            exact=self.credit == "sequence" and detached,
            checkpointed=checkpointed,
        )

    def check(self, prefix: str = "") -> None:
        """Raise ValueError for a value that is out of range or unknown.

        Args:
            prefix: Goes before the names, "remix_" in the trainers' arguments.
        """
        m, grad = self.num_selections, self.grad_selections
        if not _whole(m) or m < 1:
            raise ValueError(
                f"{prefix}num_selections={m!r}; it must be a whole number, at least 1 (2 to train "
                "a router)"
            )
        if grad is not None and (not _whole(grad) or not 1 <= grad <= m):
            raise ValueError(
                f"{prefix}grad_selections={grad!r} is out of range: choose 1 <= "
                f"{prefix}grad_selections <= {prefix}num_selections = {m}, or None for all"
            )
        size = self.selection_chunk_size
        if size is not None and (not _whole(size) or size < 1):
            raise ValueError(
                f"{prefix}selection_chunk_size={size!r}; it must be a whole number, at least 1, or "
                "None. It need not divide the selections: the last chunk is smaller"
            )
        for name, value, known in (
            ("credit", self.credit, tuple(CREDITS)),
            ("log_prob", self.log_prob, LOG_PROBS),
            ("logprob_tokens", self.logprob_tokens, LOGPROB_TOKENS),
            ("advantage_norm", self.advantage_norm, ADVANTAGE_NORMS),
        ):
            if value not in known:
                raise ValueError(
                    f"{prefix}{name}={value!r} is unknown; choose one of {', '.join(known)}"
                )
        for name in ("router_entropy_coef", "load_balancing_coef", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{prefix}{name}={value!r}; it must be a number, not negative")
        if self.temperature == 0:
            raise ValueError(
                f"{prefix}temperature=0 samples nothing: it must be positive (top k is what runs "
                "outside sampling)"
            )


OPTION_NAMES = tuple(field.name for field in fields(SamplingOptions))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
