"""The fixtures of tests/remix_model: tiny models, batches, trainers."""

from __future__ import annotations

import pytest
import torch

from tests.remix_model.conftest import (  # noqa: F401
    assert_same,
    make_batch,
    make_llama,
    make_remix,
    make_trainer,
    one_thread,
    random_selections,
    take_grads,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.distributed.is_available():
        return
    skip = pytest.mark.skip(reason="torch without distributed")
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(skip)
