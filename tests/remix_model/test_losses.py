"""`token_losses`: transformers' own loss by position, with logits only where labels are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remix_model import sample_routing, token_losses
from remix_model.losses import logits_at


def full_losses(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses, targets != -100


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("sizes", [(10, 7, 9), (4, 4), (2,)], ids=str)
def test_losses_are_those_of_the_full_logits(adapted, sizes, make_llama, make_remix, make_batch):
    model = make_remix().eval() if adapted else make_llama()
    batch = make_batch(sizes, prompt=1)
    with torch.no_grad():
        losses, mask = token_losses(model, batch)
        loss = float(model(**batch).loss)
    want, want_mask = full_losses(model, batch)
    assert losses.dtype == torch.float32
    assert torch.equal(mask, want_mask)
    assert not losses[~mask].any()
    torch.testing.assert_close(losses.double(), want * mask, rtol=1e-5, atol=1e-6)
    assert float(losses.sum() / mask.sum()) == pytest.approx(loss, rel=1e-5)


def test_gradients_are_those_of_the_full_logits(make_remix, make_batch, take_grads, assert_same):
    model, batch = make_remix().eval(), make_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    model(**batch).loss.backward()
    want = take_grads(model)
    losses, mask = token_losses(model, batch)
    (losses.sum() / mask.sum()).backward()
    assert_same(take_grads(model), want, 1e-6)


def test_the_head_sees_labelled_positions_only(make_llama, make_batch):
    model, batch = make_llama(), make_batch((10, 7, 9), prompt=3)
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    token_losses(model, batch)
    assert shapes == [(1, 7 + 4 + 6, 64)]
    hook.remove()
    assert not model.lm_head._forward_pre_hooks


def test_the_hook_goes_after_an_error(make_llama, make_batch):
    model, batch = make_llama(), make_batch()
    with pytest.raises(ValueError, match="input_ids"):
        token_losses(model, {"labels": batch["labels"]})
    assert not model.lm_head._forward_pre_hooks


def test_no_label_anywhere(make_remix, make_batch):
    """A batch whose labels are all -100 has no loss, and does not fail."""
    batch = make_batch()
    batch["labels"].fill_(-100)
    losses, mask = token_losses(make_remix().eval(), batch)
    assert not mask.any()
    assert not losses.any()


def test_what_models_do_to_their_logits_still_happens(make_batch):
    """Gemma 2 caps its logits after the head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        final_logit_softcapping=0.5,
    )
    model, batch = Gemma2ForCausalLM(config).double().eval(), make_batch()
    losses, mask = token_losses(model, batch)
    want, _ = full_losses(model, batch)
    torch.testing.assert_close(losses.double(), want * mask, rtol=1e-5, atol=1e-6)


def test_a_wrapped_model(make_remix, make_batch):
    """DDP and FSDP hide the model behind `.module`."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model, batch = make_remix().eval(), make_batch()
    for got, want in zip(
        token_losses(Wrapper(model), batch), token_losses(model, batch), strict=True
    ):
        assert torch.equal(got, want)


def test_a_head_kept_in_full_by_peft(make_remix, make_batch):
    model, batch = make_remix(modules_to_save=["lm_head"]).eval(), make_batch()
    losses, mask = token_losses(model, batch)
    want, _ = full_losses(model, batch)
    torch.testing.assert_close(losses.double(), want * mask, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_routed(make_remix, make_batch, sampled_loss, take_grads, assert_same):
    """It must see every position: a draw belongs to a position of the folded batch."""
    model, batch = make_remix(target_modules=["lm_head", "up_proj"]), make_batch((10, 10, 10))
    for row, prompt in enumerate((3, 1, 5)):
        batch["labels"][row] = batch["input_ids"][row]
        batch["labels"][row, :prompt] = -100  # 7 + 9 + 5 labels: not the same for every row
    with torch.no_grad():
        losses, mask = token_losses(model.eval(), batch)
    want, _ = full_losses(model, batch)
    torch.testing.assert_close(losses.double(), want * mask, rtol=1e-5, atol=1e-6)
    model.train()
    results = []
    for keep_mask in (True, False):
        if not keep_mask:
            del batch["attention_mask"]  # every token is real: as without a mask
        loss, routing = sampled_loss(model, batch)
        assert {calls[0].shape for calls in routing.selections.values()} == {(9, 10, 2)}
        loss.backward()
        results.append(take_grads(model))
    assert_same(*results)


def test_logits_at_any_positions(make_llama, make_batch):
    model, batch = make_llama(), make_batch((6, 6))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = True
    with torch.no_grad():
        full = model(input_ids=batch["input_ids"]).logits
        with logits_at(model, mask):
            some = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(some[0], full[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", [None, torch.ones(3, dtype=torch.long), "no"], ids=str)
def test_labels_missing(labels, make_llama, make_batch):
    batch = {**make_batch(), "labels": labels}
    with pytest.raises(ValueError, match=r"labels \[B, T\]"):
        token_losses(make_llama(), batch)


def test_a_sequence_longer_than_the_model(make_remix, make_batch):
    with pytest.raises(ValueError, match=r"65 tokens .* 64 positions"):
        token_losses(make_remix().eval(), make_batch((65,)))
    token_losses(make_remix().eval(), make_batch((64,)))


def test_a_model_without_a_head(make_llama, make_batch):
    with pytest.raises(ValueError, match="causal language model"):
        token_losses(make_llama().model, make_batch())


@pytest.fixture
def encoder_decoder(make_remix):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=64, decoder_start_token_id=0))
    return make_remix(base.double())


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft", "wrapped"])
def test_an_encoder_decoder(wrapped, encoder_decoder):
    """Its decoder has no shifted labels, and its encoder's rows are another sequence's."""
    model = nn.DataParallel(encoder_decoder) if wrapped else encoder_decoder
    ids = torch.randint(3, 64, (2, 7))
    message = r"is an encoder-decoder model; routers are trained in decoder-only"
    with pytest.raises(ValueError, match=message):
        token_losses(model, {"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match=message), sample_routing(model, 2, seed=0):
        pass
    for parameter in encoder_decoder.parameters():
        assert parameter.grad is None
    with torch.no_grad():  # it still runs
        assert encoder_decoder(input_ids=ids, labels=ids).loss.isfinite()
