"""ReMix's Theorem 1, simulated: how many weights of a Gaussian softmax router are large.

    z = P x,   P [n, D] ~ N(0, sigma^2),   x [D] of random signs,   w = softmax(z)
    ESS(w) = (|w|_1 / |w|_2)^2

The paper states for n=8, D=1024, sigma=1 that at most two weights are large with a probability of
at least 84.19 %. Checked are P(ESS <= 2), and the event itself: at most two weights exceed t
exactly when the third largest is at most t. The paper's own t is not known to us, so `threshold`
is the least t for which the statement is true.

Whatever the signs of x are, the logits are n independent draws of N(0, sigma^2 D): only
sigma sqrt(D) and n matter. One router and one input a sample; seeded, so a row comes out the same.

    python -m benchmarks.theorem1     writes results/theorem1.csv in half a minute
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import prepare_cpu, replace_rows

STATED = 0.8419
SAMPLES = 10_000
BASE = {"sigma": 1.0, "n": 8, "D": 1024}
SWEEP = {"sigma": (0.02, 0.05, 0.1, 0.3), "n": (2, 4, 16, 64), "D": (64, 256, 4096)}
CHUNK = 250


def main() -> None:
    """Simulate the stated case and the sweep, one setting changed at a time."""
    prepare_cpu()
    cases = [BASE, *({**BASE, key: value} for key in SWEEP for value in SWEEP[key])]
    rows = [{**case, **summary(router_weights(**case, samples=SAMPLES))} for case in cases]
    print(f"written to {replace_rows('theorem1', rows)}")


def router_weights(sigma: float, n: int, D: int, samples: int, seed: int = 0) -> Tensor:
    """Softmax weights of fresh Gaussian routers, each on an input of random signs.

    Args:
        sigma: Standard deviation of the router's entries.
        n: Experts.
        D: Size of the input.
        samples: Independent pairs of a router and an input.
        seed: Of all of them.

    Returns:
        [samples, n] fp64.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, samples, CHUNK):
        count = min(CHUNK, samples - start)
        router = sigma * torch.randn(count, n, D, generator=generator)
        x = torch.randint(0, 2, (count, D, 1), generator=generator).float() * 2 - 1
        parts.append((router @ x).squeeze(-1).double().softmax(-1))
    return torch.cat(parts)


def effective_size(weights: Tensor) -> Tensor:
    """ESS of weights [..., n], which need not sum to 1: 1 for one-hot, n for uniform.

    Source: ReMix (arXiv 2603.10160) section 2, eq. 3.
    """
    return weights.sum(-1).square() / weights.square().sum(-1)


def summary(weights: Tensor) -> dict[str, object]:
    """What a row says of weights [samples, n]; `se` is the standard error of p_ess_at_most_2."""
    ess = effective_size(weights)
    at_most_2 = float((ess <= 2).double().mean())
    third = weights.sort(-1, descending=True).values[:, 2:3]  # none where there are two experts
    row: dict[str, object] = {
        "samples": len(ess),
        "mean_ess": f"{float(ess.mean()):.3f}",
        "p_ess_at_most_2": f"{at_most_2:.4f}",
        "se": f"{(at_most_2 * (1 - at_most_2) / len(ess)) ** 0.5:.4f}",
    }
    for bound in (0.1, 0.01):
        p = float((third <= bound).all(-1).double().mean())
        row[f"p_at_most_two_above_{bound}"] = f"{p:.4f}"
    row["threshold"] = f"{float(third.quantile(STATED)):.2g}" if third.numel() else "0"
    return row


if __name__ == "__main__":
    main()
