"""Errors of this package that callers may want to catch by name."""

from __future__ import annotations


class NonFiniteError(FloatingPointError):
    """A loss or gradient stopped being a number; training stopped before the optimizer saw it."""
