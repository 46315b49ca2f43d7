"""What the trainers' tests share: data, and ways to watch a run. `make_trainer` is in conftest."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import TrainerCallback

import remix_model.trainer

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
STEPS = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}


def examples(count=16, seed=0, shortest=4, longest=10):
    """Sequences of different lengths that count up; the first tokens unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        start, step = torch.randint(1, 60, (2,), generator=generator).tolist()
        ids = (start + (step % 3 + 1) * torch.arange(length)) % 60 + 3
        labels = ids.clone()
        labels[: int(torch.randint(0, 3, (1,), generator=generator))] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def collate(features):
    width = max(len(f["input_ids"]) for f in features)

    def pad(key, value):
        rows = [nn.functional.pad(f[key], (0, width - len(f[key])), value=value) for f in features]
        return torch.stack(rows)

    ids, labels = pad("input_ids", 0), pad("labels", -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def parameters(model):
    """The trained ones, copied, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def norm_of(model, kind):
    """The gradient's norm over all parameters of a kind, "router" or "lora"."""
    grads = [p.grad.flatten() for n, p in model.named_parameters() if kind in n]
    return float(torch.cat(grads).norm())


@contextlib.contextmanager
def spied_seeds(seeds):
    """Collect (seed, num_selections) of every context that the trainer opens."""
    original = remix_model.trainer.sample_routing

    def spy(model, num_selections, **options):
        seeds.append((options["seed"], num_selections))
        return original(model, num_selections, **options)

    remix_model.trainer.sample_routing = spy
    try:
        yield
    finally:
        remix_model.trainer.sample_routing = original


class Snapshot(TrainerCallback):
    """Keep the trainable parameters after every step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = parameters(model)
