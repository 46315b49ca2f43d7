"""A mixture of LoRAs as MixLoRA and MoLA compute it: what a whole step of ours is held to.

Softmax over the router's logits, the k largest renormalised, and a loop over experts that adds each
one's rows. The router learns by plain backpropagation through the weights, so a step is one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remix_model import load_model


class ExpertLoop(nn.Module):
    """A frozen linear with a pool of LoRAs and learned weights."""

    def __init__(self, base: nn.Linear, n: int, k: int, r: int) -> None:
        """B is not zero, as in the middle of training."""
        super().__init__()
        self.base, self.k = base.requires_grad_(False), k
        d, o = base.in_features, base.out_features
        self.lora_A = nn.Parameter(torch.randn(n, r, d) / d**0.5)
        self.lora_B = nn.Parameter(torch.randn(n, o, r) * 0.01)
        self.router = nn.Parameter(torch.randn(n, d) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        weights, index = (rows @ self.router.T).softmax(-1).topk(self.k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = self.base(rows)
        for expert in range(len(self.lora_A)):
            chosen, slot = torch.where(index == expert)
            hidden = rows[chosen] @ self.lora_A[expert].T
            update = weights[chosen, slot].unsqueeze(1) * (hidden @ self.lora_B[expert].T)
            y = y.index_add(0, chosen, update)
        return y.view(*x.shape[:-1], -1)


def build(targets: list[str], n: int, k: int, r: int) -> nn.Module:
    """SmolLM2-135M with such a mixture at every target."""
    torch.manual_seed(0)
    model = load_model("smollm2-135m", dtype="float32", device="cpu").requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ExpertLoop(module, n, k, r))
    return model.train()
