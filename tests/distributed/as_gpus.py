"""`python -m tests.distributed.as_gpus train ...`: the command line, sharded without a GPU.

accelerate shards only on GPUs: here it takes the processors for some.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import DistributedType, PartialState

from remix_cli import main

_init = PartialState.__init__


def _seem_to_have_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _seem_to_have_gpus  # type: ignore[method-assign]
    sys.exit(main())
