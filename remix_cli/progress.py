"""Progress of training and evaluation: a bar with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from remix_cli.display import console, seconds


class ProgressCallback(TrainerCallback):
    """Show where a Trainer is, and measure the time that training steps take.

    Attributes:
        step_seconds: Time spent in optimizer steps: no data loading, evaluation or saving.
        steps: Optimizer steps taken in this process.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.steps = 0
        self._step_start = 0.0
        self._tokens_before = self._tokens = 0
        self._training: Progress | None = None
        self._evaluating: Progress | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the data, without padding and counted once for all selections, per second."""
        seen = self._tokens - self._tokens_before
        return seen / self.step_seconds if self.steps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._tokens_before = self._tokens = _tokens_seen(args, state)
        if state.is_world_process_zero:
            self._training = _bar("training", state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self._step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the step's clock and advance the bar."""
        self.step_seconds += time.perf_counter() - self._step_start
        self.steps += 1
        self._tokens = _tokens_seen(args, state)
        if self._training is not None:
            self._training.update(self._training.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the loss: in the bar, or in a line where there is no terminal for one."""
        if self._training is None or not logs:
            return
        if "eval_loss" in logs:
            console.print(f"step {state.global_step}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and console.is_terminal:
            text = f"training  loss {logs['loss']:.4f}"
            self._training.update(self._training.task_ids[0], description=text)
        elif "loss" in logs and self.steps:
            rate = self.step_seconds / self.steps
            left = seconds(rate * (state.max_steps - state.global_step))
            console.print(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"{rate:.2f} s/step  {left} left"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Advance the bar of an evaluation before or after training; rich shows one at a time."""
        if self._training is not None or not state.is_world_process_zero:
            return
        if self._evaluating is None:
            self._evaluating = _bar("evaluating", len(eval_dataloader), 0)
        self._evaluating.advance(self._evaluating.task_ids[0])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the evaluation's bar."""
        if self._evaluating is not None:
            self._evaluating.stop()
            self._evaluating = None

    def close(self) -> None:
        """Close whatever bar is open, so that the terminal is usable after an error."""
        for bar in (self._training, self._evaluating):
            if bar is not None:
                bar.stop()
        self._training = self._evaluating = None


def _bar(description: str, total: int, completed: int) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    bar.add_task(description, total=total, completed=completed)
    bar.start()
    return bar


def _tokens_seen(args: Any, state: Any) -> int:
    """Of the data: ranks that share a batch's selections have all counted it."""
    return int(state.num_input_tokens_seen) // int(getattr(args, "remix_selection_parallel", 1))
