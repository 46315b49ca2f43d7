"""`ReMixSFTTrainer`: TRL's SFTTrainer with ReMix's loss; data and templates are TRL's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from remix_model.trainer import ReMixTrainerMixin
from remix_model.training_args import ReMixArguments


@dataclass
class ReMixSFTConfig(ReMixArguments, SFTConfig):
    """`trl.SFTConfig` with the fields of `ReMixArguments`."""

    def __post_init__(self) -> None:
        """Validate both parts, and refuse what sampling cannot credit.

        Raises:
            ValueError: packing or padding_free is on, or the loss is not the negative
                log-likelihood.
        """
        self.check_remix()
        super().__post_init__()
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name, None):
                raise ValueError(
                    f"{name}=True puts several inputs into one row, which sampling cannot credit "
                    "apart; set it to False"
                )
        if self.loss_type != "nll":
            raise ValueError(f"loss_type={self.loss_type!r}; ReMix trains with loss_type='nll'")


class ReMixSFTTrainer(ReMixTrainerMixin, SFTTrainer):
    """A `trl.SFTTrainer` for ReMix adapters: pass a PEFT model, or `peft_config=ReMixConfig()`.

    Packed and padding-free batches are refused by `ReMixSFTConfig`. TRL's fused head is used in
    evaluation only: in training, logits are computed where labels are.

    Source: ReMix (arXiv 2603.10160) section 3.2.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mixin's; counts `num_tokens`, which TRL logs, without the selections."""
        if model.training:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            seen = int(self.accelerator.gather_for_metrics(mask.sum()).sum())
            ranks = self.args.remix_selection_parallel  # type: ignore[attr-defined]
            self._total_train_tokens += seen // ranks  # which have the same batch
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_loss(model, inputs, *args, **kwargs)
