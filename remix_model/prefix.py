"""The shared prefix: decoder blocks below the first routed one run once for all selections.

A folded batch has c B rows, selection-major: row m B + b is input b under selection m. Up to the
first routed block the c copies of an input have equal hidden states, so rows [:B] stand for all:

    embedding    ids [c B, T] -> run on [:B], output repeated: the model makes masks for c B rows
    block 0      h [c B, T, d] -> h[:B], and so every other argument of c B rows
    block first  h [B, T, d] -> h.repeat(c, 1, 1); the other arguments as the model made them

This is done around a block's `__call__`, so outside activation checkpointing, which recomputes B
rows whenever the backward pass runs. Dropout in the prefix is drawn once for all c copies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from remix_model.architecture import is_compiled
from remix_model.delivery import in_backward

# Decoders whose blocks take h first, and tensors with rows first: tests/remix_model/test_prefix.py
# runs each. Not bloom: its alibi is [c B heads, 1, T].
MODEL_TYPES = frozenset({
    "arcee", "bart", "codegen", "cohere", "cohere2", "exaone4", "falcon", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite",
    "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "opt",
    "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "whisper",
    "xglm"})  # fmt: skip
_Call = Callable[..., Any]
_calls: dict[nn.Module, _Call] = {}  # where the calls of a redirected module go


class Fold(Protocol):
    """What is folded into a pass; read anew at each."""

    @property
    def batch_size(self) -> int | None:
        """B; None before it is known."""

    @property
    def pass_selections(self) -> int:
        """c, the selections in this pass."""


@contextmanager
def shared_prefix(model: nn.Module, site_names: Iterable[str], fold: Fold) -> Iterator[int]:
    """Inside, a pass of c B rows runs the decoder blocks below the first routed one on B rows.

    Nothing changes for models of other types, compiled ones, or ones routed from block 0 on; nor in
    a pass of other rows, with a cache, or that returns hidden states or attentions.

    Args:
        model: A model with routed layers, bare or wrapped by PEFT, DDP or FSDP.
        site_names: The routed modules, as `model.named_modules()` names them.
        fold: c and B.

    Yields:
        The number of decoder blocks that are shared; 0: none.
    """
    found = _find_blocks(model, list(site_names))
    if found is None:
        yield 0
        return
    decoder, embedding, blocks = found
    prefix = _Prefix(decoder.config, len(blocks) - 1, fold)
    calls: dict[nn.Module, _Call] = {decoder: prefix.decode, embedding: prefix.embed}
    calls |= {block: partial(prefix.run, index) for index, block in enumerate(blocks)}
    classes: dict[nn.Module, Any] = {module: type(module) for module in calls}
    _calls.update(calls)
    try:
        for module, cls in classes.items():
            module.__class__ = _redirecting(cls)
        yield prefix.first
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
            del _calls[module]


class _Prefix:
    """Where a pass is: on c B rows, or between block 0 and block `first` on B."""

    def __init__(self, config: Any, first: int, fold: Fold) -> None:
        self.config, self.first, self.fold = config, first, fold
        self.allowed = self.sharing = False

    def decode(self, call: _Call, /, *args: Any, **kwargs: Any) -> Any:
        """The whole decoder. What it returns of every block must have c B rows."""
        returned = ("output_hidden_states", "output_attentions")
        self.allowed = not any(kwargs.get(n) or getattr(self.config, n, False) for n in returned)
        try:
            return call(*args, **kwargs)
        finally:
            self.allowed = self.sharing = False

    def embed(self, call: _Call, /, *args: Any, **kwargs: Any) -> Any:
        """The embedding of ids [c B, T]."""
        if kwargs or len(args) != 1 or not self._is_folded(args[0], dim=2):
            return call(*args, **kwargs)
        return call(self._cut(args[0])).repeat(self.copies, 1, 1)

    def run(self, index: int, call: _Call, /, *args: Any, **kwargs: Any) -> Any:
        """Block `index`; its first argument is h [c B, T, hidden_size], or [B, ...] if shared."""
        if index == 0:
            self.sharing = (
                self.allowed
                and len(args) > 0
                and self._is_folded(args[0], dim=3)
                and args[0].shape[2] == self.config.hidden_size
                and self._is_plain([*args, *kwargs.values()])
            )
            self.allowed = False  # once in a pass: were block 0 run again, it would be on other h
        if not self.sharing:
            return call(*args, **kwargs)
        if index < self.first:
            return call(*self._cut(args), **{n: self._cut(value) for n, value in kwargs.items()})
        self.sharing = False
        return call(args[0].repeat(self.copies, 1, 1), *args[1:], **kwargs)

    def _is_folded(self, value: Any, dim: int) -> bool:
        """Whether value has c B rows, c > 1; notes c and c B."""
        if self.fold.batch_size is None or in_backward() or not isinstance(value, Tensor):
            return False
        self.copies = self.fold.pass_selections
        self.rows = self.copies * self.fold.batch_size
        return self.copies > 1 and value.dim() == dim and value.shape[0] == self.rows

    def _is_plain(self, value: Any) -> bool:
        """Whether _cut leaves nothing of c B rows: a cache would, or a mask that is a function."""
        if type(value) in (tuple, list):
            return all(map(self._is_plain, value))
        if not isinstance(value, Tensor):
            return value is None or isinstance(value, (bool, int, float, str))
        rows_first = value.dim() > 1  # else a number, or positions [T]
        return value.shape[0] in (1, self.rows) if rows_first else value.shape != (self.rows,)

    def _cut(self, value: Any) -> Any:
        """Tensors [c B, ...] in value become [B, ...]."""
        if type(value) in (tuple, list):
            return type(value)(map(self._cut, value))
        folded = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == self.rows
        return value[: self.rows // self.copies] if folded else value


def _find_blocks(model: nn.Module, sites: list[str]) -> tuple[Any, Any, list[nn.Module]] | None:
    """(decoder, embedding, blocks 0 to the first routed one); None where sharing is not certain."""
    if "transformers.modeling_utils" not in sys.modules:
        return None  # then this is none of its models, and importing it takes seconds
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import PreTrainedModel

    modules: dict[str, Any] = dict(model.named_modules())
    if is_compiled(model):
        return None
    lists = (name for name, module in modules.items() if isinstance(module, nn.ModuleList))
    path = next((name for name in lists if _inside(name, sites)), "")  # the outermost comes first
    parents = (module for name, module in modules.items() if not name or _inside(name, [path]))
    owners = [module for module in parents if isinstance(module, PreTrainedModel)]
    if not owners or owners[-1].config.model_type not in MODEL_TYPES:
        return None
    decoder, head = owners[-1], owners[0].get_output_embeddings()
    after = (_inside(name, sites) for name, module in modules.items() if module is head)
    routed = _inside(path, sites)
    first = min((int(name[len(path) + 1 :].split(".")[0]) for name in routed), default=0)
    skips = getattr(decoder, "layerdrop", 0)  # it might skip the block that repeats
    if first == 0 or set(sites).difference(routed, *after) or skips or decoder in _calls:
        return None
    blocks = list(modules[path])[: first + 1]
    # Blocks of other classes are checkpointed by the model, which calls them in the checkpoint.
    saves = any(getattr(module, "gradient_checkpointing", False) for module in modules.values())
    if saves and not all(isinstance(block, GradientCheckpointingLayer) for block in blocks):
        return None
    return decoder, owners[0].get_input_embeddings(), blocks


def _inside(parent: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if f"{name}.".startswith(f"{parent}.")]


class _NoSubclassHook:
    def __init_subclass__(cls) -> None:
        """First of the bases: transformers would put `forward` in a checkpoint within the other."""


@cache  # one class for good: torch.compile would compile again for every new one
def _redirecting(cls: Any) -> Any:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self not in _calls:  # a replica
            return cls.__call__(self, *args, **kwargs)
        return _calls[self](partial(cls.__call__, self), *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return (cls.__new__, (cls,), *cls.__reduce_ex__(self, protocol)[2:])  # of its own class

    members = {"__call__": call, "__reduce_ex__": reduce, "__module__": cls.__module__}
    return type(cls.__name__, (_NoSubclassHook, cls), members)
