"""The shipped cost model is the one that the committed measurements give."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from benchmarks.bench_calibration import measured_rows
from remix_kernels._costs import SHIPPED
from remix_kernels.calibrate import fit, regret


def test_shipped_constants_are_the_committed_rows():
    measured = measured_rows()
    assert len(measured) > 30
    assert astuple(SHIPPED) == pytest.approx(astuple(fit(measured)), rel=0.05)
    assert max(ratio for _, _, ratio in regret(measured, SHIPPED)) < 1.1
