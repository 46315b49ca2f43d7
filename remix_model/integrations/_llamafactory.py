"""LLaMA-Factory's classes with ReMix in them; importing this imports LLaMA-Factory."""

from __future__ import annotations

from dataclasses import dataclass

from llamafactory.hparams.parser import TrainingArguments
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from remix_model.trainer import ReMixTrainerMixin
from remix_model.training_args import ReMixArguments


@dataclass
class FactoryArguments(ReMixArguments, TrainingArguments):
    """LLaMA-Factory's training arguments, with ReMix's."""

    def __post_init__(self) -> None:
        """Validate both parts."""
        self.check_remix()
        super().__post_init__()


class FactoryTrainer(ReMixTrainerMixin, CustomSeq2SeqTrainer):
    """LLaMA-Factory's trainer of supervised finetuning, with ReMix's loss."""
