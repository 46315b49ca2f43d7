"""`ReMixTrainer`: transformers' Trainer, with M sampled selections and routers trained by RLOO."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from remix_model.credit import leave_one_out
from remix_model.errors import NonFiniteError
from remix_model.losses import token_losses
from remix_model.nonfinite import watch_outputs
from remix_model.parallel import (
    make_shardable,
    selection_mesh,
    share_batches,
    whole_adapters,
    whole_before_training,
)
from remix_model.routing import sample_routing
from remix_model.routing_log import RoutingLog
from remix_model.saving import WholeSaves
from remix_model.site import find_sites, mix_seed
from remix_model.state import RoutingState
from remix_model.stats import RoutingRecorder
from remix_model.training_args import ReMixArguments, ReMixTrainingArguments


class ReMixTrainerMixin(WholeSaves):
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
        if options.label_smoothing_factor or kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                f"label_smoothing_factor={options.label_smoothing_factor}, compute_loss_func="
                f"{kwargs.get('compute_loss_func')}: routers are trained on the cross-entropy of "
                "each selection; leave both out, or write the loop with sample_routing"
            )
        if options.n_gpu > 1:
            raise ValueError(
                f"one process sees {options.n_gpu} GPUs and would use nn.DataParallel, whose "
                "threads share one set of selections: start it with torchrun, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        super().__init__(*args, **kwargs)
        if self._is_sharded() and given.remix_router_max_grad_norm is not None:
            raise ValueError(
                f"remix_router_max_grad_norm={given.remix_router_max_grad_norm}: "
                f"{self.accelerator.distributed_type.value} clips all parameters together; leave "
                "it out, or use FSDP version 2"
            )
        sites = find_sites(self._module())
        trained = any(site.router_is_trained() for site in sites.values())
        if trained and given.remix_num_selections < 2:
            raise ValueError(
                f"remix_num_selections={given.remix_num_selections} with trainable routers: RLOO's "
                "baseline needs at least 2 (or freeze the routers with requires_grad_(False))"
            )
        self.loss_is_scaled_for_ga = True
        if self.is_deepspeed_enabled and given.remix_selection_chunk_size is not None:
            raise ValueError(
                f"remix_selection_chunk_size={given.remix_selection_chunk_size}: DeepSpeed runs "
                "backward passes by itself, and chunks need their own; leave it out (fewer "
                "remix_grad_selections save as much), or use FSDP version 2"
            )
        if self.accelerator.is_fsdp2 and given.remix_selection_chunk_size is not None:
            # Gradients of chunks would be added to those that FSDP2 holds back meanwhile.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self.routing_log = RoutingLog()
        self.add_callback(self.routing_log)
        self._selection_group: Any = None
        if given.remix_selection_parallel > 1:
            mesh = selection_mesh(given.remix_selection_parallel, options.device.type)
            self._selection_group = mesh["selection"]
        self._start()

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
        return super()._inner_training_loop(*args, **kwargs)

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
        args: Any = self.args
        options = args.sampling_options(self.state.global_step / max(self.state.max_steps - 1, 1))
        scaler = self.accelerator.scaler
        chosen = {"seed": self._selection_seed(), "selection_group": self._selection_group}
        with sample_routing(model, **asdict(options), **chosen) as routing:
            for part in routing.parts(inputs, 1.0 if scaler is None else scaler.get_scale()):
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The parent's, and stop on a loss that is not finite.

        Raises:
            NonFiniteError: The loss is nan or infinite; the message names the step and, with one
                process, the first module whose output is not finite. The optimizer has not stepped;
                checkpoints are intact.
        """
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} (step {self.state.global_step + 1}, micro-step {self._micro_step[1]}"
                f"{self._where_it_began(model, inputs)}); nothing was updated. Lower learning_rate "
                "or max_grad_norm, or look at that batch's data"
            ) from None

    def _where_it_began(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Repeat the step's forward passes to find the module where numbers stop being finite."""
        if self.accelerator.num_processes > 1:  # the others would have to join in
            return ""
        step, micro = self._micro_step
        self._micro_step = (step, micro - 1)  # the same draws again
        with watch_outputs(self._module()) as found, suppress(NonFiniteError):
            self.compute_loss(model, self._prepare_inputs(inputs))
        return f"; {found[0]}" if found else ""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, with the routers in a group of their own: own rate, no weight decay."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not made_here:
            return optimizer
        named = (self._module() if model is None else model).named_parameters()
        ids = self._router_ids()
        routers = [p for _, p in named if id(p) in ids and p.requires_grad]
        if not routers:
            return optimizer
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        # An empty group has no state in a sharded checkpoint, and would come back without its rate.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        rate = self.args.remix_router_learning_rate  # type: ignore[attr-defined]
        optimizer.add_param_group(
            {
                "params": routers,
                "lr": self.args.learning_rate if rate is None else rate,
                "weight_decay": 0.0,
            }
        )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip routers and the rest apart: RLOO's noise must not throttle the adapters."""
        self.accelerator.unscale_gradients()
        router_limit = self.args.remix_router_max_grad_norm  # type: ignore[attr-defined]
        limits = {
            "lora": self.args.max_grad_norm,
            "router": self.args.max_grad_norm if router_limit is None else router_limit,
        }
        groups: dict[str, list[nn.Parameter]] = {"lora": [], "router": []}
        routers = self._router_ids()
        for parameter in model.parameters():
            if parameter.grad is not None:
                groups["router" if id(parameter) in routers else "lora"].append(parameter)
        norms = {
            kind: torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for kind, group in groups.items()
            if group
        }
        for kind, norm in norms.items():
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self._grad_norms[kind] = whole.detach()
        total = torch.stack([self._grad_norms[kind] for kind in norms]).square().sum().sqrt()
        if self.accelerator.scaler is None:  # which skips a step that is not finite
            self._check_finite(total, model)
        for kind, norm in norms.items():
            if limits[kind] > 0:
                torch.nn.utils.clip_grads_with_norm_(groups[kind], limits[kind], norm)
        return total

    def _check_finite(self, total: Tensor, model: nn.Module) -> None:
        """Raise NonFiniteError, naming a parameter, unless the gradient's norm is finite."""
        if bool(torch.isfinite(total)):
            return
        bad = [
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        raise NonFiniteError(
            f"the gradient of {bad[0] if bad else 'all parameters together'} is not finite at step "
            f"{self.state.global_step + 1} ({len(bad)} parameters); nothing was updated. Lower "
            "learning_rate"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The parent clips only if max_grad_norm > 0; the routers' limit may be set without it."""
        if self._is_sharded():
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return super()._get_grad_norm(
            model, grad_norm=self._clip_grad_norm(model) if grad_norm is None else grad_norm
        )

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

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, for weights that are numbers.

        Raises:
            NonFiniteError: A trained parameter is not finite; nothing was written.
        """
        bad = [
            name
            for name, p in self._module().named_parameters()
            if p.requires_grad and not bool(torch.isfinite(p).all())
        ]
        if bad:
            raise NonFiniteError(
                f"{bad[0]} is not finite after step {self.state.global_step} ({len(bad)} "
                "parameters); it was not saved. Lower learning_rate"
            )
        super().save_model(*args, **kwargs)
        if self.accelerator.is_fsdp2 and self._saves_shards():
            folder = kwargs.get("output_dir", args[0] if args else None)
            self._save(folder, state_dict=whole_adapters(self._module()))

    def _saves_shards(self) -> bool:
        """Whether the parent leaves a sharded model to its checkpoints, and writes no adapter."""
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _is_sharded(self) -> bool:
        """Whether the engine clips by itself, all parameters together."""
        from accelerate.utils import DistributedType

        engines = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        return self.accelerator.distributed_type in engines and not self.accelerator.is_fsdp2

    def _router_ids(self) -> set[int]:
        """Which parameters are routers, by id."""
        return {id(site.router_weight) for site in find_sites(self._module()).values()}

    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _selection_seed(self) -> int:
        """A new seed for every step, micro-step and batch; the same again after a resume."""
        step = self.state.global_step
        micro = self._micro_step[1] + 1 if self._micro_step[0] == step else 0
        self._micro_step = (step, micro)
        ranks = self.args.remix_selection_parallel  # type: ignore[attr-defined]
        return mix_seed(self.args.seed, step, micro, self.accelerator.process_index // ranks)

    def _normaliser(self, mask: Tensor, num_items: Tensor | int | None) -> Tensor | float:
        """N: labelled tokens of the un-replicated batch, over accumulation and ranks.

        Args:
            mask: [B, T], nonzero where a token is labelled.
            num_items: As the parent counted them, if it did.
        """
        if num_items is None:
            return mask.count_nonzero().clamp(min=1) * self.current_gradient_accumulation_steps
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return torch.as_tensor(num_items).clamp(min=1) / ranks

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


class ReMixTrainer(ReMixTrainerMixin, Trainer):
    """A `transformers.Trainer` for models with ReMix adapters.

    Args and behaviour are `Trainer`'s, with `ReMixTrainingArguments`. Evaluation and prediction
    use the top k; `eval_loss` is the mean over all labelled tokens of the evaluation set.

    Source: ReMix (arXiv 2603.10160) section 3.2.
    """

    args: ReMixTrainingArguments
    _loss_only = True
    _eval_sums: list[Any] = [0.0, 0]  # noqa: RUF012  replaced, never mutated

    def evaluation_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
    ) -> Any:
        """Mean loss over labelled tokens; the parent's when metrics need all logits."""
        if not self._loss_only:
            # None: this rank's own mean, not its part of all ranks'.
            result = super().evaluation_loss(model, inputs, return_outputs, None)
            loss = result[0] if return_outputs else result
            count = (inputs["labels"][:, 1:] != -100).count_nonzero()
            self._count_evaluated(loss * count, count)
            return result
        losses, mask = token_losses(model, inputs)
        count = mask.count_nonzero()
        total = losses.sum()
        self._count_evaluated(total, count)
        loss = total / count.clamp(min=1)
        return (loss, {}) if return_outputs else loss

    def _count_evaluated(self, total: Tensor, count: Tensor) -> None:
        """Add to the evaluation's sums of losses and of tokens."""
        self._eval_sums = [
            a + b.detach() for a, b in zip(self._eval_sums, (total, count), strict=True)
        ]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """The parent's; logits at all positions only where somebody wants them."""
        self._loss_only = prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, with the loss weighted by tokens rather than by batches."""
        self._eval_sums = [torch.zeros((), device=self.args.device) for _ in range(2)]
        with whole_before_training(self.accelerator, self._module(), self.args.device):
            output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(torch.stack(self._eval_sums).float())
        if output.metrics is not None and float(count) > 0:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = float(total) / float(count)
        return output
