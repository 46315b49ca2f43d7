"""Every kernel test runs with NaN in uninitialised memory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def fill_uninitialised_memory(nan_in_empty: None) -> None:
    pass
