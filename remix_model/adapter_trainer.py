"""`AdapterTrainer`: transformers' Trainer for PEFT's own adapters, on `ReMixTrainer`'s terms.

What both do alike stands here, in two classes to be mixed in: the loss is the mean over all
labelled tokens of an accumulation, or of an evaluation set; numbers that are not finite stop the
step; saves are whole or not there.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from remix_model.errors import NonFiniteError
from remix_model.losses import token_losses
from remix_model.nonfinite import watch_outputs
from remix_model.parallel import whole_adapters, whole_before_training
from remix_model.peft_files import complete_files, load_what_trains
from remix_model.saving import WholeSaves

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CheckedSteps(WholeSaves):
    """What every trainer here does differently from its parent, to be mixed in before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's.

        Raises:
            ValueError: One process would train on several GPUs, or the loss is to be another.
        """
        options: Any = kwargs.get("args", args[1] if len(args) > 1 else None)
        if options.label_smoothing_factor or kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                f"label_smoothing_factor={options.label_smoothing_factor}, compute_loss_func="
                f"{kwargs.get('compute_loss_func')}: the loss is the cross-entropy of each token, "
                "which routers are trained on; leave both out, or write a loop of your own"
            )
        if options.n_gpu > 1:
            raise ValueError(
                f"one process sees {options.n_gpu} GPUs and would use nn.DataParallel, whose "
                "threads would share what a step keeps: start it with torchrun, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The parent's; batch_rebalance, too, is shuffled by the run's seed."""
        sampler: Any = super()._get_train_sampler(train_dataset)
        if self.args.train_sampling_strategy == "batch_rebalance" and sampler is not None:
            given = self.args.data_seed
            sampler.seed = self.args.seed if given is None else given
        return sampler

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
                f"{error} ({self._place()}{self._where_it_began(model, inputs)}); nothing was "
                "updated. Lower learning_rate or max_grad_norm, or look at that batch's data"
            ) from None

    def _place(self) -> str:
        """Where in the run it is, for a message."""
        return f"step {self.state.global_step + 1}"

    def _where_it_began(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Repeat the step's forward passes to find the module where numbers stop being finite."""
        if self.accelerator.num_processes > 1:  # the others would have to join in
            return ""
        with watch_outputs(self._module()) as found, suppress(NonFiniteError):
            self.compute_loss(model, self._prepare_inputs(inputs))
        return f"; {found[0]}" if found else ""

    def _clip_groups(self, model: nn.Module) -> dict[str, tuple[list[nn.Parameter], float]]:
        """The parameters that are clipped together, and their limit, by name."""
        return {"adapter": (list(model.parameters()), float(self.args.max_grad_norm))}

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every group by itself, after a look whether all gradients are numbers."""
        if self._is_sharded():
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        groups = {
            kind: ([p for p in parameters if p.grad is not None], limit)
            for kind, (parameters, limit) in self._clip_groups(model).items()
        }
        norms = {
            kind: torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for kind, (group, _) in groups.items()
            if group
        }
        whole = {
            kind: (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach()
            for kind, norm in norms.items()
        }
        self._note_grad_norms(whole)
        total = torch.stack(list(whole.values())).square().sum().sqrt()
        if self.accelerator.scaler is None:  # which skips a step that is not finite
            self._check_finite(total, model)
        for kind, norm in norms.items():
            group, limit = groups[kind]
            if limit > 0:
                torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
        return total

    def _note_grad_norms(self, norms: dict[str, Tensor]) -> None:
        """Nothing: the parent logs the norm of all."""

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

    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

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


class TokenEvaluation(CheckedSteps):
    """And the loss of an evaluation is the mean over all its labelled tokens."""

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
        if self._loss_only:
            losses, mask = token_losses(model, inputs)
            self._count_evaluated(losses, mask)
            loss = losses.sum() / mask.count_nonzero().clamp(min=1)
            return (loss, {}) if return_outputs else loss
        # None: this rank's own mean, not its part of all ranks'.
        result: Any = Trainer.compute_loss(self, model, inputs, return_outputs=return_outputs)
        mask = inputs["labels"][:, 1:] != -100
        if self._rows_at_the_end() is None:
            loss = result[0] if return_outputs else result
            losses = torch.where(mask, loss, 0.0)  # for each the mean: nan where there is none
        else:  # one row's loss cannot be told from another's: all ranks compute them again
            losses, mask = token_losses(model, inputs)
        self._count_evaluated(losses, mask)
        return result

    def _count_evaluated(self, losses: Tensor, mask: Tensor) -> None:
        """Add to the evaluation's sums of losses [B, T - 1] and of tokens, each row once."""
        at_the_end = self._rows_at_the_end()
        if at_the_end is not None:
            mine = max(at_the_end - self.accelerator.process_index * len(losses), 0)
            losses, mask = losses[:mine], mask[:mine]
        found = (losses.detach().sum(), mask.count_nonzero())
        self._eval_sums = [a + b for a, b in zip(self._eval_sums, found, strict=True)]

    def _rows_at_the_end(self) -> int | None:
        """Rows of the data in all ranks' last batches; None in every other.

        What the data do not fill there, with several ranks, is filled with rows that were evaluated
        before.
        """
        state = self.accelerator.gradient_state
        repeats = state.end_of_dataloader and state.remainder > 0
        return state.remainder if repeats and self.accelerator.num_processes > 1 else None

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


class CompleteSaves(_Base):
    """Mixed into a Trainer, after `WholeSaves`: with what PEFT leaves out of an adapter's files."""

    _in_checkpoint: bool

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            place = Path(output_dir or str(self.args.output_dir))
            complete_files(self.model, place, resumable=self._in_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_what_trains(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class AdapterTrainer(TokenEvaluation, CompleteSaves, Trainer):
    """A `transformers.Trainer` for models with one of PEFT's own adapters.

    Args and behaviour are `Trainer`'s. Loss, evaluation, clipping, checks and saving are those of
    `ReMixTrainer`, so that runs of both can be compared.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over labelled tokens: of the accumulation, or in evaluation of the batch.

        Raises:
            NonFiniteError: It is nan or infinite, in training.
        """
        if not model.training:
            return self.evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, mask = token_losses(model, inputs)
        loss = losses.sum() / self._normaliser(mask, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)}")
        return (loss, {}) if return_outputs else loss
