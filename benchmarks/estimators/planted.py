"""Learning curves of the router alone, on a problem whose right answer is known.

Every token has a type; for each type two of eight frozen experts add up to what the token should
become, and the loss is the squared distance to that. Tokens follow one another in sequences, and
each position is also blamed for a part of the noise of those before it, as in a language model:
the hidden state that is compared is a running mean. Only the router learns (Adam); counted are the
steps until its top k is the right subset for 95 % of all types, in sequences that it has not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remix_model import RoutedLoRALinear, sample_routing

TYPES, N, K, R, WIDTH, LENGTH, BATCH = 16, 8, 2, 4, 32, 48, 4
ENOUGH, EVERY = 0.95, 5


class Planted(nn.Module):
    """A routed layer whose experts are specialists, after an embedding of types."""

    def __init__(self, seed: int) -> None:
        """Everything but the router is drawn once and frozen."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # Orthogonal, so that a linear router can tell them apart; features of variance 1.
        self.types = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][:TYPES]
        self.types *= WIDTH**0.5
        torch.manual_seed(seed)
        self.layer = RoutedLoRALinear(
            nn.Linear(WIDTH, WIDTH),
            num_experts=N,
            top_k=K,
            r=R,
            init_lora_weights=False,
            router_init_range=0.02,
        )
        nn.init.normal_(self.layer.lora_A, std=WIDTH**-0.5)
        nn.init.zeros_(self.layer.lora_B)
        with torch.no_grad():  # each expert writes to features of its own
            for expert in range(N):
                self.layer.lora_B[expert, expert * R : (expert + 1) * R] = torch.eye(R)
        for parameter in (self.layer.lora_A, self.layer.lora_B):
            parameter.requires_grad_(False)
        pairs = torch.combinations(torch.arange(N), K)
        order = torch.randperm(len(pairs), generator=generator)
        self.right = pairs[order[:TYPES]]

    def targets(self, types: Tensor) -> Tensor:
        """What the right subset makes of the tokens, without a router."""
        from remix_kernels import routed_linear

        base, layer = self.layer.base_layer, self.layer
        return routed_linear(
            self.types[types],
            base.weight,
            base.bias,
            layer.lora_A,
            layer.lora_B,
            self.right[types],
            layer.scaling,
        )

    def losses(self, types: Tensor) -> Tensor:
        """[rows, T]."""
        with torch.no_grad():
            wanted = running_mean(self.targets(types))
        return (running_mean(self.layer(self.types[types])) - wanted).square().mean(-1)

    def share_right(self) -> float:
        """Of types whose top k is the right subset."""
        logits = self.types @ self.layer.router.T
        chosen = logits.topk(K).indices.sort(-1).values
        return float((chosen == self.right).all(-1).float().mean())


def running_mean(x: Tensor) -> Tensor:
    """Each position, and of those before it half as much for every step that they lie back."""
    age = torch.arange(x.shape[1])
    back = age.unsqueeze(1) - age
    return torch.where(back >= 0, 0.5**back, 0.0).to(x) @ x


def steps_until_right(
    seed: int, m: int, most: int, rate: float, **options: object
) -> tuple[int | None, float]:
    """(steps until 95 % are right, or None; share that is right in the end)."""
    model = Planted(seed)
    optimizer = torch.optim.Adam([model.layer.router], lr=rate)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(1, most + 1):
        types = torch.randint(TYPES, (BATCH, LENGTH), generator=generator)
        with sample_routing(model, m, seed=step, **options) as routing:  # type: ignore[arg-type]
            for part in routing.parts({"types": types}):
                routing.add(model.losses(part["types"]))
            loss = routing.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 and (share := model.share_right()) >= ENOUGH:
            return step, share
    return None, model.share_right()
