"""Experts that are whole feed-forward blocks: against blocks with one expert's LoRAs merged."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from remix_model import ReMixConfig, Router, register_router
from remix_model.routers import ROUTERS

HIDDEN = 32
LINEARS = ["gate_proj", "up_proj", "down_proj"]


class FeedForward(nn.Module):
    """Llama's, with its linears registered in another order if that is asked for."""

    def __init__(self, order=LINEARS, bias=False):
        super().__init__()
        for name in order:
            sizes = (48, HIDDEN) if name == "down_proj" else (HIDDEN, 48)
            self.add_module(name, nn.Linear(*sizes, bias=bias, dtype=torch.float64))

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Network(nn.Module):
    """One block that is not the model itself."""

    def __init__(self, **options):
        super().__init__()
        self.mlp = FeedForward(**options)

    def forward(self, x):
        return self.mlp(x)


def make_network(top_k=2, num_experts=4, r=2, lora_dropout=0.0, router_type=None, **options):
    torch.manual_seed(5)
    config = ReMixConfig(
        router_type=router_type or "mixlora_block",
        router_kwargs={"load_balancing_coef": 0.0},
        num_experts=num_experts,
        top_k=top_k,
        r=r,
        lora_dropout=lora_dropout,
        target_modules=LINEARS,
        init_lora_weights=False,
        router_init_range=0.5,
    )
    return get_peft_model(Network(**options), config, autocast_adapter_dtype=False).double()


def one_expert(mlp, x, expert, config, factor):
    """The block with one expert's LoRAs, times a factor, merged into it."""

    def linear(layer, h):
        base = layer.base_layer
        a, b = layer.remix_lora_A["default"][expert], layer.remix_lora_B["default"][expert]
        weight = base.weight + factor * config.lora_alpha / config.r**0.5 * b @ a
        return F.linear(h, weight, base.bias)

    return linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))


def mixed(mlp, x, config, factor=1):
    """The chosen experts' blocks, each whole, times their weights."""
    shares = (x @ mlp.gate_proj.remix_router["default"].T).softmax(-1)
    top, index = shares.topk(config.top_k, -1)
    weights = torch.zeros_like(shares).scatter(-1, index, top / top.sum(-1, keepdim=True))
    blocks = [one_expert(mlp, x, i, config, factor) for i in range(config.num_experts)]
    return (torch.stack(blocks, -1) * weights.unsqueeze(-2)).sum(-1)


CASES = {
    "many rows": {},
    "few rows": {"rows": (2, 5)},
    "no rows": {"rows": (0, 5)},
    "a matrix": {"rows": (18,)},
    "k 1": {"top_k": 1},
    "k n": {"top_k": 4},
    "large pool": {"num_experts": 6, "r": 5},
    "bias": {"bias": True},
    "bias, few rows": {"bias": True, "rows": (3, 1)},
    "two ops": {"way": "two ops"},
    "two ops, few rows": {"way": "two ops", "rows": (2, 5)},
    "dropout": {"way": "dropout", "lora_dropout": 0.5},
    "dropout, few rows": {"way": "dropout", "lora_dropout": 0.5, "rows": (2, 5)},
    "reference": {"way": "reference"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whole_blocks_are_mixed(case, assert_same):
    options = dict(case)
    rows, way = options.pop("rows", (2, 9)), options.pop("way", "one op")
    model = make_network(**options).train()
    mlp, config = model.base_model.model.mlp, model.peft_config["default"]
    for layer in mlp.children():
        layer.runtime["default"].backend = "reference" if way == "reference" else "auto"
        if way == "two ops":
            layer.base_layer.register_forward_hook(lambda *_: None)
        if way == "dropout":  # that doubles what it might drop
            layer.remix_dropout["default"].register_forward_hook(lambda _, args, y: args[0] * 2)
    x = torch.randn(*rows, HIDDEN, dtype=torch.float64, requires_grad=True)
    want, got = mixed(mlp, x, config, 2 if way == "dropout" else 1), mlp(x)
    assert_same(got.detach(), want.detach(), 1e-6)
    dy = torch.randn_like(want)
    inputs = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    wanted = torch.autograd.grad((want * dy).sum(), inputs)
    found = torch.autograd.grad((got * dy).sum(), inputs)
    for grad, want_grad in zip(found, wanted, strict=True):
        if float(want_grad.norm()) > 1e-9:
            assert_same(grad, want_grad, 1e-6)
        else:  # one expert always weighs 1
            assert float(grad.norm()) < 1e-9
    with torch.no_grad():
        assert_same(mlp.eval()(x), mixed(mlp, x, config), 1e-6)
    assert [name for name, _ in mlp.named_parameters() if "router" in name] == [
        "gate_proj.remix_router.default"
    ]


@pytest.mark.parametrize("frozen", ["router", "adapters"])
def test_either_may_be_frozen(frozen, assert_same):
    model = make_network()
    mlp, config = model.base_model.model.mlp, model.peft_config["default"]
    for name, parameter in mlp.named_parameters():
        if ("router" in name) == (frozen == "router"):
            parameter.requires_grad_(False)
    x = torch.randn(18, HIDDEN, dtype=torch.float64)
    inputs = [p for p in mlp.parameters() if p.requires_grad]
    assert len(inputs) == (6 if frozen == "router" else 1)
    wanted = torch.autograd.grad(mixed(mlp, x, config).square().sum(), inputs)
    for grad, want in zip(torch.autograd.grad(mlp(x).square().sum(), inputs), wanted, strict=True):
        assert_same(grad, want, 1e-6)


@pytest.mark.parametrize("rows", [5, 40])
def test_bfloat16_is_as_good_as_eager(rows):
    """At most twice the error of the blocks written out, against fp64."""
    model = make_network()
    mlp, config = model.base_model.model.mlp, model.peft_config["default"]
    x = torch.randn(rows, HIDDEN, dtype=torch.float64)
    trained = [p for p in mlp.parameters() if p.requires_grad]

    def solve(block, x, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
            return y, *torch.autograd.grad(y.float().square().sum(), trained)

    truth = [t.double() for t in solve(lambda x: mixed(mlp, x, config), x, False)]
    mlp.float()
    x = x.float()
    eager = solve(lambda x: mixed(mlp, x, config), x, True)
    for got, other, want in zip(solve(mlp, x, True), eager, truth, strict=True):
        error, limit = ((t.double() - want).norm() / want.norm() for t in (got, other))
        assert error <= 2 * limit + 1e-3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj", "down_proj"], "up_proj is not adapted"),
        (["q_proj", "k_proj", "v_proj", "o_proj"], "leave other linears out|shape|size"),
    ],
    ids=["part", "attention"],
)
def test_whole_blocks_want_feed_forward_blocks(targets, message, make_remix, make_batch):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make_remix(router_type="mixlora_block", target_modules=targets)(**make_batch())


@pytest.mark.parametrize("left", LINEARS)
def test_part_of_a_block_is_refused_beside_another_adapter(left):
    model = make_network()
    config = ReMixConfig(
        router_type="mixlora_block",
        num_experts=4,
        top_k=2,
        target_modules=[name for name in LINEARS if name != left],
    )
    with pytest.raises(ValueError, match=f"{left} is not adapted"):
        model.add_adapter("other", config)


def test_linears_in_another_order_are_named():
    model = make_network(order=["gate_proj", "down_proj", "up_proj"])
    with pytest.raises(ValueError, match="registered in the order in which they run"):
        model(torch.randn(3, HIDDEN, dtype=torch.float64))


def test_one_row_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"gate_proj got x \[32\].*unsqueeze"):
        make_network()(torch.randn(HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_linear_of_a_block_cannot_be_checkpointed(reentrant):
    mlp = make_network().base_model.model.mlp
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    y = checkpoint(mlp.down_proj, hidden, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint the whole block"):
        y.sum().backward()


def test_a_policy_of_whole_blocks_is_refused():
    @register_router("policy_of_blocks")
    class PolicyOfBlocks(Router):
        learned = False
        whole_blocks = True

    try:
        with pytest.raises(ValueError, match=r"policy .* cannot have whole_blocks"):
            make_network(router_type="policy_of_blocks")
    finally:
        del ROUTERS["policy_of_blocks"]
