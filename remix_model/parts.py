"""In which order, and how many at a time, the M selections of a batch are run.

Without forward-only selections and chunks there is one part: all M in one folded pass. With
`grad_selections=G` the first G keep a graph and the other M - G are run without; with
`selection_chunk_size=C` no part holds more than C. Forward-only selections come first, while no
graph is alive. When the G need several parts, all but the last are backpropagated at once, before
all losses are known: LoRA's gradient does not need the others, and the router's comes

    from eligibilities, as for forward-only selections, where one number credits a whole sequence;
    else from a second run: first all of them without a graph, for their losses, then once more with
    one, a part at a time (a third more time, and the same gradient)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """Selections `first` to `first + count - 1` of every input, in one folded pass."""

    first: int
    count: int
    grad: bool  # its graph is kept for a backward pass
    collect: bool = False  # eligibilities are collected, for its routers' gradient
    rerun: bool = False  # its losses are known from an earlier run
    last: bool = False  # backward on the state's loss goes through this one


FORWARD_AT_ONCE = 8  # forward-only selections for each with a graph


def plan_parts(
    num_selections: int,
    grad_selections: int,
    chunk_size: int | None,
    *,
    exact: bool,
    checkpointed: bool = False,
) -> list[Part]:
    """The parts of one batch, in the order in which they run.

    Args:
        num_selections: M.
        grad_selections: G, from 1 to M.
        chunk_size: C, at least 1; it need not divide: the last part of a kind is smaller. None:
            G with a graph, and eight times as many without, which need less memory: one layer's
            activations and the logits.
        exact: Whether eligibilities give the very gradient that delivery would.
        checkpointed: Whether graphs hold little more than logits: then G without one, too.
    """
    size = chunk_size or grad_selections
    forward = chunk_size or grad_selections * (1 if checkpointed else FORWARD_AT_ONCE)
    whole = [
        (first, min(size, grad_selections - first)) for first in range(0, grad_selections, size)
    ]
    parts = [
        Part(first, min(forward, num_selections - first), grad=False, collect=True)
        for first in range(grad_selections, num_selections, forward)
    ]
    again = len(whole) > 1 and not exact
    if again:
        parts += [Part(first, count, grad=False) for first, count in whole]
    parts += [
        Part(first, count, grad=True, collect=not again, rerun=again) for first, count in whole[:-1]
    ]
    first, count = whole[-1]
    return [*parts, Part(first, count, grad=True, rerun=again, last=True)]
