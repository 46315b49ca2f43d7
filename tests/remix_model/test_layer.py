"""`RoutedLoRALinear`: forced subsets against PEFT's LoRA, zero start, dtypes, dropout."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from remix_model import RoutedLoRALinear, force_selection, record_routing, sample_routing


def make_layer(n=5, k=2, r=3, bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"init_lora_weights": False, "router_init_range": 0.7, **options}
    base = nn.Linear(6, 4, bias=bias).to(dtype)
    return RoutedLoRALinear(base, num_experts=n, top_k=k, r=r, **options)


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def lora_of(layer, chosen, use_rslora):
    """A PEFT LoRA of rank k r with lora_alpha=2: the chosen A's and B's concatenated."""
    from peft import LoraConfig, get_peft_model

    rank = len(chosen) * layer.r
    base = copy.deepcopy(layer.base_layer)
    config = LoraConfig(r=rank, lora_alpha=2, use_rslora=use_rslora, target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config)
    lora = model.base_model.model[0]
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(layer.lora_A[chosen].flatten(0, 1))
        lora.lora_B["default"].weight.copy_(layer.lora_B[chosen].permute(1, 0, 2).flatten(1))
    return model, lora.lora_A["default"].weight, lora.lora_B["default"].weight


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("chosen", [[3], [4, 1], [2, 0, 3], [4, 3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("strategy", ["dense", "grouped", "gather"])
def test_forced_subset_is_a_lora_of_rank_kr(use_rslora, bias, chosen, strategy, assert_same):
    layer = make_layer(k=len(chosen), bias=bias, use_rslora=use_rslora, strategy=strategy)
    model, lora_A, lora_B = lora_of(layer, chosen, use_rslora)
    x, dy = random(2, 7, 6), random(2, 7, 4, seed=2)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    want = model(inputs[0])
    want.backward(dy)
    layer.eval()
    with force_selection(layer, {"": torch.tensor(chosen)}):
        got = layer(inputs[1])
    got.backward(dy)
    assert_same(got.detach(), want.detach(), 1e-12)
    assert_same(inputs[1].grad, inputs[0].grad, 1e-12)
    k, r = len(chosen), layer.r
    assert_same(layer.lora_A.grad[chosen], lora_A.grad.view(k, r, 6), 1e-12)
    assert_same(layer.lora_B.grad[chosen], lora_B.grad.view(4, k, r).permute(1, 0, 2), 1e-12)
    others = [e for e in range(5) if e not in chosen]
    assert not layer.lora_A.grad[others].any()
    assert not layer.lora_B.grad[others].any()


@pytest.mark.parametrize(("use_rslora", "want"), [(True, 2 / math.sqrt(6)), (False, 2 / 6)])
def test_scaling_is_that_of_one_lora(use_rslora, want):
    assert make_layer(k=2, r=3, use_rslora=use_rslora).scaling == pytest.approx(want, rel=1e-15)


def test_top_k_takes_the_largest_logits():
    """Equation 6, row by row, in eval and in train mode alike."""
    layer = make_layer()
    x = random(3, 6)
    scale = 2 / math.sqrt(2 * 3)
    want = []
    for row in x:
        y = layer.base_layer(row)
        for expert in (layer.router @ row).topk(2).indices:
            y = y + scale * (layer.lora_B[expert] @ (layer.lora_A[expert] @ row))
        want.append(y)
    for mode in (layer.train(), layer.eval()):
        with torch.no_grad():
            torch.testing.assert_close(mode(x), torch.stack(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_selections", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_zero_start(num_selections, dtype, take_grads):
    """B = 0: the base's output bit for bit; advantages and router gradient exactly 0.

    Some processors round a row by its place in the batch. There selections differ by as much.
    """
    layer = make_layer(dtype=dtype, init_lora_weights=True)
    assert not layer.lora_B.any()
    assert layer.lora_A.any()
    x = random(3, 7, 6, dtype=dtype)
    assert torch.equal(layer.eval()(x), layer.base_layer(x))
    layer.train()
    with sample_routing(layer, num_selections=num_selections, seed=0) as routing:
        folded = routing.expand({"x": x})["x"]
        y = layer(folded)
        loss = routing.loss(y.square().sum(-1))
    base = layer.base_layer(folded)
    assert torch.equal(y, base)
    first, *others = base.chunk(num_selections)
    rounding = 0.0 if all(torch.equal(first, other) for other in others) else 1e-6
    assert float(routing.advantages.abs().max()) <= rounding
    loss.backward()
    grads = take_grads(layer)
    assert float(grads["router"].abs().max()) <= rounding
    assert not grads["lora_A"].any()
    assert grads["lora_B"].any()


def test_initialisation():
    """A Kaiming-uniform per expert, router N(0, 0.02^2)."""
    torch.manual_seed(0)
    layer = RoutedLoRALinear(nn.Linear(400, 300), num_experts=16, top_k=2, r=8)
    bound = 1 / math.sqrt(400)
    assert float(layer.lora_A.detach().abs().max()) <= bound
    assert float(layer.lora_A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert float(layer.router.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(layer.router.mean())) < 0.001
    assert not layer.base_layer.weight.requires_grad


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_temperature_scales_the_policy(temperature):
    layer = make_layer(router_temperature=temperature).eval()
    x = random(11, 6)
    with record_routing(layer) as record:
        layer(x)
    q = (x.float() @ layer.router.T.float() / temperature).softmax(-1)
    want = float(-(q * q.log()).sum(-1).mean())
    assert record.stats().layers[0].entropy == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision_rounds_and_no_more(dtype):
    """The selection comes from fp32 logits; output and gradients carry the dtype's own error."""
    layer = make_layer(dtype=torch.float32)
    low = make_layer(dtype=torch.float32).to(dtype)
    exact = make_layer(dtype=torch.float32)
    exact.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    x = random(5, 7, 6, dtype=torch.float32).to(dtype)
    index = (x.float() @ exact.router.T).topk(2).indices
    results = []
    for module, rows in ((low, x), (exact, x.float())):
        with force_selection(module, {"": index}) if module is exact else torch.enable_grad():
            y = module.eval()(rows)
        y.square().sum().backward()
        results.append([y.detach(), module.lora_A.grad, module.lora_B.grad])
    assert all(tensor.dtype == dtype for tensor in results[0])
    eps = torch.finfo(dtype).eps
    for got, want in zip(*results, strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 4 * eps
    assert layer.scaling == low.scaling


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_runs_and_learns(dropout):
    layer = make_layer(dtype=torch.float32, lora_dropout=dropout).train()
    x = random(2, 7, 6, dtype=torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        sample_routing(layer, num_selections=2, seed=0) as routing,
    ):
        y = layer(routing.expand({"x": x})["x"])
        loss = routing.loss(y.float().square().sum(-1))
    loss.backward()
    for parameter in (layer.lora_A, layer.lora_B, layer.router):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_dropout_only_in_training():
    layer = make_layer(lora_dropout=0.5)
    plain = make_layer()
    x = random(5, 6)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = layer.train()(x), layer(x)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        dropped = layer.dropout(x)
        index = (x @ layer.router.T).topk(2).indices
        want = layer.base_layer(x)
        for t in range(5):
            for e in index[t]:
                want[t] += layer.scaling * (layer.lora_B[e] @ (layer.lora_A[e] @ dropped[t]))
    torch.testing.assert_close(first, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (1, 6), (2, 3, 4, 6)], ids=str)
def test_any_leading_shape(shape):
    layer = make_layer().eval()
    x = random(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    if x.numel():
        rows = torch.stack([layer(row) for row in x.reshape(-1, 6)])
        torch.testing.assert_close(y.reshape(-1, 4), rows, rtol=1e-12, atol=1e-12)


def test_copies_inside_a_context_start_clean():
    """deepcopy and pickle take the parameters, not the context or its draws."""
    layer = make_layer().train()
    x = random(2, 3, 6)
    with sample_routing(layer, num_selections=2, seed=0) as routing:
        layer(routing.expand({"x": x})["x"])
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        copies = [copy.deepcopy(layer), torch.load(stream, weights_only=False)]
    with torch.no_grad():
        want = layer(x)
        for other in copies:
            assert other.site is not layer.site
            assert torch.equal(other(x), want)
            with sample_routing(other, num_selections=2, seed=0) as routing:
                other(routing.expand({"x": x})["x"])


def test_state_dict_round_trip():
    layer, other = make_layer(), make_layer(router_init_range=0.1)
    keys = {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B", "router"}
    assert set(layer.state_dict()) == keys
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(random(4, 6)), layer.eval()(random(4, 6)))


@pytest.mark.parametrize("bias", [False, True])
def test_one_decoded_row_takes_the_short_way_to_the_same_bits(bias: bool) -> None:
    """Recording sends the row through the ops; both read the chosen experts one by one."""
    layer = RoutedLoRALinear(
        nn.Linear(40, 24, bias=bias), num_experts=8, top_k=3, r=4, strategy="gather"
    ).eval()
    nn.init.normal_(layer.lora_B)
    for shape in ((1, 1, 40), (1, 40), (40,)):
        x = torch.randn(shape)
        with torch.no_grad():
            short = layer(x)
            with record_routing(layer):
                long = layer(x)
        assert short.shape == (*shape[:-1], 24)
        assert torch.equal(short, long)


def test_the_short_way_is_for_plain_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = RoutedLoRALinear(nn.Linear(40, 24), num_experts=8, top_k=3, r=4, strategy="gather")
    rows = []
    note = layer.site.note_top_k
    monkeypatch.setattr(layer.site, "note_top_k", lambda mode: (rows.append(mode), note(mode)))
    x = torch.randn(1, 40)
    layer(x)  # with gradients
    with torch.no_grad():
        layer(torch.randn(2, 40))
        with force_selection(layer, {"": torch.tensor([1, 2, 3])}):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer.double()(x.double())
        assert not rows
        layer.float()(x)
        assert len(rows) == 1
