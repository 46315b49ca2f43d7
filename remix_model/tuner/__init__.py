"""The PEFT method: config, layer and model, and their registration with PEFT."""

from remix_model.tuner.config import ReMixConfig, ReMixRuntimeConfig
from remix_model.tuner.layer import ReMixLayer
from remix_model.tuner.model import ReMixModel
from remix_model.tuner.registration import register

__all__ = ["ReMixConfig", "ReMixLayer", "ReMixModel", "ReMixRuntimeConfig", "register"]
