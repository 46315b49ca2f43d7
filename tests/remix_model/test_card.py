"""The model card: how to load, what was recorded, what people wrote around it stays."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from remix_model import ReMixConfig, Router, record_routing
from remix_model.card import CARD_HEADING, write_model_card
from remix_model.routers import ROUTERS


def card_of(folder):
    return (folder / "README.md").read_text()


def test_a_new_card_is_ours(make_llama, make_remix, tmp_path):
    """PEFT's metadata and versions, and none of its blanks."""
    make_remix(make_llama(), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.startswith("---\n") and "library_name: peft" in card
    assert "More Information Needed" not in card
    assert card.index("import remix_model") < card.index(
        "from peft import AutoPeftModelForCausalLM"
    )
    assert "KeyError: 'REMIX'" in card
    assert "2 of 4 LoRAs of rank 2" in card and "down_proj, gate_proj, up_proj" in card
    assert "### Framework versions\n\n- PEFT" in card
    assert "## Routing" not in card and "## Evaluation" not in card


def test_recorded_routing_and_results(make_llama, make_remix, make_batch, tmp_path):
    model = make_remix(make_llama())
    with record_routing(model) as recorder, torch.no_grad():
        model(input_ids=make_batch()["input_ids"])
    model.save_pretrained(tmp_path)
    layer = recorder.stats().layers[1]
    shares = " ".join(f"{100 * share:.0f}" for share in layer.expert_share)
    row = f"| `model.layers.0.mlp.up_proj` | {shares} | {layer.share_ess:.1f} |"
    assert row in card_of(tmp_path)
    assert f"over {layer.tokens} tokens" in card_of(tmp_path)
    assert card_of(tmp_path).count("_proj` |") == 6
    write_model_card(model, tmp_path, evaluation={"loss": 1.25}, training={"data": "a|b\nc"})
    card = card_of(tmp_path)
    assert "## Evaluation\n\n|  |  |\n| --- | --- |\n| loss | 1.25 |" in card
    assert "| data | a\\|b c |" in card
    assert card.count("## Routing") == 1 and row in card


def test_saving_again_changes_only_our_part(make_llama, make_remix, tmp_path):
    model = make_remix(make_llama())
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path, evaluation={"loss": 1.25})
    edited = card_of(tmp_path).replace("# ReMix adapter\n", "# My model\n\nAll about it.\n")
    (tmp_path / "README.md").write_text(edited + "\nThe end.\n")
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "# My model\n\nAll about it.\n" in card and card.endswith("The end.\n")
    assert card.count(CARD_HEADING) == 1
    assert "## Evaluation" not in card, "the weights may be others now"
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path) == card


def test_a_card_of_somebody_elses(make_llama, make_remix, tmp_path):
    """There before the adapter was: ours comes after it."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    make_remix(make_llama()).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.index("# Mine") < card.index(CARD_HEADING)
    assert "license: mit" in card


def test_several_adapters_and_other_methods(make_llama, make_remix, tmp_path):
    model = make_remix(make_llama())
    model.add_adapter("second", ReMixConfig(r=3, num_experts=5, top_k=1))
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "`default`: every token takes 2 of 4" in card
    assert "`second`: every token takes 1 of 5 LoRAs of rank 3" in card
    model.base_model.disable_adapter_layers()
    model.save_pretrained(tmp_path / "disabled")
    assert isinstance(model, PeftModel)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("remix", ["with a\ntrained router", "one router a linear", "`remix export` writes"]),
        ("uniform", ["router type `uniform`", "drawn at random for", "`remix export` writes"]),
        ("mixlora", ["type `mixlora`", "one router of type `mixlora` a linear", "has no plain"]),
        ("mixlora_block", ["one router of type `mixlora_block` a block", "has no plain LoRA"]),
        ("mine", ["module that registers it", "one router of type `mine` a linear"]),
    ],
)
def test_a_card_says_what_chooses(kind, says, make_llama, make_remix, tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine", type("Mine", (Router,), {"name": "mine"}))
    make_remix(make_llama(), router_type=kind).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert [text for text in says if text not in card] == []
    assert ("module that registers it" in card) == (kind == "mine")
    assert ("trained router" in card) == (kind == "remix")
