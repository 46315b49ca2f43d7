"""Whole models with REMIX_BACKEND=triton do what they do with PyTorch: fp32, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from remix_model import record_routing

observe = pytest.importorskip("remix_kernels._launch").observe
pytestmark = pytest.mark.usefixtures("strict_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "remix_num_selections": 2}
FP32 = 1e-4  # a few layers of sums in another order

Backend = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def backend() -> Backend:
    """backend(name): a context in which REMIX_BACKEND is `name`, and its kernels really run."""

    @contextmanager
    def use(name: str) -> Iterator[None]:
        launched = []

        def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
            launched.append(kernel.fn.__name__)
            return True

        with pytest.MonkeyPatch.context() as patch, observe(note):
            patch.setenv("REMIX_BACKEND", name)
            yield
        assert bool(launched) == (name == "triton")

    return use


@pytest.fixture
def make_small(make_llama: Any, make_remix: Any) -> Callable[..., Any]:
    """make_small(**ReMixConfig fields): a tiny fp32 model with an adapter that is no no-op."""
    return lambda **config: make_remix(make_llama(dtype=torch.float32), **config).to(DEVICE)


@pytest.fixture
def on_device(make_batch: Any) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda sizes=(6, 4): {k: v.to(DEVICE) for k, v in make_batch(sizes).items()}


@pytest.mark.parametrize(
    "strategy,kind",
    [("dense", "off"), ("dense", "reentrant"), ("dense", "non-reentrant"), ("grouped", "off")],
)
def test_a_sampled_step(
    strategy, kind, backend, make_small, on_device, sampled_loss, take_grads, checkpointing
):
    """The same experts are drawn, and every gradient, the routers' too, is the same."""
    losses, grads = {}, {}
    for name in ("torch", "triton"):
        with backend(name):
            model = checkpointing(make_small(runtime_config={"strategy": strategy}), kind)
            loss, _ = sampled_loss(model, on_device(), num_selections=2)
            loss.backward()
        losses[name], grads[name] = loss.detach(), take_grads(model)
    assert torch.allclose(losses["triton"], losses["torch"], rtol=FP32)
    for name, want in grads["torch"].items():
        assert torch.linalg.norm(grads["triton"][name] - want) <= FP32 * (want.norm() + 1e-3), name


def test_autocast(backend, make_small, on_device, sampled_loss, take_grads):
    """bf16 activations against fp32 adapters: as far from fp32 as PyTorch is, within a factor."""
    model, grads = make_small().train(), {}
    for name, enabled in (("torch", False), ("torch", True), ("triton", True)):
        with backend(name), torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            loss, _ = sampled_loss(model, on_device(), num_selections=2)
            loss.backward()
        grads[name, enabled] = take_grads(model)
    for name, truth in grads["torch", False].items():
        if "router" in name:  # draws may differ where bf16 moves a logit across a noise
            continue
        error, eager = (
            torch.linalg.norm(grads[backend_name, True][name] - truth) / truth.norm()
            for backend_name in ("triton", "torch")
        )
        assert error <= 2 * eager + 4 * torch.finfo(torch.bfloat16).eps, name


def test_top_k_and_its_record(backend, make_small, on_device, assert_same):
    model, batch, seen = make_small().eval(), on_device(), {}
    for name in ("torch", "triton"):
        with backend(name), record_routing(model) as recorder, torch.no_grad():
            logits = model(**batch).logits
        seen[name] = {"logits": logits, "shares": recorder.stats().layers[0].expert_share}
    assert_same(seen["triton"]["logits"], seen["torch"]["logits"], FP32)
    assert seen["triton"]["shares"] == seen["torch"]["shares"]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(use_cache, backend, make_small):
    model, tokens = make_small().eval(), {}
    prompt = torch.arange(3, 9, device=DEVICE).unsqueeze(0)
    for name in ("torch", "triton"):
        with backend(name):
            tokens[name] = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=5,
                do_sample=False,
                use_cache=use_cache,
            )
    assert torch.equal(tokens["triton"], tokens["torch"])


def test_save_and_load_is_bit_equal(backend, make_small, make_llama, on_device, tmp_path):
    from peft import PeftModel

    model, batch = make_small().eval(), on_device()
    with backend("triton"), torch.no_grad():
        want = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llama(dtype=torch.float32), tmp_path)
        assert torch.equal(loaded.to(DEVICE).eval()(**batch).logits, want)


def test_training(backend, make_llama, make_remix, make_trainer):
    """Two steps of the trainer: the same losses and the same weights."""
    losses, weights = {}, {}
    for name in ("torch", "triton"):
        model = make_remix(make_llama(layers=1, dtype=torch.float32)).to(DEVICE)
        with backend(name):
            trainer = make_trainer(model, use_cpu=DEVICE == "cpu", **SHORT)
            trainer.train()
        losses[name] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        weights[name] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert losses["triton"] == pytest.approx(losses["torch"], rel=FP32)
    for name, want in weights["torch"].items():
        assert torch.allclose(weights["triton"][name], want, rtol=1e-3, atol=1e-4), name
