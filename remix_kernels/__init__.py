"""Kernels for mixtures of LoRAs: low-rank matmuls over per-token selected adapters.

Four functions are public, each with a plain-loop oracle in `remix_kernels.reference`:

    routed_lora         sum_j w_j B_{i_j} A_{i_j} x            (optionally added to a base output)
    routed_linear       W x + b + the same sum, in one op
    sample_top_k        k experts drawn without replacement: Gumbel top-k, counter-based
    selection_log_prob  the Plackett-Luce log-probability of such a draw, or of its set

`warmup` compiles (and under REMIX_AUTOTUNE=1 tunes) the kernels of a model before its first step.
Only torch is imported; nothing touches a device at import.
"""

from remix_kernels import reference
from remix_kernels._dispatch import BACKENDS, STRATEGIES
from remix_kernels._warmup import RoutedShape, warmup
from remix_kernels.ops import routed_linear, routed_lora, sample_top_k, selection_log_prob

__all__ = [
    "BACKENDS",
    "STRATEGIES",
    "RoutedShape",
    "reference",
    "routed_linear",
    "routed_lora",
    "sample_top_k",
    "selection_log_prob",
    "warmup",
]
