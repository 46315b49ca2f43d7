"""The command line: `remix train`, `eval`, `generate`, `report`, `export`, `bench`, `env`, ...

A command's module is imported when it runs, so that help needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import io
import os
import sys

from remix_cli.parser import parse_arguments

_MODULES = {
    "train": "remix_cli.train",
    "eval": "remix_cli.evaluate",
    "generate": "remix_cli.generate",
    "report": "remix_cli.report",
    "export": "remix_cli.export",
    "env": "remix_cli.env",
    "validate": "remix_cli.validate",
    "bench": "remix_cli.bench",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        0 done, 1 failed while running, 2 bad input, 130 interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # bars and dashes must not stop a run
        sys.stdout.reconfigure(errors="replace")
    args, overrides = parse_arguments(sys.argv[1:] if argv is None else list(argv))
    try:
        importlib.import_module(_MODULES[args.command]).run(args, overrides)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        code = _exit_code(error)
        if args.debug or code is None:
            raise
        return _fail(f"{_sentence(error)}", code)
    return 0


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that its message explains, None for a defect of ours."""
    failed = type(error).__name__ in ("OutOfMemoryError", "SavingError")
    if isinstance(error, FloatingPointError) or failed:
        return 1
    return 2 if isinstance(error, ValueError | OSError | ImportError) else None


def _sentence(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"{str(error).split('. ')[0]}: lower per_device_train_batch_size, num_selections or "
            "max_length, or set gradient_checkpointing"
        )
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    print(f"remix: error: {message}", file=sys.stderr)
    return code
