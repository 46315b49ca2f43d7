"""ReMix: mixtures of LoRAs whose routers are trained by reinforcement learning (arXiv 2603.10160).

Importing this package registers the PEFT method "REMIX". The plain parts (`RoutedLoRALinear`,
`sample_routing`, `rloo_surrogate`, ...) need neither PEFT nor transformers; the rest is imported
when it is first asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from remix_model.layer import RoutedLoRALinear
from remix_model.rloo import rloo_surrogate
from remix_model.routers import Router, register_router
from remix_model.routing import force_selection, sample_routing
from remix_model.stats import RoutingStats, record_routing

__version__ = "0.1.0"

_LAZY = {
    "AdapterTrainer": "remix_model.adapter_trainer",
    "ReMixConfig": "remix_model.tuner",
    "ReMixRuntimeConfig": "remix_model.tuner",
    "ReMixModel": "remix_model.tuner",
    "ReMixTrainer": "remix_model.trainer",
    "ReMixTrainingArguments": "remix_model.training_args",
    "ReMixSFTTrainer": "remix_model.sft",
    "ReMixSFTConfig": "remix_model.sft",
    "export_static_lora": "remix_model.export",
    "from_lora_adapters": "remix_model.from_lora",
    "evaluate_tasks": "remix_model.tasks",
    "token_losses": "remix_model.losses",
    "load_model": "remix_model.models",
    "load_tokenizer": "remix_model.models",
}

__all__ = [
    "RoutedLoRALinear",
    "Router",
    "RoutingStats",
    "force_selection",
    "record_routing",
    "register_router",
    "rloo_surrogate",
    "sample_routing",
    *sorted(_LAZY),
]

if find_spec("peft") is not None:
    from remix_model.tuner import register as _register

    _register()


def __getattr__(name: str) -> Any:
    """Import a heavy part when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
