"""Saving and loading in PEFT's own files: bit-equal, safetensors only, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

from remix_model import ReMixConfig, export_static_lora, force_selection

SHAPES = {
    "gate_proj": (32, 48),
    "up_proj": (32, 48),
    "down_proj": (48, 32),
}


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture
def base_folder(make_llama, tmp_path):
    folder = tmp_path / "base"
    make_llama(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def make_base(base_folder):
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture
def saved(make_base, make_remix, make_batch, tmp_path):
    """(folder of a saved adapter, its logits on a batch, the batch)."""
    model, batch = make_remix(make_base()).eval(), make_batch()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder, logits(model, batch), batch


# A good adapter -------------------------------------------------------------------------------


def test_files_and_keys(saved):
    folder, _, _ = saved
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    want = {}
    for layer in range(2):
        for name, (inputs, outputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.mlp.{name}.remix_"
            want[f"{prefix}lora_A"] = (4, 2, inputs)
            want[f"{prefix}lora_B"] = (4, outputs, 2)
            want[f"{prefix}router"] = (4, inputs)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == want


def test_load_is_bit_equal(saved, make_base):
    folder, want, batch = saved
    model = PeftModel.from_pretrained(make_base(), folder).eval()
    assert torch.equal(logits(model, batch), want)
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(make_base(), batch))


def test_auto_model_finds_the_base(saved):
    folder, want, batch = saved
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(model, batch), want)


def test_trainable_again(saved, make_base, sampled_loss, take_grads):
    folder, _, batch = saved
    model = PeftModel.from_pretrained(make_base(), folder, is_trainable=True).train()
    sampled_loss(model, batch)[0].backward()
    assert all(grad.any() for grad in take_grads(model).values())


def test_second_save_is_byte_equal(saved, make_base, tmp_path):
    folder, _, _ = saved
    PeftModel.from_pretrained(make_base(), folder).save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_low_cpu_memory_loading(saved, make_base):
    """Layers made on the meta device, then filled from the file."""
    folder, want, batch = saved
    model = PeftModel.from_pretrained(make_base(), folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(model, batch), want)


def test_several_adapters(saved, make_base, make_remix, make_batch, tmp_path):
    folder, want, batch = saved
    model = make_remix(make_base(), seed=9).eval()
    other = logits(model, batch)
    model.load_adapter(folder, "second")
    assert torch.equal(logits(model, batch), other)
    model.set_adapter("second")
    assert torch.equal(logits(model.eval(), batch), want)
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(make_base(), tmp_path / "both" / "second").eval()
    assert torch.equal(logits(again, batch), want)


def test_everything_trained_is_saved(make_base, make_remix, make_batch, tmp_path):
    """modules_to_save and trainable tokens travel with the adapter."""
    batch = make_batch()
    tokens = batch["input_ids"][0, :2].tolist()
    model = make_remix(make_base(), modules_to_save=["lm_head"], trainable_token_indices=tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    want = logits(model.eval(), batch)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, batch), want)


def test_biases_are_saved(make_llama, make_remix, make_batch, tmp_path):
    make = lambda: make_llama(dtype=torch.float32, mlp_bias=True)  # noqa: E731
    model, batch = make_remix(make(), bias="remix_only"), make_batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in name:
                parameter.add_(1.0)
    want = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval(), batch), want)


def test_model_card_says_how_to_load(saved, make_base):
    folder, _, _ = saved
    card = (folder / "README.md").read_text()
    assert "import remix_model" in card
    assert card.count("## Loading this adapter") == 1
    PeftModel.from_pretrained(make_base(), folder).save_pretrained(folder)
    assert (folder / "README.md").read_text().count("## Loading this adapter") == 1


def test_model_card_of_other_methods_is_left_alone(make_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_llama(), LoraConfig()).save_pretrained(tmp_path)
    assert "remix" not in (tmp_path / "README.md").read_text().lower()


def test_a_fresh_process_needs_only_the_import(saved, make_base, random_selections, tmp_path):
    """What the model card says, run as written. A LoRA exported before needs not even that."""
    folder, want, batch = saved
    model = PeftModel.from_pretrained(make_base(), folder).eval()
    index = export_static_lora(model, random_selections(model), tmp_path / "lora")
    with force_selection(model, {name: torch.tensor(experts) for name, experts in index.items()}):
        want_of_lora = logits(model, batch)
    card = (folder / "README.md").read_text()
    code = card.split("```python")[-1].split("```")[0]
    code = code.replace('"path/or/hub-id/of/this/adapter"', repr(str(folder)))
    torch.save({k: batch[k] for k in ("input_ids", "attention_mask")}, tmp_path / "batch.pt")
    run = "model.eval()(**torch.load('batch.pt')).logits"
    code = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM
torch.set_grad_enabled(False)
model = AutoPeftModelForCausalLM.from_pretrained("lora").merge_and_unload()
torch.save({run}, "lora.pt")
assert not any(name.startswith("remix") for name in sys.modules)
{code}
torch.save({run}, "adapter.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    for name, expected in (("lora", want_of_lora), ("adapter", want)):
        got = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# A bad one ------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Apply `change` to the saved tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.1.mlp.up_proj.remix_"


def test_truncated_file(saved, make_base):
    folder, _, _ = saved
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 8, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*truncated or damaged"):
            PeftModel.from_pretrained(make_base(), folder)


@pytest.mark.parametrize("position", [0, 7, 8, 20])
def test_flipped_header(position, saved, make_base):
    folder, _, _ = saved
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*truncated or damaged"):
        PeftModel.from_pretrained(make_base(), folder)


def pickled(folder):
    """Turn the adapter's weights into PEFT's other format."""
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()
    return folder


@pytest.mark.parametrize(
    "how", ["from_pretrained", "with-config", "auto", "new-name", "same-name", "subfolder"]
)
def test_pickles_are_refused(how, saved, make_base, make_remix):
    folder, _, _ = saved
    pickled(folder)
    base = make_base()
    config = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": list(SHAPES)}
    calls = {
        "from_pretrained": lambda: PeftModel.from_pretrained(base, folder),
        "with-config": lambda: PeftModel.from_pretrained(
            base, folder, config=ReMixConfig(**config)
        ),
        "auto": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        "new-name": lambda: make_remix(base).load_adapter(folder, "second"),
        "same-name": lambda: make_remix(base).load_adapter(folder, "default"),
        "subfolder": lambda: PeftModel.from_pretrained(base, folder.parent, subfolder=folder.name),
    }
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
        calls[how]()


def test_a_safetensors_file_is_preferred_to_a_pickle(saved, make_base):
    folder, want, batch = saved
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    model = PeftModel.from_pretrained(make_base(), folder).eval()
    assert torch.equal(logits(model, batch), want)


def test_other_methods_may_still_be_pickled(make_base, make_llama, tmp_path):
    """The refusal is ReMix's own."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(make_base(), LoraConfig()).save_pretrained(tmp_path / "lora")
    PeftModel.from_pretrained(make_base(), pickled(tmp_path / "lora"))


def test_missing_tensor(saved, make_base):
    folder, _, _ = saved
    rewrite(folder, lambda tensors: tensors.pop(f"{KEY}router"))
    with pytest.raises(ValueError, match=r"lacks .*layers\.1\.mlp\.up_proj\.remix_router"):
        PeftModel.from_pretrained(make_base(), folder)


def test_unknown_tensor(saved, make_base):
    folder, _, _ = saved
    rewrite(folder, lambda tensors: tensors.update({f"{KEY}lora_C": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"unknown .*remix_lora_C"):
        PeftModel.from_pretrained(make_base(), folder)


def test_misshapen_tensor(saved, make_base):
    folder, _, _ = saved
    rewrite(folder, lambda tensors: tensors.update({f"{KEY}lora_B": torch.zeros(4, 48, 3)}))
    with pytest.raises(ValueError, match=r"up_proj\.remix_lora_B.*\[4, 48, 3\].*\[4, 48, 2\]"):
        PeftModel.from_pretrained(make_base(), folder)


@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 48}, {"intermediate_size": 64}, {"layers": 3}, {"layers": 1}],
    ids=str,
)
def test_adapter_of_another_base(other, saved, make_llama):
    """The error names the base that the adapter was trained for."""
    folder, _, _ = saved
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.raises(ValueError, match=r"the adapter was trained for base model") as error:
        PeftModel.from_pretrained(make_llama(dtype=torch.float32, **other), folder)
    assert base in str(error.value)


def test_a_base_of_another_name_warns(saved, make_base, tmp_path):
    """All shapes fit, so only the name tells; both are in the warning."""
    folder, want, batch = saved
    make_base().save_pretrained(tmp_path / "twin")
    twin = type(make_base()).from_pretrained(tmp_path / "twin")
    with pytest.warns(UserWarning, match=r"trained on '.*base' and is loaded on '.*twin'"):
        model = PeftModel.from_pretrained(twin, folder).eval()
    assert torch.equal(logits(model, batch), want)


def test_a_base_of_the_same_name_does_not_warn(saved, make_base, tmp_path):
    """The very folder, or its like in another place."""
    folder, _, _ = saved
    make_base().save_pretrained(tmp_path / "elsewhere" / "base")
    moved = type(make_base()).from_pretrained(tmp_path / "elsewhere" / "base")
    for base in (make_base(), moved):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            PeftModel.from_pretrained(base, folder)


def test_configuration_that_does_not_fit_the_weights(saved, make_base):
    """Of the right base: nobody is sent to look for another one."""
    folder, _, _ = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 5}))
    message = r"\[4, 2, \d+\].*\[5, 2, \d+\].*config\.json and its weights do not belong together"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(make_base(), folder)


@pytest.mark.parametrize("text", ["{", "", '{"peft_type": "REMIX", "top_k": 99}'])
def test_damaged_configuration(text, saved, make_base):
    folder, _, _ = saved
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(make_base(), folder)


def test_weights_are_missing(saved, make_base):
    folder, _, _ = saved
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        PeftModel.from_pretrained(make_base(), folder)
