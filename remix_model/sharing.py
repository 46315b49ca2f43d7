"""One router for all linears of a block: the first chooses, the others follow.

`router_sharing="block"`: the first linear of a feed-forward block (in the model's order) has the
router and a `RoutingSite`; the others have a `FollowingSite`, which takes the selection that the
first has just made. Its log-probability is counted once, where it was drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from remix_model.delivery import in_backward

if TYPE_CHECKING:
    from remix_model.routers import Router
    from remix_model.site import Selection


class SharedSelection:
    """What passes from the first linear of a block to the others, once in every pass."""

    def __init__(self, leader: str) -> None:
        """`leader` is the first linear's name, for errors."""
        self.leader = leader
        self.followers: list[str] = []
        self._selection: Selection | None = None
        self._waiting: set[str] = set()

    def __deepcopy__(self, memo: dict[int, object]) -> SharedSelection:
        """One for the copied block, with nothing in it."""
        copied = SharedSelection(self.leader)
        copied.followers = list(self.followers)
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict[str, object]:
        """Pickled likewise."""
        return {**self.__dict__, "_selection": None, "_waiting": set()}

    def put(self, selection: Selection) -> None:
        """The first linear has chosen."""
        self._selection = selection if self.followers else None
        self._waiting = set(self.followers)

    def take(
        self, name: str, rows: tuple[int, ...], folds: int = 1, whole_blocks: bool = False
    ) -> Selection:
        """What it chose, for one of the others; the last to take it lets go of it.

        Args:
            name: Of the linear that asks.
            rows: Of its input, [B, T].
            folds: How often the first linear's B sequences are in B.
            whole_blocks: Whether experts are whole blocks, for errors.

        Raises:
            RuntimeError: It has not run in this pass.
            ValueError: It had other rows.
        """
        if self._selection is None or name not in self._waiting:
            if in_backward():
                raise RuntimeError(
                    f"{name} is recomputed in the backward pass without {self.leader}, whose "
                    "router it follows: checkpoint the whole block, not one of its linears"
                )
            raise RuntimeError(
                f"{name} follows the router of {self.leader}, which has not run before it in this "
                "pass: leave one of the two out of target_modules (attention runs in another order "
                "than it is registered in some models), or use router_sharing='module'"
            )
        selection = self._selection
        had = tuple(selection.index.shape[:-1])
        if rows != (had if folds == 1 else (had[0] * folds, *had[1:])):
            fix = "use router_sharing='module'"
            if whole_blocks:
                fix = (
                    "experts are whole feed-forward blocks, whose linears must be registered in "
                    "the order in which they run: leave other linears out"
                )
            raise ValueError(
                f"{name} got {list(rows)} rows and follows the router of {self.leader}, which had "
                f"{list(had)}{f' ({folds} of each here)' if folds > 1 else ''}: {fix}"
            )
        self._waiting.discard(name)
        if not self._waiting:
            self._selection = None
        return selection


class FollowingSite:
    """Stands where a linear has no router of its own."""

    def __init__(self, router: Router, name: str, shared: SharedSelection) -> None:
        """Args are the first linear's router, this one's name, and what it follows."""
        self.router, self.top_k = router, router.top_k
        self.whole_blocks = router.whole_blocks
        self.name = name
        self.shared = shared
        shared.followers.append(name)

    def is_idle(self) -> bool:
        """Never: it has to be told."""
        return False

    def select(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """The experts that the block's first linear chose for the same rows."""
        folds = self.top_k if self.is_last_of_block() else 1
        return self.shared.take(self.name, tuple(x.shape[:-1]), folds, self.whole_blocks)

    def is_last_of_block(self) -> bool:
        """Whether experts are whole blocks, which come together in this linear."""
        return self.whole_blocks and self.shared.followers[-1] == self.name

    def deliver(
        self, y: Tensor, router: Tensor | None, selection: Selection, training: bool
    ) -> Tensor:
        """The router's gradient is delivered where it is drawn."""
        return y

    def __deepcopy__(self, memo: dict[int, object]) -> FollowingSite:
        """Follows the copied block's first linear."""
        from copy import deepcopy

        copied = object.__new__(FollowingSite)
        copied.router, copied.top_k, copied.name = self.router, self.top_k, self.name
        copied.whole_blocks = self.whole_blocks
        copied.shared = deepcopy(self.shared, memo)
        return copied
