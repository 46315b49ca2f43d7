"""`ReMixTrainer`: transformers' Trainer, with M sampled selections and routers trained by RLOO."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from remix_model.adapter_trainer import CheckedSteps, TokenEvaluation
from remix_model.credit import leave_one_out
from remix_model.dense_start import DenseStart, take
from remix_model.losses import token_losses
from remix_model.options import SamplingOptions
from remix_model.parallel import (
    make_shardable,
    selection_mesh,
    share_batches,
)
from remix_model.random_state import mix_seed
from remix_model.rates import RouterWait, give_group
from remix_model.routing import sample_routing
from remix_model.routing_log import RoutingLog
from remix_model.site import find_sites
from remix_model.state import RoutingState
from remix_model.stats import RoutingRecorder
from remix_model.training_args import ReMixArguments, ReMixTrainingArguments


class ReMixTrainerMixin(CheckedSteps):
    """What every ReMix trainer does differently from its parent, to be mixed in before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's; checks that the model has routers and that M suffices to train them.

        Raises:
            ValueError: The model has no routed layer, or M < 2 with trainable routers.
        """
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if not isinstance(given, ReMixArguments):
            raise ValueError(
                f"args is {type(given).__name__}; use ReMixTrainingArguments (or ReMixSFTConfig)"
            )
        options: Any = given
        super().__init__(*args, **kwargs)
        sites = find_sites(self._module())
        self._learned = all(site.router.learned for site in sites.values())
        self._check_arguments(given, any(site.policy_is_trained() for site in sites.values()))
        if given.remix_router_wait:
            self.add_callback(RouterWait(given.remix_router_wait, self._router_ids))
        if self.accelerator.is_fsdp2 and given.remix_selection_chunk_size is not None:
            # Gradients of chunks would be added to those that FSDP2 holds back meanwhile.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        if given.remix_dense_start:
            self.add_callback(DenseStart(given.remix_dense_start))
        self.routing_log = RoutingLog()
        self.add_callback(self.routing_log)
        self._selection_group: Any = None
        if given.remix_selection_parallel > 1:
            mesh = selection_mesh(given.remix_selection_parallel, options.device.type)
            self._selection_group = mesh["selection"]
        self._start()

    def _check_arguments(self, given: ReMixArguments, trained: bool) -> None:
        """Raise ValueError for what this model or this engine cannot do.

        Args:
            given: The arguments.
            trained: Whether RLOO trains any router.
        """
        if self._is_sharded() and given.remix_router_max_grad_norm is not None:
            raise ValueError(
                f"remix_router_max_grad_norm={given.remix_router_max_grad_norm}: "
                f"{self.accelerator.distributed_type.value} clips all parameters together; leave "
                "it out, or use FSDP version 2"
            )
        if given.remix_router_wait and self._is_sharded():
            raise ValueError(
                f"remix_router_wait={given.remix_router_wait}: "
                f"{self.accelerator.distributed_type.value} steps all parameters together; "
                "leave it out, or use FSDP version 2"
            )
        if trained and given.remix_num_selections < 2:
            raise ValueError(
                f"remix_num_selections={given.remix_num_selections} with trainable routers: RLOO's "
                "baseline needs at least 2 (or freeze the routers with requires_grad_(False))"
            )
        options: Any = given
        if given.remix_selection_parallel > 1 and (
            options.train_sampling_strategy == "batch_rebalance"
        ):
            raise ValueError(
                f"remix_selection_parallel={given.remix_selection_parallel} with "
                "train_sampling_strategy='batch_rebalance', which deals out examples to all ranks: "
                "use 'group_by_length'"
            )
        if self._learned and given.remix_selection_parallel > 1:
            raise ValueError(
                f"remix_selection_parallel={given.remix_selection_parallel}: the routers weigh "
                "their experts and nothing is drawn, so there are no selections to share; leave "
                "it at 1"
            )
        if self._learned and given.remix_dense_start:
            raise ValueError(
                f"remix_dense_start={given.remix_dense_start}: the routers weigh their experts and "
                "nothing is drawn; leave it out"
            )
        for name in ("remix_temperature", "remix_temperature_end"):
            value = getattr(given, name)
            if self._learned and value not in (None, 1.0):
                raise ValueError(
                    f"{name}={value}: the routers weigh their experts and nothing is drawn; leave "
                    "it out (router_temperature is the weights')"
                )
        if self.is_deepspeed_enabled and given.remix_selection_chunk_size is not None:
            raise ValueError(
                f"remix_selection_chunk_size={given.remix_selection_chunk_size}: DeepSpeed runs "
                "backward passes by itself, and chunks need their own; leave it out (fewer "
                "remix_grad_selections save as much), or use FSDP version 2"
            )

    def _start(self) -> None:
        """Forget an earlier run's draws and metrics; model_init may have made another model."""
        if self.accelerator.is_fsdp2 or self.is_deepspeed_enabled:
            make_shardable(self._module())
        self._recorder = RoutingRecorder(self._module())
        self._window: list[dict[str, Tensor]] = []
        self._micro_step = (-1, 0)
        self._grad_norms: dict[str, Tensor] = {}

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._start()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:  # where a step has raised, in the midst of a dense start
            if self.args.remix_dense_start:  # type: ignore[attr-defined]
                take(self._module(), step=1, steps=0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training, M selections in folded passes; in evaluation, the top-k loss."""
        if not model.training:
            return self.evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        options = self._sampling_options()
        scaler = self.accelerator.scaler
        chosen = {"seed": self._selection_seed(), "selection_group": self._selection_group}
        with sample_routing(model, **asdict(options), **chosen) as routing:
            for part in routing.parts(inputs, 1.0 if scaler is None else scaler.get_scale()):
                if not self._recorder.fits():  # a dense start takes fewer experts than before
                    self._recorder = RoutingRecorder(self._module())
                self._recorder.attach()
                try:
                    losses, mask = token_losses(model, part)
                finally:
                    self._recorder.detach()
                routing.add(losses, mask)
            tokens = mask[: routing.batch_size]
            loss = routing.loss(num_items=self._normaliser(tokens, num_items_in_batch))
        self._note(routing, tokens)
        return (loss, {}) if return_outputs else loss

    def _sampling_options(self) -> SamplingOptions:
        """Of this step; where all routers weigh their experts, nothing is drawn, and M is 1."""
        args: Any = self.args
        progress = self.state.global_step / max(self.state.max_steps - 1, 1)
        options: SamplingOptions = args.sampling_options(progress)
        if not self._learned:
            return options
        return replace(options, num_selections=1, grad_selections=None, selection_chunk_size=None)

    def get_train_dataloader(self) -> Any:
        """The parent's; ranks that share a batch's selections are given the same batch."""
        loader = super().get_train_dataloader()
        share_batches(loader, self.args.remix_selection_parallel)  # type: ignore[attr-defined]
        return loader

    def evaluation_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
    ) -> Any:
        """The loss under top-k routing, as the parent computes it."""
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _place(self) -> str:
        return f"{super()._place()}, micro-step {self._micro_step[1]}"

    def _where_it_began(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        step, micro = self._micro_step
        self._micro_step = (step, micro - 1)  # the same draws again
        return super()._where_it_began(model, inputs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, with the routers in a group of their own: own rate, no weight decay."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not made_here:
            return optimizer
        named = (self._module() if model is None else model).named_parameters()
        ids, trained = self._router_ids(), [(name, p) for name, p in named if p.requires_grad]
        rate = self.args.remix_router_learning_rate  # type: ignore[attr-defined]
        rate = self.args.learning_rate if rate is None else rate
        give_group(optimizer, [p for _, p in trained if id(p) in ids], lr=rate, weight_decay=0.0)
        scale = self.args.remix_expert_rate_scale  # type: ignore[attr-defined]
        if scale != 1.0:
            experts = [p for name, p in trained if "lora_A" in name or "lora_B" in name]
            scaled = {"lr": scale * self.args.learning_rate, "weight_decay": self.args.weight_decay}
            give_group(optimizer, experts, **scaled)
        return optimizer

    def _clip_groups(self, model: nn.Module) -> dict[str, tuple[list[nn.Parameter], float]]:
        """Routers and the rest apart: RLOO's noise must not throttle the adapters."""
        routers = self._router_ids()
        kinds: dict[str, list[nn.Parameter]] = {"lora": [], "router": []}
        for parameter in model.parameters():
            kinds["router" if id(parameter) in routers else "lora"].append(parameter)
        own = self.args.remix_router_max_grad_norm  # type: ignore[attr-defined]
        limit = self.args.max_grad_norm
        return {
            "lora": (kinds["lora"], limit),
            "router": (kinds["router"], limit if own is None else own),
        }

    def _note_grad_norms(self, norms: dict[str, Tensor]) -> None:
        self._grad_norms.update(norms)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's, with `remix/...` metrics since the last training log."""
        shares: dict[str, list[float]] = {}
        if "loss" in logs and self._window:
            keys = self._window[0]
            logs.update(
                {
                    key: torch.stack([step[key] for step in self._window]).mean().item()
                    for key in keys
                }
            )
            logs.update({f"remix/grad_norm_{k}": float(v) for k, v in self._grad_norms.items()})
            stats = self._recorder.stats()
            logs.update({f"remix/{key}": value for key, value in stats.summary().items()})
            shares = {layer.name: layer.expert_share for layer in stats.layers}
            self.routing_log.add(self.state.global_step, stats)
            self._window.clear()
            self._recorder.reset()
        super().log(logs, start_time)
        if shares:
            # Kept in trainer_state.json, not printed: one list a layer.
            self.state.log_history[-1].update({"remix/expert_share": shares})  # type: ignore[dict-item]

    def _router_ids(self) -> set[int]:
        """Which parameters are routers, by id."""
        return {id(site.router_weight) for site in find_sites(self._module()).values()}

    def _selection_seed(self) -> int:
        """A new seed for every step, micro-step and batch; the same again after a resume."""
        step = self.state.global_step
        micro = self._micro_step[1] + 1 if self._micro_step[0] == step else 0
        self._micro_step = (step, micro)
        ranks = self.args.remix_selection_parallel  # type: ignore[attr-defined]
        return mix_seed(self.args.seed, step, micro, self.accelerator.process_index // ranks)

    def _note(self, routing: RoutingState, mask: Tensor) -> None:
        """Keep what the next log will average: on the device, no synchronisation. mask [B, T]."""
        assert routing.losses is not None
        losses = routing.losses
        tokens = mask.sum(1).clamp(min=1)
        share = tokens / tokens.sum()
        per_token = losses / share * max(self.current_gradient_accumulation_steps, 1)
        spread = per_token.std(0, correction=0).mean()
        self._window.append(
            {
                "remix/loss_spread": spread,
                "remix/advantage_std": leave_one_out(losses).std(correction=0),
            }
        )


class ReMixTrainer(TokenEvaluation, ReMixTrainerMixin, Trainer):
    """A `transformers.Trainer` for models with ReMix adapters.

    Args and behaviour are `Trainer`'s, with `ReMixTrainingArguments`. Evaluation and prediction
    use the top k; `eval_loss` is the mean over all labelled tokens of the evaluation set.

    Source: ReMix (arXiv 2603.10160) section 3.2.
    """

    args: ReMixTrainingArguments
