"""Generation: the top k at every position, cached or not, in train mode or not."""

from __future__ import annotations

import pytest
import torch

from remix_model import sample_routing


@pytest.fixture
def prompts(make_batch):
    batch = make_batch((8, 8, 8))
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def generate(model, prompts, **options):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}
    output = model.generate(
        **prompts, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("kind", ["default", "k1", "all-linear"])
def test_cache_changes_nothing(kind, make_remix, prompts):
    config = {"k1": {"top_k": 1}, "all-linear": {"target_modules": "all-linear"}}.get(kind, {})
    model = make_remix(**config).eval()
    tokens, logits = generate(model, prompts, use_cache=True)
    plain_tokens, plain_logits = generate(model, prompts, use_cache=False)
    assert tokens.shape == (3, 20)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-9, atol=1e-9)
    # And both are what one pass over the finished text says.
    with torch.no_grad():
        whole = model(input_ids=tokens).logits[:, 7:-1].transpose(0, 1)
    torch.testing.assert_close(logits.to(whole.dtype), whole, rtol=1e-5, atol=1e-5)


def test_left_padding_changes_nothing(make_remix, prompts):
    model = make_remix().eval()
    want, _ = generate(model, prompts)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    pad = torch.zeros(3, 5, dtype=ids.dtype)
    padded = {"input_ids": torch.cat((pad, ids), 1), "attention_mask": torch.cat((pad, mask), 1)}
    got, _ = generate(model, padded)
    assert torch.equal(got[:, 5:], want)


def test_train_mode_is_top_k(make_remix, prompts):
    model = make_remix()
    want, _ = generate(model.eval(), prompts)
    for _ in range(2):
        got, _ = generate(model.train(), prompts)
        assert torch.equal(got, want)
    assert model.training


def test_adapters_matter_and_can_be_switched_off(make_llama, make_remix, prompts):
    model = make_remix().eval()
    adapted, _ = generate(model, prompts)
    base, _ = generate(make_llama(), prompts)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(generate(model, prompts)[0], base)


def test_generating_while_sampling_says_what_to_do(make_remix, prompts):
    """A cache's steps are not the folded batch: no silent draw."""
    model = make_remix().eval()
    with (
        sample_routing(model, num_selections=2, seed=0) as routing,
        pytest.raises((ValueError, RuntimeError), match=r"routing\.expand"),
    ):
        generate(model, prompts)
    del routing


def test_beam_search_runs(make_remix, prompts):
    model = make_remix().eval()
    tokens, _ = generate(model, prompts, num_beams=3)
    assert tokens.shape == (3, 20)
