"""Errors of this package that callers may want to catch by name."""

from __future__ import annotations


class NonFiniteError(FloatingPointError):
    """A loss or gradient stopped being a number; training stopped before the optimizer saw it."""


class SavingError(OSError):
    """Something could not be saved, for want of space or of permission; nothing else was lost."""
