"""Tiny models and batches: random Llamas of 2 layers, hidden size 32, vocabulary 64, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remix_model import sample_routing, token_losses
from remix_model.site import find_sites
from tests.helpers import relative_error

Grads = dict[str, Tensor]


def _make_llama(layers: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, **config}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **sizes,
        )
    )
    return model.to(dtype).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few thousand elements: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_llama() -> Callable[..., nn.Module]:
    """make_llama(layers=2, dtype=float64, seed=0, **LlamaConfig fields), weights of the seed."""
    return _make_llama


@pytest.fixture
def make_remix() -> Callable[..., nn.Module]:
    """make_remix(base=None, seed=1, **ReMixConfig fields): with a random, non-zero adapter."""
    from peft import get_peft_model

    from remix_model import ReMixConfig

    def make(base: nn.Module | None = None, seed: int = 1, **config: Any) -> nn.Module:
        fields = {"r": 2, "num_experts": 4, "top_k": 2, "init_lora_weights": False}
        base = _make_llama() if base is None else base
        torch.manual_seed(seed)
        return get_peft_model(base, ReMixConfig(**{**fields, "router_init_range": 0.5, **config}))

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """make_batch(sizes=(10, 7, 9), prompt=3): right-padded, `prompt` unlabelled."""

    def make(
        sizes: Iterable[int] = (10, 7, 9), prompt: int = 3, seed: int = 2
    ) -> dict[str, Tensor]:
        sizes = list(sizes)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 64, (len(sizes), max(sizes)), generator=generator)
        mask = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
        labels = ids.masked_fill(~mask, -100)
        labels[:, :prompt] = -100
        return {
            "input_ids": ids.masked_fill(~mask, 0),
            "attention_mask": mask.long(),
            "labels": labels,
        }

    return make


@pytest.fixture
def sampled_loss() -> Callable[..., tuple[Tensor, Any]]:
    """sampled_loss(model, batch, num_items=None, **options of sample_routing): (loss, state)."""

    def run(model: nn.Module, batch: Mapping[str, Tensor], num_items: Any = None, **options: Any):
        options = {"num_selections": 3, "seed": 0, **options}
        with sample_routing(model, **options) as routing:
            losses, mask = token_losses(model, routing.expand(batch))
            loss = routing.loss(losses, mask, num_items)
        return loss, routing

    return run


@pytest.fixture
def random_selections() -> Callable[..., Grads]:
    """random_selections(model, rows): a random index [*rows, k] for every routed layer, by name."""

    def draw(model: nn.Module, rows: tuple[int, ...] = (), seed: int = 7) -> Grads:
        generator = torch.Generator().manual_seed(seed)
        index = {}
        for name, site in find_sites(model).items():
            noise = torch.rand(*rows, site.num_experts, generator=generator)
            index[name] = noise.topk(site.top_k, dim=-1).indices
        return index

    return draw


@pytest.fixture
def take_grads() -> Callable[[nn.Module], Grads]:
    """take_grads(model): every trainable parameter's gradient, by name; then cleared."""

    def take(model: nn.Module) -> Grads:
        grads = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} has no gradient"
                grads[name] = parameter.grad.detach().clone()
                parameter.grad = None
        return grads

    return take


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """assert_same(actual, expected, tolerance): tensors, or dicts of them, agree in relative norm.

    The default leaves room for fp32 losses and logits inside an fp64 model: advantages are
    differences of fp32 losses.
    """

    def check(actual: Any, expected: Any, tolerance: float = 5e-5) -> None:
        if not isinstance(expected, Mapping):
            actual, expected = {"tensor": actual}, {"tensor": expected}
        assert set(actual) == set(expected)
        for name, want in expected.items():
            got = actual[name]
            assert got.shape == want.shape, name
            error = relative_error(got, want)
            assert error <= tolerance, f"{name}: relative error {error:.3g}"

    return check


@pytest.fixture
def checkpointing() -> Callable[[nn.Module, str], nn.Module]:
    """checkpointing(model, "off" | "reentrant" | "non-reentrant"): in train mode."""

    def switch(model: nn.Module, kind: str) -> nn.Module:
        model.train()
        if kind != "off":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"}
            )
            assert model.is_gradient_checkpointing
        return model

    return switch


@pytest.fixture
def grads_of(
    make_remix: Callable[..., nn.Module],
    make_batch: Callable[..., dict[str, Tensor]],
    sampled_loss: Callable[..., tuple[Tensor, Any]],
    take_grads: Callable[[nn.Module], Grads],
    checkpointing: Callable[[nn.Module, str], nn.Module],
) -> Callable[..., Grads]:
    """grads_of(kind, seed=0): gradients of one sampled step under a kind of checkpointing."""

    def run(kind: str, seed: int = 0, config: Any = None, **options: Any) -> Grads:
        model = checkpointing(make_remix(**(config or {})), kind)
        loss, _ = sampled_loss(model, make_batch(), seed=seed, **options)
        loss.backward()
        return take_grads(model)

    return run


@pytest.fixture
def make_trainer(
    make_llama: Callable[..., nn.Module], make_remix: Callable[..., nn.Module], tmp_path: Path
) -> Callable[..., Any]:
    """make_trainer(model=None, trainer=ReMixTrainer, train=..., evaluate=None, **arguments).

    What the trainer itself takes (callbacks, compute_metrics, ...) may stand among the arguments.
    """
    from transformers import TrainingArguments

    from remix_model import ReMixTrainer, ReMixTrainingArguments
    from tests.remix_model.trainer_helpers import QUIET, STEPS, collate, examples

    own = ("callbacks", "compute_metrics", "compute_loss_func", "model_init")

    def make(
        model: Any = None,
        trainer: Any = ReMixTrainer,
        train: Any = None,
        evaluate: Any = None,
        **arguments: Any,
    ) -> Any:
        given = {name: arguments.pop(name) for name in own if name in arguments}
        if model is None and "model_init" not in given:
            model = make_remix(make_llama(dtype=torch.float32))
        kind = ReMixTrainingArguments if trainer is ReMixTrainer else TrainingArguments
        return trainer(
            model=model,
            args=kind(**{"output_dir": str(tmp_path / "run"), **QUIET, **STEPS, **arguments}),
            data_collator=collate,
            train_dataset=examples() if train is None else train,
            eval_dataset=evaluate,
            **given,
        )

    return make
