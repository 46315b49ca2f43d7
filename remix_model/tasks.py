"""lm-eval's tasks on a model object, adapters of any PEFT method included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    task_manager: Any = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval (EleutherAI's harness) on a model in memory.

    ReMix adapters are routed top-k, as at inference. Nothing is downloaded for tasks whose data are
    local files. Task files may name Python functions, which then run: use only what you trust.

    Args:
        model: A transformers model or a PEFT model of one.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups, or paths of task files (YAML).
        include_path: A folder of task files, beside lm-eval's own tasks.
        num_fewshot: Examples in the prompt; None: as the task says.
        limit: Documents a task, or a share of them below 1; None: all.
        batch_size: Requests in one pass.
        task_manager: What `find_tasks(tasks, include_path)` returned, to index the files once for
            several models.

    Returns:
        The metrics of every task (and group) by name, as lm-eval names them: "acc,none", ...

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: There is no such task or folder.
    """
    if task_manager is None:
        task_manager = find_tasks(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    output = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=task_manager,
    )
    return {name: dict(metrics) for name, metrics in output["results"].items()}


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """lm-eval's `TaskManager`, in which all of these tasks are.

    Its own tasks are thousands of files, and take most of a minute to index: they are left out
    where all tasks are files, or single tasks in include_path.

    Args:
        tasks: As in `evaluate_tasks`.
        include_path: As in `evaluate_tasks`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: There is no such task or folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"there is no folder of tasks {include_path}: check include_path")
    if find_spec("lm_eval") is None:
        raise ImportError(
            "tasks need lm-eval: run `pip install 'remix-lora[eval]'` (or `pip install lm-eval`)"
        )
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    own = TaskManager(include_path=folder, include_defaults=False)
    if all(task in own.all_subtasks or _is_single_task(Path(task)) for task in tasks):
        return own
    manager = TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]) and not Path(task).is_file():
            raise ValueError(
                f"lm-eval has no task {task!r}: `lm_eval ls tasks` lists its own; give the folder "
                "of yours as include_path, or a task file's path"
            )
    return manager


def _is_single_task(path: Path) -> bool:
    """Whether this is a task's file; a group's may name lm-eval's own tasks."""
    return path.is_file() and not re.search("^group:", path.read_text("utf-8"), re.MULTILINE)
