"""Measurements: one script an op or a step; every figure in the docs is a row in results/."""
