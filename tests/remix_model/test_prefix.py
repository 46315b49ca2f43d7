"""The shared prefix: what it computes, on how many rows, and when it stays out of the way."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from remix_model import RoutedLoRALinear, force_selection, prefix, routing, sample_routing
from remix_model.prefix import MODEL_TYPES, shared_prefix
from remix_model.site import find_sites

B, C = 3, 3
KINDS = ("off", "reentrant", "non-reentrant")
SHARED, UNSHARED = [B, B, B * C, B * C], [B * C] * 4


@dataclass
class Fold:
    pass_selections: int = C
    batch_size: int | None = B


@dataclass
class Step:
    """One sampled step: what came out, and the rows that embedding and blocks saw."""

    first: int = -1
    logits: Tensor | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)
    embedded: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    rows_in_backward: list[int] = field(default_factory=list)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    lists = (m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and "vis" not in n)
    return list(next(blocks for blocks in lists if len(blocks) > 1))


@pytest.fixture(autouse=True)
def only_when_asked(monkeypatch) -> None:
    """sample_routing shares the prefix by itself; here the tests do it, or do not."""
    monkeypatch.setattr(routing, "shared_prefix", lambda *args: nullcontext(0), raising=False)


@pytest.fixture
def take_step(random_selections) -> Callable[..., Step]:
    """take_step(model, batch, share, fold=Fold(), run=model, flat=False, **of the model): a Step.

    The selections are forced, and differ; backward runs after the contexts. Gradients are those
    that are not None.
    """

    def take(model, batch, share, fold=None, run=None, flat=False, **kwargs) -> Step:
        step, fold = Step(), fold or Fold()
        rows = (B * C, batch["input_ids"].shape[1])
        selections = random_selections(model, (rows[0] * rows[1],) if flat else rows)
        note = lambda into: lambda module, args: into.append(len(args[0]))  # noqa: E731
        with ExitStack() as hooks:
            embedding = model.get_input_embeddings() if run is None else None
            if embedding is not None:
                hook = embedding.register_forward_pre_hook(note(step.embedded))
                hooks.callback(hook.remove)
            # Modules within the blocks: these run again when the block is recomputed.
            seen = step.rows
            for block in decoder_blocks(model) if run is None else []:
                norm = next(m for m in block.modules() if "norm" in type(m).__name__.lower())
                hook = norm.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
                hooks.callback(hook.remove)
            with (
                sample_routing(model, num_selections=C, seed=0) as state,
                force_selection(model, selections),
                shared_prefix(model, list(find_sites(model)) if share else [], fold) as step.first,
            ):
                folded = state.expand(batch)
                labels = folded.pop("labels")
                logits = (model if run is None else run)(
                    **{"use_cache": False, **folded, **kwargs}
                ).logits
                mask = labels[:, 1:] != -100
                losses = nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
                )
                loss = state.loss(losses, mask)
            seen = step.rows_in_backward
            loss.backward()
        step.logits = logits.detach() * folded["attention_mask"].unsqueeze(-1)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                step.grads[name], parameter.grad = parameter.grad, None
        assert all(float(grad.norm()) > 0 for grad in step.grads.values())
        return step

    return take


@pytest.fixture
def compare(take_step, assert_same) -> Callable[..., Step]:
    """compare(model, batch, **of take_step): shared and unshared steps agree; the shared one."""

    def check(model, batch, tolerance: float = 1e-10, **options) -> Step:
        want = take_step(model, batch, False, **options)
        got = take_step(model, batch, True, **options)
        assert want.first == 0
        assert want.rows == [B * C] * len(want.rows)
        assert_same(got.logits, want.logits, 1e-10)
        assert_same(got.grads, want.grads, tolerance)
        return got

    return check


@pytest.fixture
def model(make_llama, make_remix) -> nn.Module:
    """A Llama of 4 blocks, routed from block 2 on."""
    return make_remix(make_llama(layers=4), layers_to_transform=[2, 3])


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in batch.items()}


# Every type --------------------------------------------------------------------------------------

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
SEQ2SEQ |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
GPT2 = {"n_head": 4, "n_inner": 48}
OWN = {
    "bart": SEQ2SEQ,
    "whisper": {**SEQ2SEQ, "max_target_positions": 64, "decoder_start_token_id": 1},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {"n_head": 4, "rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "num_attention_heads": 4},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
    "falcon": {"num_attention_heads": 4},
    "gemma3": {
        "text_config": {**SIZES, **HEADS, "sliding_window": 4, "sliding_window_pattern": 2},
        "vision_config": {**VISION, "intermediate_size": 16, "patch_size": 14},
    },
    "qwen2": {**HEADS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def make_tiny(model_type: str, **config) -> nn.Module:
    """fp64, 4 blocks; with a sliding window of 4 where the type has one."""
    sizes = {} if model_type == "gemma3" else SIZES
    own = {**OWN.get(model_type, {**HEADS, "sliding_window": 4}), **config}
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **{**sizes, **own})
    return AutoModelForCausalLM.from_config(made).eval()


@pytest.fixture
def fp64_default() -> Iterator[None]:
    """XGLM's attention makes a constant of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model_type", sorted([*MODEL_TYPES, "gemma3"]))
def test_every_type(model_type, make_remix, make_batch, compare, fp64_default):
    model = make_tiny(model_type)
    model = make_remix(model, layers_to_transform=[2, 3])
    flat = model_type == "opt"  # its feed-forward linears get [B T, d]
    batches = [make_batch(), left_padded(make_batch())]
    if model_type == "gemma2":
        del batches[1]  # its eager attention in fp64 gives nan on a row of padding
    for batch in batches:
        step = compare(model, batch, flat=flat)
        assert step.first == 2
        assert step.rows == SHARED
        assert step.embedded == [B]
    # As many tokens as rows: nothing [T, ...] is taken for rows.
    compare(model, make_batch((9, 7, 8)), flat=flat)


def test_falcon_with_alibi(make_remix, make_batch, compare, fp64_default):
    model = make_remix(make_tiny("falcon", alibi=True), layers_to_transform=[2, 3])
    assert compare(model, make_batch()).rows == SHARED


def test_bloom_if_it_were_allowed(make_remix, make_batch, compare, fp64_default, monkeypatch):
    """Its blocks get alibi [c B heads, 1, T], which is left whole, with all the rest."""
    monkeypatch.setattr(prefix, "MODEL_TYPES", {"bloom"})
    model = make_remix(make_tiny("bloom", n_head=4, n_layer=4), layers_to_transform=[2, 3])
    step = compare(model, make_batch())
    assert (step.first, step.rows) == (2, UNSHARED)


def test_unknown_type(model, make_batch, compare):
    model.config.model_type = "novel"
    step = compare(model, make_batch())
    assert (step.first, step.rows) == (0, UNSHARED)


# What is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", [dict, left_padded], ids=["right", "left"])
def test_checkpointing(kind, pad, model, make_batch, compare, checkpointing):
    """The backward pass runs after the context: each block once more, on the same rows."""
    step = compare(checkpointing(model, kind), pad(make_batch()))
    assert step.first == 2
    assert step.rows == SHARED
    # Below the first block that needs one, nothing needs a gradient but the embedding's output.
    assert step.rows_in_backward == ([] if kind == "off" else SHARED[::-1])


def test_gradients_below_the_first_routed_block(make_remix, make_batch, compare, fp64_default):
    """Embedding (tied) and prefix learn the same; GPT-2's norms are fp64 throughout."""
    model = make_remix(make_tiny("gpt2"), layers_to_transform=[2, 3])
    blocks = decoder_blocks(model)
    trained = [model.get_input_embeddings().weight, *blocks[0].parameters()]
    trained += blocks[1].parameters()
    for parameter in trained:
        parameter.requires_grad_()
    step = compare(model, make_batch())
    assert step.rows == SHARED
    assert sum("wte" in name or ".h.0." in name for name in step.grads) > 8


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(attention, make_llama, make_remix, make_batch, compare):
    base = make_llama(layers=4, attn_implementation=attention)
    assert base.config._attn_implementation == attention
    step = compare(make_remix(base, layers_to_transform=[2, 3]), make_batch())
    assert step.rows == SHARED


def test_masks_and_positions(model, make_batch, compare):
    """Given by the user for every folded row, for all of them at once, or not at all."""
    batch = make_batch()
    tokens = batch["input_ids"].shape[1]
    positions = torch.arange(tokens).expand(B * C, tokens)
    causal = torch.ones(B * C, 1, tokens, tokens, dtype=torch.bool).tril()
    for options in (
        {"position_ids": positions + 1},
        {"position_ids": positions[:1]},
        {"attention_mask": None},
        {"attention_mask": causal},
        {"attention_mask": causal[:1]},
    ):
        assert compare(model, batch, **options).rows == SHARED, list(options)


def test_embeddings_given(model, make_batch, compare):
    batch = make_batch()
    embedded = model.get_input_embeddings()(torch.cat([batch["input_ids"]] * C)).detach()
    step = compare(model, batch, input_ids=None, inputs_embeds=embedded)
    assert (step.rows, step.embedded) == (SHARED, [])


def test_ddp(model, make_batch, compare, take_step, assert_same, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.get_input_embeddings = model.get_input_embeddings
        step = compare(wrapped, make_batch())
        assert (step.first, step.rows) == (2, SHARED)
    finally:
        torch.distributed.destroy_process_group()


def test_a_bare_model(make_llama, make_batch, compare):
    """RoutedLoRALinear modules put into a model by hand."""
    model = make_llama(layers=4)
    options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
    up = model.model.layers[3].mlp.up_proj
    model.requires_grad_(False).model.layers[3].mlp.up_proj = RoutedLoRALinear(up, **options)
    step = compare(model, make_batch())
    assert (step.first, step.rows) == (3, [B, B, B, B * C])


# Which sites -------------------------------------------------------------------------------------


def test_first_block_routed(make_remix, make_llama, make_batch, compare):
    step = compare(make_remix(make_llama(layers=4)), make_batch())
    assert (step.first, step.rows) == (0, UNSHARED)


def test_routed_head(make_remix, make_llama, make_batch, compare):
    targets = r".*layers\.[23]\.mlp\.up_proj|.*lm_head"
    model = make_remix(make_llama(layers=4, tie_word_embeddings=False), target_modules=targets)
    assert any("lm_head" in name for name in find_sites(model))
    step = compare(model, make_batch())
    assert (step.first, step.rows) == (2, SHARED)


def yielded(model, names, fold=None) -> int:
    with shared_prefix(model, names, fold or Fold()) as first:
        return first


def test_sites_elsewhere(model):
    names = list(find_sites(model))
    assert yielded(model, names) == 2
    assert yielded(model, []) == 0
    assert yielded(model, [*names, "base_model.model.model.embed_tokens"]) == 0
    assert yielded(model, ["base_model.model.lm_head"]) == 0
    assert yielded(model, [f"{name}.default" for name in names]) == 2  # as several adapters have it
    both = nn.ModuleDict({"all": nn.ModuleList([model, nn.Linear(3, 3)])})
    assert yielded(both, [f"all.0.{name}" for name in names]) == 0


def test_plain_modules():
    model = nn.Sequential(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    assert yielded(model, ["0.1"]) == 0
    assert yielded(model[0], ["1"]) == 0
    assert yielded(nn.Linear(3, 3), [""]) == 0


def test_without_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    monkeypatch.setitem(sys.modules, "transformers.modeling_layers", None)
    assert yielded(nn.Sequential(nn.ModuleList([nn.Linear(3, 3)])), ["0.0"]) == 0


def test_a_block_that_may_be_skipped(make_remix, fp64_default):
    model = make_remix(make_tiny("opt", layerdrop=0.1), layers_to_transform=[2, 3])
    assert yielded(model, list(find_sites(model))) == 0


class Other(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def test_blocks_of_another_class(model, make_batch, compare, checkpointing):
    """A model checkpoints them itself, around their `__call__`."""
    layers = model.base_model.model.model.layers
    for index, block in enumerate(layers):
        layers[index] = Other(block)
    step = compare(model, make_batch())
    assert (step.first, step.rows) == (2, SHARED)
    assert yielded(checkpointing(model, "reentrant"), list(find_sites(model))) == 0


def test_a_block_that_comes_twice(make_llama, make_remix, make_batch, compare):
    """Block 0 again, after a routed one: the copies differ there."""
    base = make_llama(layers=2)
    base.model.layers.extend(list(base.model.layers))
    base.config.num_hidden_layers = 4
    model = make_remix(base, layers_to_transform=[1], target_modules=["down_proj"])
    assert len(find_sites(model)) == 1
    hidden = []
    hook = base.model.layers[0].register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    with sample_routing(model, num_selections=C, seed=0) as state:
        batch = state.expand(make_batch())
        with shared_prefix(model, list(find_sites(model)), Fold()) as first, torch.no_grad():
            model(**batch, use_cache=False)
    hook.remove()
    assert first == 1
    assert [len(h) for h in hidden] == [B, B * C]


# Which passes ------------------------------------------------------------------------------------


@pytest.fixture
def rows_of(model, make_batch) -> Callable[..., list[int]]:
    """rows_of(rows=B * C, inputs=B, fold=Fold(), **of the model): rows that the blocks saw."""

    def run(rows=B * C, inputs=B, fold=None, **kwargs) -> list[int]:
        seen = []
        hooks = [
            block.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
            for block in decoder_blocks(model)
        ]
        ids = torch.cat([make_batch()["input_ids"][:inputs]] * C)[:rows]
        with torch.no_grad():
            want = model(input_ids=ids, **kwargs)
            seen.clear()
            with shared_prefix(model, list(find_sites(model)), fold or Fold()):
                got = model(input_ids=ids, **kwargs)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(got.logits, want.logits)
        for name in ("hidden_states", "attentions"):
            for one, other in itertools.zip_longest(got.get(name) or (), want.get(name) or ()):
                torch.testing.assert_close(one, other)
        return seen

    return run


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_passes_that_return_every_block(name, model, rows_of):
    model.base_model.model.set_attn_implementation("eager")
    assert rows_of(use_cache=False, **{name: False}) == SHARED
    assert rows_of(use_cache=False, **{name: True}) == UNSHARED
    setattr(model.config, name, True)
    assert rows_of(use_cache=False) == UNSHARED


def test_other_passes(rows_of):
    assert rows_of(use_cache=False) == SHARED
    assert rows_of(use_cache=True) == UNSHARED
    assert rows_of(rows=B, use_cache=False) == [B] * 4
    assert rows_of(rows=1, use_cache=False) == [1] * 4
    assert rows_of(fold=Fold(1), use_cache=False) == UNSHARED
    assert rows_of(rows=B, fold=Fold(1), use_cache=False) == [B] * 4
    assert rows_of(fold=Fold(C, None), use_cache=False) == UNSHARED
    assert rows_of(fold=Fold(C, 2), use_cache=False) == UNSHARED
    assert rows_of(inputs=1, fold=Fold(C, 1), use_cache=False) == [1, 1, C, C]


def test_one_selection_copies_nothing(model, make_batch):
    passed = []
    blocks = decoder_blocks(model)
    blocks[1].register_forward_hook(lambda m, args, output: passed.append(output))
    blocks[2].register_forward_pre_hook(lambda m, args: passed.append(args[0]))
    with shared_prefix(model, list(find_sites(model)), Fold(1)), torch.no_grad():
        model(input_ids=make_batch()["input_ids"], use_cache=False)
    assert passed[0] is passed[1]


class Echo(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


def test_what_a_block_is_given(model):
    """Cut all of it, or nothing."""
    decoder = model.base_model.model.model
    echo = decoder.layers[0] = Echo()
    decoder.forward = lambda *args, **kwargs: echo(*args, **kwargs)
    rows = torch.arange(B * C)[:, None]
    h = rows[..., None].expand(B * C, 4, 32)
    with shared_prefix(model, list(find_sites(model)), Fold()):
        args, kwargs = decoder(h, rows, [rows, (rows, 1)], mask=rows, one=rows[:1], name="a")
        assert torch.equal(args[0], h[:B])
        cut = [args[1], args[2][0], args[2][1][0], kwargs["mask"]]
        assert all(torch.equal(tensor, rows[:B]) for tensor in cut)
        assert (args[2][1][1], kwargs["one"].shape, kwargs["name"]) == (1, (1, 1), "a")
        for hidden in (h[0], h[:B], h[:, 0], h[..., :16], h[:, None]):
            assert decoder(hidden)[0][0] is hidden
        for other in (rows[:, 0], rows[:2], len, [[len]], {}):
            args, kwargs = decoder(h, other=other)
            assert (len(args[0]), kwargs["other"]) == (B * C, other)
        assert decoder(hidden_states=h)[1]["hidden_states"] is h
        assert decoder() == ((), {})


def test_what_the_embedding_is_given(model):
    embedding = model.get_input_embeddings()
    ids = torch.arange(B * C)[:, None]
    with shared_prefix(model, list(find_sites(model)), Fold()):
        assert torch.equal(embedding(ids), embedding.weight[ids[:B]].repeat(C, 1, 1))
        assert torch.equal(embedding(input=ids), embedding.weight[ids])
        assert torch.equal(embedding(ids[:, 0]), embedding.weight[ids[:, 0]])


def test_replicas(model):
    """nn.DataParallel makes them of the class that a module has."""
    with shared_prefix(model, list(find_sites(model)), Fold()):
        embedding = model.get_input_embeddings()
        replica = embedding._replicate_for_data_parallel()
        replica.weight = embedding.weight
        assert replica(torch.zeros(B * C, 2, dtype=torch.long)).shape == (B * C, 2, 32)


def test_passes_of_one_context(model, make_batch):
    """The fold is read anew at each pass, one that raises included."""
    fold, seen = Fold(), []
    for block in decoder_blocks(model):
        block.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    ids = torch.cat([make_batch()["input_ids"]] * C)
    failing = model.base_model.model.model.layers[1].mlp
    with shared_prefix(model, list(find_sites(model)), fold), torch.no_grad():
        want = model(input_ids=ids[: 2 * B], use_cache=False).logits
        assert seen == [2 * B] * 4
        seen.clear()
        hook = failing.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids, use_cache=False)
        hook.remove()
        seen.clear()
        decoder_blocks(model)[2](
            torch.zeros(B, 4, 32).double(),
            position_embeddings=(torch.ones(1, 4, 8).double(), torch.zeros(1, 4, 8).double()),
        )
        assert seen == [B]  # the failed pass is over
        seen.clear()
        fold.pass_selections = 2
        got = model(input_ids=ids[: 2 * B], use_cache=False).logits
        assert seen == [B, B, 2 * B, 2 * B]
    torch.testing.assert_close(got, want)


def test_a_whole_model_recomputed(model, make_batch):
    """Inside a backward pass nothing is shared: this is not the pass that the fold describes."""
    ids = torch.cat([make_batch()["input_ids"]] * C)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    seen, grads = [], []
    for block in decoder_blocks(model):
        block.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    for names in ([], list(find_sites(model))):
        seen.clear()
        with shared_prefix(model, names, Fold()):
            run = lambda h: model(inputs_embeds=h, use_cache=False).logits  # noqa: E731
            checkpoint(run, embedded, use_reentrant=True).square().sum().backward()
        grads.append(embedded.grad)
        embedded.grad = None
    assert seen == SHARED + UNSHARED
    torch.testing.assert_close(*grads)


# What is left behind -----------------------------------------------------------------------------


def test_classes(model):
    """Inside a block is still of its class; after the context, or an exception, exactly so."""
    before = {name: type(module) for name, module in model.named_modules()}
    names = list(find_sites(model))
    with pytest.raises(ZeroDivisionError), shared_prefix(model, names, Fold()):
        changed = [
            name for name, module in model.named_modules() if type(module) is not before[name]
        ]
        assert {name.removeprefix("base_model.model.model") for name in changed} == {
            "", ".embed_tokens", ".layers.0", ".layers.1", ".layers.2",
        }  # fmt: skip
        for name in changed:
            cls = type(model.get_submodule(name))
            assert issubclass(cls, before[name])
            assert str(cls) == str(before[name])
            assert cls.__name__ == before[name].__name__
        raise ZeroDivisionError
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_same_classes_every_time(model):
    names, classes = list(find_sites(model)), []
    for _ in range(2):
        with shared_prefix(model, names, Fold()):
            classes.append({type(module) for module in model.modules()})
    assert classes[0] == classes[1]


def test_contexts_within_one_another(model, make_batch, compare):
    names = list(find_sites(model))
    with shared_prefix(model, names, Fold()) as outer:
        assert (outer, yielded(model, names)) == (2, 0)
        assert yielded(model, names) == 0
    assert yielded(model, names) == 2


def test_copies_and_pickles(model, make_batch):
    ids = torch.cat([make_batch()["input_ids"]] * C)
    decoder = model.base_model.model.model
    with shared_prefix(model, list(find_sites(model)), Fold()), torch.no_grad():
        for copied in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
            assert type(copied) is LlamaModel
            seen = []
            for block in copied.layers:
                assert type(block) is type(copied.layers[3])
                block.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))  # noqa: B023
            got = copied(input_ids=ids, use_cache=False).last_hidden_state
            assert seen == UNSHARED
            want = decoder(input_ids=ids, use_cache=False).last_hidden_state
            torch.testing.assert_close(got, want)


# torch.compile -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_models_are_not_shared(model, fresh_compiler):
    names = list(find_sites(model))
    compiled = torch.compile(model, backend="eager")
    assert yielded(compiled, [f"_orig_mod.{name}" for name in names]) == 0
    decoder_blocks(model)[1].compile(backend="eager")
    assert yielded(model, names) == 0


@pytest.mark.slow
def test_a_compiled_pass_of_a_model(
    make_llama, make_remix, make_batch, take_step, assert_same, fresh_compiler
):
    """torch.compile(model) leaves no trace on model: while compiling, nothing is shared."""
    model = make_remix(make_llama(), layers_to_transform=[1], target_modules=["up_proj"])
    want = take_step(model, make_batch(), False)
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for _ in range(3):
        got = take_step(model, make_batch(), True, run=compiled)
        assert got.first == 1
        assert_same(got.logits, want.logits, 1e-10)
        assert_same(got.grads, want.grads, 1e-10)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2]  # the second may compile what the first left
