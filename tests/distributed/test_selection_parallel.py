"""The M selections of a batch on several ranks: the draws and gradients of one process."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from remix_model import ReMixTrainer, ReMixTrainingArguments, sample_routing, token_losses
from remix_model.errors import NonFiniteError
from remix_model.parallel import selection_mesh, share_batches
from remix_model.routing import force_selection
from remix_model.site import find_sites
from tests.ranks import run_on_ranks
from tests.remix_model.trainer_helpers import QUIET, STEPS, collate, examples, logged, parameters

CAUSAL = {"credit": "causal", "log_prob": "unordered"}
CASES = {
    "sequence-ordered": {},
    "causal-unordered": CAUSAL,
    "G2": {"grad_selections": 2},
    "G2-of-6-causal": {"num_selections": 6, "grad_selections": 2, **CAUSAL},
    "G4-of-6-chunks-of-1": {"num_selections": 6, "grad_selections": 4, "selection_chunk_size": 1},
    "causal-chunks-of-1": {"selection_chunk_size": 1, **CAUSAL},
    "norms-and-biases": {"advantage_norm": "batch", "router_entropy_coef": 0.1, **CAUSAL},
    "response": {"logprob_tokens": "response"},
}
MODELS = {
    "token": {},
    "sequence-block": {"routing_granularity": "sequence", "router_sharing": "block"},
}


def steps(
    model,
    batches,
    group=None,
    waits=contextlib.nullcontext,
    backward=torch.Tensor.backward,
    **options,
):
    """An accumulation over batches: (loss of the last, losses [M, B], draws [c B, T, k] by place).

    A draw's place is the batch, the layer and the first of its selections. Batches before the last
    are backpropagated inside waits(), in which gradients are not reduced.
    """
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    draws = {}
    for i, batch in enumerate(batches):
        options = {"num_selections": 4, **options}
        with contextlib.nullcontext() if i == len(batches) - 1 else waits():
            with sample_routing(model, **options, seed=i, selection_group=group) as routing:
                for part in routing.parts(batch):
                    routing.add(*token_losses(model, part))
                    for site in find_sites(model).values():
                        (drawn,) = routing.selections[site.stream]
                        draws[i, site.stream, routing.part.first] = drawn
                loss = routing.loss(num_items=items)
            backward(loss)
    return loss.detach(), routing.losses, draws


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_two_ranks_are_as_one_process(
    kind, make_remix, make_batch, take_grads, assert_same, tmp_path
):
    """Every option, checkpointed by turns, over an accumulation of two batches."""
    model = make_remix(**MODELS[kind]).train()
    batches = [make_batch(), make_batch((6, 8), seed=3)]
    torch.save((model, batches), tmp_path / "inputs.pt")
    run_on_ranks(2, _selection_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, options in CASES.items():
        loss, losses, draws = steps(model, batches, **options)
        grads = take_grads(model)
        assert any(grad.any() for name, grad in grads.items() if "router" in name)
        for rank in ranks:
            assert_same(rank[name]["grads"], grads, 2e-6)
            assert_same(rank[name]["loss"], loss, 1e-6)
            assert_same(rank[name]["losses"], losses, 1e-6)
        assert_same_draws([rank[name]["draws"] for rank in ranks], draws, [3, 2])


def _selection_rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    model, batches = torch.load(f"{folder}/inputs.pt", weights_only=False)
    group = selection_mesh(2)["selection"]
    results = {}
    for i, (name, options) in enumerate(CASES.items()):
        if i % 2:  # gradients are the same with and without checkpointing
            model.gradient_checkpointing_enable({"use_reentrant": i % 4 == 1})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss, losses, draws = steps(wrapped, batches, group, wrapped.no_sync, **options)
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results[name] = {"grads": grads, "loss": loss, "losses": losses, "draws": draws}
        model.zero_grad()
    torch.save(results, f"{folder}/{rank}.pt")


def assert_same_draws(ranks, whole, batch_sizes):
    """Each of the M selections ran on one rank, and drew what one process draws for it."""
    seen = [_by_selection(draws, batch_sizes) for draws in ranks]
    want = _by_selection(whole, batch_sizes)
    assert not set(seen[0]) & set(seen[1])
    assert set(seen[0]) | set(seen[1]) == set(want)
    for draws in seen:
        for place, drawn in draws.items():
            assert torch.equal(drawn, want[place]), place


def _by_selection(draws, batch_sizes):
    return {
        (batch, stream, first + m): rows
        for (batch, stream, first), drawn in draws.items()
        for m, rows in enumerate(drawn.split(batch_sizes[batch]))
    }


@pytest.mark.slow
def test_mesh_of_data_and_selections(
    make_remix, make_batch, take_grads, random_selections, assert_same, tmp_path
):
    """Four ranks: two halves of the batch, each with its selections on two of them."""
    model, batch = make_remix(), make_batch((10, 7, 9, 8))
    index = random_selections(model, (4, 4, 10))  # [M, B, T, k]
    torch.save((model, batch, index), tmp_path / "inputs.pt")
    with force_selection(model, {n: i.flatten(0, 1) for n, i in index.items()}):
        steps(model, [batch], **CAUSAL)
    want = take_grads(model)
    run_on_ranks(4, _mesh_rank, str(tmp_path))
    for rank in range(4):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), want, 2e-6)


def _mesh_rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    model, batch, index = torch.load(f"{folder}/inputs.pt", weights_only=False)
    mesh = selection_mesh(2)
    assert mesh["data"].get_local_rank() == rank // 2
    half = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
    items = (batch["labels"][:, 1:] != -100).sum() / 2  # DDP averages over two halves
    wrapped = nn.parallel.DistributedDataParallel(model)
    forced = {n: i[:, half].flatten(0, 1) for n, i in index.items()}
    options = {"num_selections": 4, "selection_group": mesh["selection"], **CAUSAL}
    with force_selection(model, forced), sample_routing(wrapped, seed=0, **options) as routing:
        part = routing.expand({k: v[half] for k, v in batch.items()})
        loss = routing.loss(*token_losses(wrapped, part), items)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save(grads, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_what_the_ranks_cannot_do(make_remix, make_batch, tmp_path):
    """Errors are raised on both ranks: none waits for the other."""
    torch.save((make_remix(), make_batch()), tmp_path / "inputs.pt")
    run_on_ranks(2, _refused_rank, str(tmp_path))


def _refused_rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    model, batch = torch.load(f"{folder}/inputs.pt", weights_only=False)
    group = selection_mesh(2)["selection"]
    with pytest.raises(ValueError, match="selection_parallel=3 does not divide the 2 processes"):
        selection_mesh(3)
    for options, match in (
        ({"num_selections": 3}, "num_selections=3 cannot be spread over 2 ranks"),
        ({"grad_selections": 3}, "grad_selections=3 cannot be spread over 2 ranks"),
    ):
        with pytest.raises(ValueError, match=match):
            steps(model, [batch], group, **options)
    other = {**batch, "input_ids": batch["input_ids"].flip(0)} if rank else batch
    for given, seed in ((other, 0), (batch, rank)):
        with pytest.raises(ValueError, match="given different batches or seeds"):  # noqa: SIM117
            with sample_routing(model, seed=seed, selection_group=group) as routing:
                routing.loss(*token_losses(model, routing.expand(given)))
    with sample_routing(model, seed=0, selection_group=group) as routing:
        losses, mask = token_losses(model, routing.expand(batch))
        bad = losses.detach() * (float("nan") if rank else 1.0)
        name = "input 0 under selection 2" if rank else "rank 1 of selection_group"
        with pytest.raises(NonFiniteError, match=name):
            routing.loss(bad, mask)


# The trainer ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainer_on_two_ranks_is_as_on_one(make_llama, make_remix, make_trainer, tmp_path):
    """Same data order, draws, parameters and logs, over two epochs."""
    model, data = make_remix(make_llama(dtype=torch.float32)), examples(16)
    torch.save((model, data), tmp_path / "inputs.pt")
    trainer = make_trainer(model, train=data, **STEPS, gradient_accumulation_steps=2)
    trainer.train()
    want, losses = parameters(model), logged(trainer, "loss")
    run_on_ranks(2, _training_rank, str(tmp_path))
    for rank in range(2):
        got, rank_losses = torch.load(tmp_path / f"{rank}.pt")
        assert rank_losses == pytest.approx(losses, rel=1e-3)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def _training_rank(rank, folder):
    model, data = torch.load(f"{folder}/inputs.pt", weights_only=False)
    options = {**QUIET, **STEPS, "gradient_accumulation_steps": 2, "remix_selection_parallel": 2}
    trainer = ReMixTrainer(
        model=model,
        args=ReMixTrainingArguments(f"{folder}/run", **options),
        data_collator=collate,
        train_dataset=data,
    )
    trainer.train()
    torch.save((parameters(model), logged(trainer, "loss")), f"{folder}/{rank}.pt")


def test_arguments_are_checked(tmp_path):
    for options, match in (
        ({"remix_selection_parallel": 3}, "remix_num_selections=4 cannot be spread over 3 ranks"),
        (
            {"remix_selection_parallel": 2, "remix_grad_selections": 1},
            "remix_grad_selections=1 cannot be spread over 2 ranks",
        ),
        ({"remix_selection_parallel": 0}, "remix_selection_parallel=0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            ReMixTrainingArguments(str(tmp_path), **QUIET, **options)


def test_one_process_has_no_ranks_to_share_with(make_trainer):
    with pytest.raises(RuntimeError, match=r"selection_parallel=2 needs a process group.*torchrun"):
        make_trainer(remix_selection_parallel=2)


def test_neighbouring_ranks_read_the_same_batches():
    from accelerate.data_loader import prepare_data_loader

    read = []
    for rank in range(4):
        loader = torch.utils.data.DataLoader(list(range(22)), batch_size=3)
        loader = prepare_data_loader(loader, num_processes=4, process_index=rank)
        share_batches(loader, 2)
        read.append([batch.tolist() for batch in loader])
    assert read[0] == read[1] and read[2] == read[3]
    assert [batch for pair in zip(read[0], read[2], strict=True) for batch in pair][:7] == [
        list(range(start, start + 3)) for start in range(0, 21, 3)
    ]
    with pytest.raises(ValueError, match=r"remix_selection_parallel=2 .* list is not"):
        share_batches(torch.utils.data.DataLoader([1, 2]), 2)
