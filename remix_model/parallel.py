"""Selection parallelism: the M selections of one batch, spread over the ranks of a process group.

Each of the S ranks is given the same batch and runs M / S of its selections. Of the G selections
with a graph, rank s takes the s-th G / S, of the others the s-th (M - G) / S; as a row's draw
depends on its place in the batch folded M times, they are the draws of one process. When a rank has
all its losses the ranks exchange them, M B T numbers, and each works out the advantages of its own
selections from all M, as one process does.

A rank's loss has the mean over its own selections as its gradient, and its advantages are times S:
averaged over ranks, as DDP and FSDP do, both gradients are those of one process. Ranks that do not
share a batch (the other dimension of `selection_mesh`) are averaged as ever.

Source: ReMix (arXiv 2603.10160) section 3.2 for the baseline over M; spreading it is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remix_model.errors import NonFiniteError
from remix_model.parts import Part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."  # FSDP's, in the names of what is inside
_MASK63 = 0x7FFFFFFFFFFFFFFF


def selection_mesh(selection_parallel: int, device_type: str = "cpu") -> DeviceMesh:
    """All processes as a mesh of data x selection, for `sample_routing` and data samplers.

        mesh = selection_mesh(2, "cuda")                # 8 processes: 4 batches, 2 ranks for each
        sampler = DistributedSampler(data, mesh["data"].size(), mesh["data"].get_local_rank())
        with sample_routing(model, num_selections=8, selection_group=mesh["selection"], seed=step):
            ...

    Args:
        selection_parallel: S, neighbouring ranks that share the selections of a batch.
        device_type: Where tensors are, "cuda" or "cpu".

    Returns:
        A mesh [processes / S, S] with the dimensions "data" and "selection".

    Raises:
        ValueError: S does not divide the number of processes.
        RuntimeError: There is no process group.
    """
    from torch.distributed.device_mesh import init_device_mesh

    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            f"selection_parallel={selection_parallel} needs a process group: start the program "
            "with torchrun or accelerate launch"
        )
    processes = distributed.get_world_size()
    if selection_parallel < 1 or processes % selection_parallel:
        raise ValueError(
            f"selection_parallel={selection_parallel} does not divide the {processes} processes: "
            "every batch needs as many ranks as the others"
        )
    shape = (processes // selection_parallel, selection_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "selection"))


def check_shares(
    num_selections: int, grad_selections: int | None, ranks: int, prefix: str = ""
) -> None:
    """Raise ValueError unless every rank gets as many selections of each kind as the others.

    Args:
        num_selections: M.
        grad_selections: G; None: M.
        ranks: S.
        prefix: Goes before the names, as in `SamplingOptions.check`.
    """
    for name, count in (("num", num_selections), ("grad", grad_selections)):
        if count is not None and count % ranks:
            raise ValueError(
                f"{prefix}{name}_selections={count} cannot be spread over {ranks} ranks: make it a "
                f"multiple of {ranks}"
            )


def share_batches(loader: Any, ranks: int) -> None:
    """Have neighbouring ranks read the same batches of a loader that accelerate has prepared.

    Args:
        loader: As `Accelerator.prepare` returns it, for one rank of all; changed in place.
        ranks: S.

    Raises:
        ValueError: Another process chooses the batches, or the data set itself is sharded.
    """
    if ranks == 1:
        return
    shard = loader.batch_sampler if hasattr(loader.batch_sampler, "num_processes") else None
    shard = loader.dataset if shard is None else shard
    if not hasattr(shard, "num_processes"):
        raise ValueError(
            f"remix_selection_parallel={ranks} needs a training set whose batches are dealt out to "
            f"ranks by accelerate, and {type(loader.dataset).__name__} is not: give a data set "
            "with a length"
        )
    shard.num_processes //= ranks
    shard.process_index //= ranks


def make_shardable(model: nn.Module) -> nn.Module:
    """Make a model what FSDP2's `fully_shard` and DeepSpeed demand: call it before. In place.

    lora_B is [n, out, r] laid out as [n, r, out], which the dense strategy packs without a copy;
    contiguous, it costs a copy of n out r numbers a pass. ZeRO-3 gathers a module's own parameters
    around its forward pass, and is told here that a layer's include those in its dictionaries.
    `ReMixTrainer` does this by itself.

    Args:
        model: Any module. Adapters are sharded with it, by experts.

    Returns:
        The model.
    """
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    deepspeed: Any = sys.modules.get("deepspeed")
    for module in model.modules() if deepspeed is not None else ():
        for part in module.children():
            for parameter in part.parameters() if isinstance(part, nn.ParameterDict) else ():
                deepspeed.zero.register_external_parameter(module, parameter)
    return model


@contextmanager
def whole_before_training(
    accelerator: Any, model: nn.Module, device: torch.device
) -> Iterator[None]:
    """Inside, a model that training has yet to shard or wrap is evaluated as it is, on every rank.

    accelerate shards a model by FSDP2 only together with its optimizer, when training starts. And
    a model that it prepared for evaluation counts as prepared: it would train without DDP then,
    every rank by its own gradients.

    Args:
        accelerator: The trainer's.
        model: Its model.
        device: Where it is evaluated.
    """
    is_ddp = accelerator.distributed_type.value.startswith("MULTI_")
    early = (accelerator.is_fsdp2 or is_ddp) and not accelerator._models
    if early:
        accelerator._models.append(model.to(device))
    try:
        with accelerator.autocast() if early else nullcontext():
            yield
    finally:
        if early:
            accelerator._models.clear()


def whole_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Adapters, and all else that is trained, of a sharded model: gathered, without the base.

    Args:
        model: Sharded by `fully_shard`; all its ranks have to call this.

    Returns:
        Tensors on the CPU by name, for `save_pretrained(folder, state_dict=...)`.
    """
    gathered = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".remix_" in name:
            whole = parameter.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            gathered[name.replace(CHECKPOINT_WRAPPER, "")] = whole.cpu()
    return gathered


class SelectionGroup:
    """The ranks that share a batch's selections: of one where `group` is None."""

    def __init__(
        self,
        group: Any,
        num_selections: int,
        grad_selections: int | None,
    ) -> None:
        """Find this rank's place in the group.

        Args:
            group: A ProcessGroup or a one-dimensional DeviceMesh, whose ranks are given the same
                batch and seed; None: this process alone.
            num_selections: M.
            grad_selections: G; None: M.

        Raises:
            ValueError: M or G is not a multiple of the group's size, or this process is not in it.
        """
        self.group: Any = group.get_group() if hasattr(group, "get_group") else group
        self.size, self.rank = 1, 0
        if self.group is not None:
            self.size = torch.distributed.get_world_size(self.group)
            self.rank = torch.distributed.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("this process is not in selection_group: give each its own group")
        check_shares(num_selections, grad_selections, self.size)
        self.num_selections = num_selections // self.size
        self.grad_selections = (grad_selections or num_selections) // self.size
        self._batch = torch.zeros((), dtype=torch.int64)

    def place(self, plan: list[Part]) -> list[Part]:
        """Parts of this rank's selections, counted from 0, as those of the M that they are."""
        return [replace(part, first=self._selection(part.first, self.rank)) for part in plan]

    def note(self, batch: Mapping[str, Any], seed: int) -> None:
        """What this rank was given; `exchange` compares."""
        if self.size > 1:
            self._batch = _fingerprint(batch, seed)

    def exchange(self, losses: dict[int, Tensor], error: Exception | None) -> dict[int, Tensor]:
        """The losses of all ranks.

        Args:
            losses: [B, W] by selection, all of this rank's.
            error: What was wrong with them, if anything: now all ranks may stop together.

        Returns:
            [B, W] by selection, all M; those that were given come first.

        Raises:
            ValueError: The ranks were given different batches or seeds.
            NonFiniteError: A loss is not finite, on some rank.
        """
        if self.size == 1:
            return losses
        own = torch.stack([losses[m] for m in map(self._own, range(self.num_selections))])
        batches = self._gather(self._batch.to(own.device))
        if len({int(batch) for batch in batches}) > 1:
            raise ValueError(
                f"the {self.size} ranks of selection_group were given different batches or seeds: "
                "they run selections of the same one. Shard the data by mesh['data'] of "
                "selection_mesh, not by rank"
            )
        every = self._gather(own)
        failed = self._gather(own.new_full((1,), float(error is not None)))
        if error is not None:
            raise error
        for rank, bad in enumerate(failed):
            if bool(bad):
                raise NonFiniteError(
                    f"rank {rank} of selection_group found numbers that are not finite, which "
                    "would reach every advantage; its message names the layer"
                )
        spread = {
            self._selection(i, rank): loss
            for rank, theirs in enumerate(every)
            for i, loss in enumerate(theirs)
        }
        return {**losses, **spread}

    def _selection(self, own: int, rank: int) -> int:
        """Which of the M selections is a rank's `own`: those with a graph are its first."""
        with_graph = self.grad_selections
        if own < with_graph:
            return rank * with_graph + own
        others = self.num_selections - with_graph
        return self.size * with_graph + rank * others + own - with_graph

    def _own(self, own: int) -> int:
        return self._selection(own, self.rank)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered


def _fingerprint(batch: Mapping[str, Any], seed: int) -> Tensor:
    """An int64 that differs, almost surely, for other tensors, shapes or seeds."""
    total = torch.tensor(seed & _MASK63)
    for key in sorted(batch):
        value = batch[key]
        if not isinstance(value, Tensor):
            continue
        for size in value.shape:
            total = total * 31 + size
        flat = value.detach().flatten()
        words = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
        places = torch.arange(1, len(words) + 1, device=words.device)
        total = total.to(words.device) * 31 + (words * places).sum()
    return total
