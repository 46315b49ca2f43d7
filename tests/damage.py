"""Ways to damage a saved adapter, made from a seed; `DAMAGES` maps a name to a function."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Damage = Callable[[Path, random.Random], None]

DAMAGES: dict[str, Damage] = {}  # after these, loading must fail
HARMLESS: dict[str, Damage] = {}  # after these it may work, and then the numbers are finite


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def canary(folder: Path) -> Path:
    """The file that is there if a pickle of the folder was run."""
    return folder.parent / "canary"


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__] = function
    return function


def harmless(function: Damage) -> Damage:
    HARMLESS[function.__name__] = function
    return function


# Bytes of the weights


def _bytes(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Damage:
    def apply(folder: Path, rng: random.Random) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(bytearray(path.read_bytes()), rng))

    return apply


def _flip(data: bytearray, start: int, end: int, rng: random.Random) -> bytearray:
    data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return data


def _header(data: bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


DAMAGES |= {
    "cut": _bytes(lambda data, rng: data[: rng.randrange(len(data))]),
    "empty": _bytes(lambda data, rng: b""),
    "longer": _bytes(lambda data, rng: data + rng.randbytes(1 + rng.randrange(100))),
    "noise": _bytes(lambda data, rng: rng.randbytes(len(data))),
    "length": _bytes(lambda data, rng: _flip(data, 0, 8, rng)),
    "huge-header": _bytes(lambda data, rng: struct.pack("<Q", 2 ** rng.randrange(27, 64)) + data),
    "zeroed-header": _bytes(lambda data, rng: data[:8] + bytes(_header(data) - 8) + data),
}
HARMLESS |= {
    "header-bit": _bytes(lambda data, rng: _flip(data, 8, _header(data), rng)),
    "data-bit": _bytes(lambda data, rng: _flip(data, _header(data), len(data), rng)),
}


def _handmade(tensors: dict[str, Any]) -> Damage:
    """A safetensors file of four bytes of data under any header."""
    header = json.dumps(tensors).encode()
    return _bytes(lambda data, rng: struct.pack("<Q", len(header)) + header + b"data")


_A = "base_model.model.model.layers.0.mlp.up_proj.remix_lora_A"
for name, entry in {
    "claims-much": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]},
    "claims-more-bytes": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]},
    "negative": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    "backwards": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "overflow": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]},
    "unknown-dtype": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]},
    "no-shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "only-one": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
}.items():
    DAMAGES[name] = _handmade({_A: entry})
DAMAGES["no-tensors"] = _handmade({})


# Tensors


def _tensors(change: Callable[[dict[str, Any], str, random.Random], Any]) -> Damage:
    def apply(folder: Path, rng: random.Random) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, rng.choice(sorted(tensors)), rng)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _put(convert: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return _tensors(
        lambda tensors, name, rng: tensors.update({name: convert(tensors[name]).contiguous()})
    )


def _number(value: float) -> Damage:
    def put(tensors: dict[str, Any], name: str, rng: random.Random) -> None:
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value

    return _tensors(put)


def _more(*names: str) -> Damage:
    return _tensors(
        lambda tensors, name, rng: tensors.update({new: torch.zeros(2, 3) for new in names})
    )


_BASE = "base_model.model.model.layers.0."
DAMAGES |= {
    "transposed": _put(lambda t: t.mT if t.shape[-1] != t.shape[-2] else t[:1]),
    "flat": _put(lambda t: t.flatten()),
    "sliced": _put(lambda t: t[..., :-1]),
    "no-experts": _put(lambda t: t[:0]),
    "scalar": _put(lambda t: t.sum()),
    "one-more": _put(lambda t: torch.cat([t, t[:1]])),
    **{
        f"as-{dtype}": _put(lambda t, dtype=dtype: t.to(getattr(torch, dtype)))
        for dtype in ("int8", "int64", "bool", "float8_e4m3fn", "uint8", "int32")
    },
    "nan": _number(float("nan")),
    "inf": _number(float("inf")),
    "minus-inf": _number(float("-inf")),
    "missing": _tensors(lambda tensors, name, rng: tensors.pop(name)),
    "only-one-left": _tensors(
        lambda tensors, name, rng: [tensors.pop(n) for n in list(tensors) if n != name]
    ),
    "renamed": _tensors(lambda tensors, name, rng: tensors.update({f"{name}x": tensors.pop(name)})),
    "other-layer": _more(f"{_A.replace('layers.0', 'layers.7')}"),
    "unknown-part": _more(f"{_BASE}mlp.up_proj.remix_lora_C"),
    "base-weight": _more(f"{_BASE}mlp.up_proj.base_layer.weight"),
    "base-norm": _more(f"{_BASE}input_layernorm.weight"),
    "foreign-name": _more("../../../etc/passwd", "__class__", "😀" * 99),
}


# Files


@damage
def pickle_as_safetensors(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Canary(canary(folder))))


@damage
def torch_file_as_safetensors(folder: Path, rng: random.Random) -> None:
    torch.save({_A: Canary(canary(folder))}, folder / WEIGHTS)


@damage
def old_torch_file_as_safetensors(folder: Path, rng: random.Random) -> None:
    torch.save(Canary(canary(folder)), folder / WEIGHTS, _use_new_zipfile_serialization=False)


@damage
def pickle_alone(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary(folder))))


@damage
def torch_file_alone(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({_A: Canary(canary(folder))}, folder / "adapter_model.bin")


@damage
def pickle_as_configuration(folder: Path, rng: random.Random) -> None:
    (folder / CONFIG).write_bytes(pickle.dumps(Canary(canary(folder))))


@harmless
def pickles_beside(folder: Path, rng: random.Random) -> None:
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary(folder))))


@damage
def weights_are_a_folder(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@damage
def weights_are_a_pipe(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@damage
def weights_lead_nowhere(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")


@damage
def weights_are_a_device(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


@damage
def no_weights(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()


@damage
def no_configuration(folder: Path, rng: random.Random) -> None:
    (folder / CONFIG).unlink()


# The configuration's text


def _text(change: Callable[[str, random.Random], str | bytes]) -> Damage:
    def apply(folder: Path, rng: random.Random) -> None:
        changed = change((folder / CONFIG).read_text(), rng)
        (folder / CONFIG).write_bytes(changed.encode() if isinstance(changed, str) else changed)

    return apply


def _line(line: str) -> Damage:
    """One more line of JSON at the end of the object."""
    return _text(lambda text, rng: text.rstrip()[:-1] + f", {line}}}")


DAMAGES |= {
    "config-cut": _text(lambda text, rng: text[: rng.randrange(len(text) - 1)]),
    "config-empty": _text(lambda text, rng: ""),
    "config-null": _text(lambda text, rng: "null"),
    "config-list": _text(lambda text, rng: f"[{text}]"),
    "config-number": _text(lambda text, rng: "1e5"),
    "config-deep": _text(lambda text, rng: "[" * 10**5 + "]" * 10**5),
    "config-deep-field": _line(f'"router_kwargs": {"[" * 10**5}{"]" * 10**5}'),
    "config-big": _text(lambda text, rng: text + " " * 2**25),
    "config-not-utf8": _text(lambda text, rng: text.encode() + b"\xff\xfe"),
    "config-nul": _text(lambda text, rng: text.replace('"r"', '"\0"', 1)),
    "config-noise": _text(lambda text, rng: rng.randbytes(len(text))),
    "config-twice": _line('"r": 2'),
    "config-twice-apart": _line('"num_experts": 1000000000'),
    "config-nan": _line('"lora_alpha": NaN'),
    "config-nan-elsewhere": _line('"unknown": NaN'),
    "config-infinity": _line('"router_temperature": Infinity'),
    "config-digits": _line(f'"seed": {"9" * 10**4}'),
}
HARMLESS |= {
    "config-bit": _text(lambda text, rng: bytes(_flip(bytearray(text.encode()), 0, len(text), rng)))
}


# The configuration's fields


def field(name: str, value: Any) -> Damage:
    def apply(folder: Path, rng: random.Random) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, name: value}))

    return apply


_COUNTS = [10**9, 2**63, 10**30, 0, -1, "4", 2.5, None, True, [4], {"n": 4}]
_NUMBERS = [-1.0, "1", None, [1.0], 10**400, False]
_NAMES = [5, {"a": 1}, [["a"]], [None], "(", "nothing", ["../../etc/passwd"], []]
_FIELDS: dict[str, list[Any]] = {
    "num_experts": _COUNTS,
    "r": _COUNTS,
    "top_k": [10**9, 5, *_COUNTS[3:]],
    "lora_alpha": [0, *_NUMBERS],
    "lora_dropout": [2, 1.0, *_NUMBERS],
    "router_temperature": [0.0, *_NUMBERS],
    "router_init_range": _NUMBERS,
    "use_rslora": ["no", 1, None],
    "init_lora_weights": ["gaussian", None],
    "target_modules": _NAMES,
    "exclude_modules": [5, {"a": 1}, [["a"]], "(", ".*"],
    "layers_to_transform": [["x"], "x", [10**9], 10**400, -1, {"a": 1}],
    "layers_pattern": ["(", 5, "layers"],
    "modules_to_save": [5, [5], "../../x", [["a"]], ["q_proj"]],
    "trainable_token_indices": [[-1], [10**9], ["a"], {"a": "b"}, {"nowhere": [1]}, 5],
    "bias": ["everything", None, 1, ["none"]],
    "router_type": ["../../x", None, 5, ["remix"]],
    "router_kwargs": [{"n": 10**9}, 5, None, [1]],
    "router_sharing": ["galaxy", None],
    "routing_granularity": ["galaxy", 5],
    "task_type": ["EVIL", 5, ["CAUSAL_LM"]],
    "peft_type": ["NEW", None, 5, ["REMIX"], {"REMIX": 1}],
    "base_model_name_or_path": [5, ["a"], {"a": 1}],
    "revision": [5, {"a": 1}],
    "auto_mapping": [5, "os"],
    "inference_mode": ["no", 5],
}
DAMAGES |= {
    f"{name}={json.dumps(value)[:24]}": field(name, value)
    for name, values in _FIELDS.items()
    for value in values
}
HARMLESS |= {
    "unknown-key": field("from_the_future", {"a": [1]}),
    "runtime_config": field("runtime_config", {"backend": "evil"}),
    **{
        f"base={path[:20]!r}": field("base_model_name_or_path", path)
        for path in ("../../../etc/passwd", "/dev/zero", "a\0b", "x" * 10**5, "~root", "")
    },
    "import": field("auto_mapping", {"base_model_class": "system", "parent_library": "os"}),
}
