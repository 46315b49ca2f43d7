"""Adapters beside a quantised base: its linears run as they are, the adapters are added.

A stub stands for every kind of quantised linear; bitsandbytes and torchao are tested where they
are installed.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn

import remix_model.layer
from remix_kernels import reference
from remix_model import ReMixTrainer, ReMixTrainingArguments, force_selection
from remix_model.layer import is_plain
from remix_model.site import find_sites
from tests.helpers import assert_accurate, routed_lora_eager
from tests.remix_model.trainer_helpers import QUIET, STEPS, collate, examples, logged

KINDS = [
    pytest.param("stub", "cpu", id="stub"),
    pytest.param("nf4", "cpu", id="nf4"),
    pytest.param("int8", "cpu", id="int8"),
    pytest.param("torchao", "cpu", id="torchao"),
    pytest.param("nf4", "cuda", id="nf4-cuda", marks=pytest.mark.gpu),
    pytest.param("int8", "cuda", id="int8-cuda", marks=pytest.mark.gpu),
]
PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao"}


class ByteLinear(nn.Module):
    """y = ((weight - 128) * scale) x: codes [out, in] uint8, one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, ((self.weight.to(x.dtype) - 128) * self.scale).to(x.dtype))


@pytest.fixture
def load(make_llama, tmp_path):
    """load(kind, device): a quantised copy of one tiny Llama."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}

    def load(kind, device):
        if kind == "stub":
            model = make_llama(dtype=torch.float32, **sizes)
            for block in model.model.layers:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    setattr(block.mlp, name, ByteLinear(getattr(block.mlp, name)))
            return model
        pytest.importorskip(PACKAGES[kind], reason=f"{PACKAGES[kind]} is not installed")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

        folder = tmp_path / "base"
        if not folder.exists():
            make_llama(dtype=torch.float32, **sizes).save_pretrained(folder)
        if kind == "torchao":
            quantization = importlib.import_module("torchao.quantization")
            how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        elif kind == "int8":
            how = BitsAndBytesConfig(load_in_8bit=True)
        else:
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, device_map=device, dtype=torch.float32
        )

    return load


@pytest.fixture
def adapt(make_remix):
    """adapt(base, dtype): with adapters of that dtype."""

    def adapt(base, dtype=torch.float32):
        model = make_remix(base)
        for name, parameter in model.named_parameters():
            if "remix_" in name:
                parameter.data = parameter.data.to(dtype)
        return model

    return adapt


@pytest.fixture
def no_fused_op(monkeypatch):
    """The op that multiplies by the frozen weight itself is never called."""
    monkeypatch.setattr(
        remix_model.layer, "routed_linear", lambda *a, **k: pytest.fail("the fused path")
    )
    monkeypatch.setattr(remix_model.layer, "decode_row", lambda *a: pytest.fail("the fused path"))


class Own(torch.Tensor):
    """A weight that multiplies in its own way."""


class OwnLinear(nn.Linear):
    """A linear that does."""


def test_what_is_plain():
    """Another class of linear, of weight, or of numbers: each alone runs by itself."""
    linears = [nn.Linear(4, 4) for _ in range(3)]
    linears[1].weight = nn.Parameter(linears[1].weight.detach().as_subclass(Own))
    linears[2].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    assert [is_plain(base) for base in (*linears, OwnLinear(4, 4))] == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [(2, 5), (1, 1)], ids=["batch", "token"])
@pytest.mark.parametrize(("kind", "device"), KINDS)
def test_a_linear_is_its_base_plus_adapters(kind, device, rows, dtype, load, adapt, no_fused_op):
    model = adapt(load(kind, device), dtype).eval()
    name = "base_model.model.model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    assert not is_plain(layer.base_layer)
    x = torch.randn(*rows, layer.in_features, device=device)
    index = torch.tensor([2, 0], device=device).expand(*rows, 2)
    with torch.no_grad(), force_selection(model, {name: index}):
        y, base = layer(x), layer.base_layer(x)
    weights = (layer.remix_lora_A["default"], layer.remix_lora_B["default"])
    assert weights[0].dtype == dtype
    scaling = layer.scaling["default"]
    eager = routed_lora_eager(x, *weights, index, scaling, base=base)
    exact = [tensor.detach().double() for tensor in (x, *weights, base)]
    truth = reference.routed_lora_ref(*exact[:3], index, scaling, base=exact[3])
    assert_accurate(y, eager.detach(), truth)
    assert not torch.allclose(y, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "device"), KINDS)
def test_a_sampled_step(
    kind, device, dtype, load, adapt, make_batch, sampled_loss, take_grads, no_fused_op
):
    """Gradients for A, B and router, none for the base."""
    base = prepare_model_for_kbit_training(load(kind, device))
    model = adapt(base, dtype).train()
    batch = {name: value.to(device) for name, value in make_batch().items()}
    loss, _ = sampled_loss(model, batch)
    loss.backward()
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)
    grads = take_grads(model)
    assert len(grads) == 3 * len(find_sites(model))
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert grad.isfinite().all() and grad.any(), name


@pytest.mark.parametrize(("kind", "device"), KINDS)
def test_training_saving_and_loading(kind, device, load, adapt, make_batch, tmp_path, no_fused_op):
    model = adapt(prepare_model_for_kbit_training(load(kind, device)))
    options = {**QUIET, **STEPS, "max_steps": 10, "learning_rate": 2e-2}
    options["use_cpu"] = device == "cpu"
    trainer = ReMixTrainer(
        model=model,
        args=ReMixTrainingArguments(str(tmp_path / "run"), **options),
        data_collator=collate,
        train_dataset=examples(),
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] - 0.2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        prepare_model_for_kbit_training(load(kind, device)), tmp_path / "adapter"
    )
    ids = make_batch()["input_ids"].to(device)
    with torch.no_grad():
        want, got = (m.eval()(input_ids=ids).logits for m in (model, loaded))
    assert torch.equal(got, want)
