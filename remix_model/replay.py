"""What one layer remembers so that a recomputation repeats the pass that it recomputes.

Activation checkpointing runs a layer's forward pass again inside a backward pass, and what it
chooses has to be what it chose. Sampled passes have their draws in the state, and this says which
state's; for the others, what they had to use is kept here. By the layer's mode, so that evaluating
forgets no training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from remix_model.state import RoutingState


class Replayed:
    """The memory of one `RoutingSite`."""

    name: str
    per_sequence: bool

    def __init__(self) -> None:
        """Nothing ran yet."""
        # Whose draw the last pass used.
        self.last: dict[bool, RoutingState | None] = {True: None, False: None}
        # What the last unsampled pass had to use, and what it read where sequences are routed.
        self.last_forced: dict[bool, Tensor | None] = {True: None, False: None}
        self.last_prompt: dict[bool, Tensor | None] = {True: None, False: None}
        self.replaying: RoutingState | None = None  # whose backward pass is running
        self.replayed = False  # whether this layer was recomputed in it
        self.ambiguous = False  # another state's backward pass began before that
        self.graph_task = -1

    def _prompt(self, state: RoutingState | None) -> Tensor | None:
        raise NotImplementedError

    def note_top_k(self, training: bool) -> None:
        """A plain top-k pass ran: what a recomputation in this mode would repeat."""
        self.replaying = self.last[training] = self.last_forced[training] = None

    def forget(self, state: RoutingState) -> None:
        """`state` has its loss, and with it its backward pass says itself when it runs."""
        for training, last in self.last.items():
            if last is state:
                self.last[training] = None

    def begin_backward(self, state: RoutingState, graph_task: int) -> None:
        """`state`'s backward pass has begun: recomputations in it replay what it drew.

        Several losses may share one backward pass. Recomputation does not say which it is for, so
        a state may follow another only after this layer was recomputed for that one.
        """
        shared = self.replaying not in (None, state) and self.graph_task == graph_task
        if shared and not self.replayed:
            self.ambiguous = True
            return
        self.replaying, self.replayed, self.ambiguous = state, False, False
        self.graph_task = graph_task

    def end_backward(self) -> None:
        """The backward pass is over."""
        self.replaying, self.ambiguous = None, False

    def check_whose(self) -> None:
        """Raise RuntimeError when it cannot be told which pass a recomputation repeats."""
        if self.ambiguous:
            raise RuntimeError(
                f"{self.name} is recomputed by activation checkpointing in a backward pass that "
                "several sample_routing losses share, which does not say whose pass it repeats: "
                "call backward on each loss by itself"
            )

    def _is_of(self, drawn: Tensor, x: Tensor, state: RoutingState | None) -> bool:
        """Whether a saved draw is one of x's rows."""
        if not self.per_sequence:
            return drawn.shape[:-1] == x.shape[:-1]
        prompt = self._prompt(state)
        shape = x.shape[:2] if prompt is None else prompt.shape
        return drawn.shape[0] == shape[0] and x.shape[:-1].numel() == shape.numel()

    def _only(self, saved: list[Tensor]) -> Tensor:
        if len(saved) > 1:
            raise RuntimeError(
                f"{self.name} ran {len(saved)} times in one sample_routing context and is now "
                "recomputed by activation checkpointing, which does not say which time it "
                "repeats: open one context for each forward pass"
            )
        return saved[0]
