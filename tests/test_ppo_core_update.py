"""`update` on one process: against plain gradient descent in NumPy, and what must not change it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from reference import ppo as reference
from reference.toy import (
    HARD,
    LENGTHS,
    PLAIN,
    CountingSGD,
    ToyActorCritic,
    assert_same,
    make_batch,
    parameters,
    poisoned,
    run,
    to_linear,
    to_reference,
    with_imitation,
    with_reference_and_weights,
)
from torch import Tensor
from torch.utils.data import DataLoader

from tieback.ppo_core import (
    Batch,
    PolicyOutputs,
    PPOHyperparameters,
    RowLengths,
    Term,
    kl_estimate,
    masked_mean,
    ppo_terms,
)
from tieback.ppo_core import step as step_module


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process: one test must not set up the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SETTINGS = {
    "default": {},
    "clip-higher": {"clip_range_high": 0.4},
    "dual clip": {"dual_clip": 1.3},
    "no value clip": {"value_clip_range": None, "vf_coef": 1.0},
    "entropy": {"ent_coef": 0.1},
    "clipped gradient": {"max_grad_norm": 0.05},
}


@pytest.mark.parametrize("whiten_advantages", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_update_equals_gradient_descent_by_formula(settings: dict[str, Any], whiten_advantages: bool) -> None:
    hyper = PPOHyperparameters(
        **{"max_grad_norm": 0.0, "num_ppo_epochs": 3, "num_minibatches": 2} | settings,
        whiten_advantages=whiten_advantages,
    )
    batch = make_batch(LENGTHS, seed=1)
    after, stats = run(batch, hyper)

    generator = torch.Generator().manual_seed(7)
    epochs = [
        [part.tolist() for part in torch.randperm(7, generator=generator).tensor_split(2)] for _ in range(3)
    ]
    data = to_reference(batch)
    if whiten_advantages:
        data.advantages = reference.whiten(data.advantages, data.mask)
    model, figures = reference.update(
        to_linear(ToyActorCritic()),
        data,
        epochs,
        reference.Settings(
            low=hyper.clip_range,
            high=hyper.clip_range_high or hyper.clip_range,
            dual_clip=hyper.dual_clip,
            value_clip_range=hyper.value_clip_range,
            vf_coef=hyper.vf_coef,
            ent_coef=hyper.ent_coef,
            max_grad_norm=hyper.max_grad_norm,
        ),
        learning_rate=0.5,
    )
    np.testing.assert_allclose(after, np.append(model.actor, model.critic), rtol=2e-5, atol=2e-6)
    metrics = stats.metrics()
    assert {name: metrics[name] for name in figures} == pytest.approx(figures, rel=2e-5, abs=1e-6)
    assert 0 < figures["policy/clip_fraction"] < 1, "nothing was clipped: the comparison proves too little"


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 100])
def test_the_micro_batch_size_changes_nothing(micro_batch_size: int) -> None:
    batch = make_batch(LENGTHS)
    assert_same(run(batch, HARD, micro_batch_size), run(batch, HARD, 4))


@pytest.mark.parametrize("max_positions", [None, 6])
def test_passes_of_like_lengths_change_nothing_and_leave_padding_out(max_positions: int | None) -> None:
    batch = make_batch(LENGTHS)
    seen: list[torch.Size] = []

    def trim(part: Batch) -> Batch:
        steps = int(part.mask.sum(1).max())
        trimmed = part.shortened(steps, {name: tensor[:, :steps] for name, tensor in part.inputs.items()})
        seen.append(trimmed.mask.shape)
        return trimmed

    lengths = RowLengths(LENGTHS, trim, max_positions)
    assert_same(run(batch, HARD, 2, lengths=lengths), run(batch, HARD, 2))
    assert all(rows <= 2 and (max_positions is None or rows * steps <= max_positions) for rows, steps in seen)
    # In each epoch the seven rows lie in passes of at most two, of which none is longer than its longest row.
    assert sum(rows for rows, _ in seen) == 2 * len(LENGTHS)
    assert sum(rows * steps for rows, steps in seen) < 2 * len(LENGTHS) * max(LENGTHS)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
def test_garbage_under_the_mask_changes_nothing(garbage: float) -> None:
    batch = make_batch(LENGTHS)
    assert_same(run(poisoned(batch, garbage), HARD), run(batch, HARD))
    batch = with_reference_and_weights(batch)
    for estimator in ("k1", "k2", "k3"):
        hyper = replace(HARD, kl_loss_coef=0.3, kl_loss_estimator=estimator)
        assert_same(run(poisoned(batch, garbage), hyper), run(batch, hyper))


def test_right_padding_changes_nothing() -> None:
    batch = make_batch(LENGTHS)

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros_like(tensor[:, :1]).expand(-1, 4, *tensor.shape[2:])], dim=1)

    wide = poisoned(batch._map(padded), math.nan)
    assert wide.mask.shape == (7, 9)
    assert_same(run(wide, HARD), run(batch, HARD))


def test_the_order_of_the_rows_changes_nothing() -> None:
    batch, order = make_batch(LENGTHS), torch.tensor([4, 2, 0, 6, 5, 1, 3])
    hyper = replace(HARD, num_minibatches=1)
    assert_same(run(batch[order], hyper), run(batch, hyper))


def test_single_steps_as_rows_change_nothing() -> None:
    batch, hyper = make_batch(LENGTHS), replace(HARD, num_minibatches=1)
    flat = batch.flatten_time()
    assert flat.mask.shape == (35, 1)
    assert flat.inputs["x"].shape == (35, 3)

    class SingleSteps(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            with_time = {name: tensor.unsqueeze(1) for name, tensor in minibatch.inputs.items()}
            return super().evaluate(replace(minibatch, inputs=with_time))

    assert_same(run(flat, hyper, micro_batch_size=8, policy=SingleSteps()), run(batch, hyper))


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_loss_is_a_mean_over_tokens_of_the_minibatch_not_of_a_micro_batch(micro_batch_size: int) -> None:
    batch = make_batch([1, 3], off_policy=0.0)
    batch = replace(batch, advantages=torch.tensor([[1.0] * 3, [-1.0] * 3]))
    after, _ = run(batch, PLAIN, micro_batch_size, learning_rate=1.0)
    gradient, _, num = reference.minibatch(
        to_linear(ToyActorCritic()), to_reference(batch), [0, 1], reference.Settings(value_clip_range=0.2)
    )
    assert num == 4
    expected = np.append(gradient.actor, gradient.critic)
    np.testing.assert_allclose(parameters(ToyActorCritic()) - after, expected, atol=1e-6)


@pytest.mark.parametrize("prepared", [True, False])
def test_optimiser_steps_are_epochs_times_minibatches(prepared: bool) -> None:
    accelerator, policy = Accelerator(cpu=True), ToyActorCritic()
    plain = CountingSGD(policy.parameters(), lr=0.01)
    optimizer = accelerator.prepare(plain) if prepared else plain
    hyper = PPOHyperparameters(num_ppo_epochs=3, num_minibatches=4)
    _, stats = run(
        make_batch(LENGTHS),
        hyper,
        micro_batch_size=1,
        policy=policy,
        optimizer=optimizer,
        accelerator=accelerator,
    )
    assert plain.steps == stats.optimizer_steps == 12
    assert stats.metrics()["optimizer_steps"] == 12.0
    assert not stats.stopped_early


def test_the_last_batch_of_a_prepared_loader_does_not_make_every_micro_batch_step() -> None:
    accelerator, policy = Accelerator(cpu=True), ToyActorCritic()
    plain = CountingSGD(policy.parameters(), lr=0.5)
    prepared, loader = accelerator.prepare(plain, DataLoader(range(7), batch_size=7))
    hyper = PPOHyperparameters(num_ppo_epochs=2, num_minibatches=2)
    batch = make_batch(LENGTHS)
    for _ in loader:  # exactly one rollout: Accelerate flags the end of the loader here
        assert accelerator.gradient_state.end_of_dataloader
        result = run(batch, hyper, 1, policy=policy, optimizer=prepared, accelerator=accelerator)
    assert plain.steps == 4
    assert_same(result, run(batch, hyper))


def test_only_the_last_micro_batch_of_a_minibatch_synchronises() -> None:
    class Recorder(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            flags.append(accelerator.sync_gradients)
            return super().evaluate(minibatch)

    flags: list[bool] = []
    accelerator = Accelerator(cpu=True)
    hyper = PPOHyperparameters(num_ppo_epochs=1, num_minibatches=2)
    run(make_batch(LENGTHS), hyper, 2, policy=Recorder(), accelerator=accelerator)
    assert flags == [False, True, False, True]
    assert accelerator.sync_gradients


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    class Recorder(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            seen.extend(minibatch.inputs["row"].tolist())
            return super().evaluate(minibatch)

    seen: list[int] = []
    batch = make_batch(LENGTHS)
    batch = replace(batch, inputs=batch.inputs | {"row": torch.arange(7)})
    hyper = PPOHyperparameters(num_ppo_epochs=2, num_minibatches=3)
    run(batch, hyper, policy=Recorder())
    first, second = seen[:7], seen[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_max_grad_norm_bounds_every_step() -> None:
    batch = make_batch(LENGTHS)
    hyper = replace(PLAIN, num_minibatches=2, max_grad_norm=1e-3)
    after, stats = run(batch, replace(hyper, num_minibatches=1), learning_rate=1.0)
    moved = (after - parameters(ToyActorCritic())).norm().item()
    assert moved == pytest.approx(1e-3, rel=1e-2)
    after, _ = run(batch, hyper, learning_rate=1.0)
    assert (after - parameters(ToyActorCritic())).norm().item() <= 2.01e-3
    free, free_stats = run(batch, replace(PLAIN, max_grad_norm=0.0), learning_rate=1.0)
    assert (free - parameters(ToyActorCritic())).norm().item() == pytest.approx(
        free_stats.grad_norm, rel=1e-4
    )
    assert stats.grad_norm == pytest.approx(free_stats.grad_norm, rel=1e-5), (
        "the norm is that of before clipping"
    )


def test_gradients_from_before_are_not_used_and_none_are_left() -> None:
    policy = ToyActorCritic()
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    batch = make_batch(LENGTHS)
    assert_same(run(batch, HARD, policy=policy), run(batch, HARD))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_each_parameter_group_keeps_its_own_learning_rate() -> None:
    policy = ToyActorCritic()
    groups = [{"params": [policy.actor], "lr": 0.1}, {"params": [policy.critic], "lr": 0.7}]
    batch = make_batch(LENGTHS)
    optimizer = torch.optim.SGD(groups)
    run(batch, PLAIN, policy=policy, optimizer=optimizer)
    gradient, _, _ = reference.minibatch(
        to_linear(ToyActorCritic()), to_reference(batch), range(7), reference.Settings(value_clip_range=0.2)
    )
    before = ToyActorCritic()
    np.testing.assert_allclose((before.actor - policy.actor).detach(), 0.1 * gradient.actor, atol=1e-6)
    np.testing.assert_allclose((before.critic - policy.critic).detach(), 0.7 * gradient.critic, atol=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.7]


def test_value_only_trains_the_critic_alone() -> None:
    policy = ToyActorCritic()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.5)
    hyper = replace(HARD, target_kl=1e-9)
    _, stats = run(make_batch(LENGTHS), hyper, policy=policy, optimizer=optimizer, value_only=True)
    assert torch.equal(policy.actor, ToyActorCritic().actor)
    assert not torch.isclose(policy.critic, ToyActorCritic().critic).any()
    assert stats.optimizer_steps == 4


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_a_further_term_is_one_entry_that_is_learned_from_and_logged(
    monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
) -> None:
    """A KL loss to a reference: besides the term itself, it needs the batch's optional column."""
    clean = make_batch(LENGTHS)
    ref_logprobs = clean.old_logprobs + torch.randn(7, 5, generator=torch.Generator().manual_seed(5))
    batch = poisoned(replace(clean, ref_logprobs=ref_logprobs), math.nan)
    without, plain_stats = run(batch, PLAIN, learning_rate=1.0)

    def terms_and_kl(batch: Batch, outputs: PolicyOutputs, hyper: PPOHyperparameters) -> dict[str, Term]:
        assert batch.ref_logprobs is not None
        kl = kl_estimate(outputs.logprobs, batch.ref_logprobs, "k2")
        return {**ppo_terms(batch, outputs, hyper), "kl/loss": Term(0.3, kl)}

    monkeypatch.setattr(step_module, "ppo_terms", terms_and_kl)
    after, stats = run(batch, PLAIN, micro_batch_size, learning_rate=1.0)

    toy = ToyActorCritic()
    kl = masked_mean((toy.evaluate(clean)[0] - ref_logprobs).square() / 2, clean.mask)
    (0.3 * kl).backward()
    assert toy.actor.grad is not None
    moved = torch.cat([toy.actor.grad.flatten(), torch.zeros(3)])
    torch.testing.assert_close(without - after, moved, rtol=1e-5, atol=1e-6)
    expected = plain_stats.metrics() | {"kl/loss": kl.item()}
    expected["grad_norm"] = stats.grad_norm
    assert stats.metrics() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_importance_weights_multiply_what_the_policy_learns_from_and_nothing_else(
    micro_batch_size: int,
) -> None:
    batch = with_reference_and_weights(make_batch(LENGTHS))
    hyper = replace(PLAIN, kl_loss_coef=0.2, ent_coef=0.1)
    after, stats = run(batch, hyper, micro_batch_size, learning_rate=1.0)

    toy = ToyActorCritic()
    terms = ppo_terms(replace(batch, importance_weights=None), PolicyOutputs(*toy.evaluate(batch)), hyper)
    weighted = {
        name: masked_mean(term.elements * (batch.importance_weights if name in ("policy/loss", "kl/loss") else 1), batch.mask)
        for name, term in terms.items()
    }  # fmt: skip
    sum(terms[name].coefficient * mean for name, mean in weighted.items()).backward()
    moved = torch.cat([toy.actor.grad.flatten(), toy.critic.grad.flatten()])
    torch.testing.assert_close(parameters(ToyActorCritic()) - after, moved, rtol=1e-5, atol=1e-6)
    assert {name: stats.terms[name] for name in weighted} == pytest.approx(
        {name: mean.item() for name, mean in weighted.items()}, rel=1e-5, abs=1e-6
    )


def test_a_coefficient_of_zero_leaves_its_term_out_whatever_its_elements_are() -> None:
    class NoValues(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            logprobs, values, entropies = super().evaluate(minibatch)
            return logprobs, values * math.nan, entropies

    batch, hyper = make_batch(LENGTHS), replace(PLAIN, vf_coef=0.0)
    optimizer_of = {
        policy: torch.optim.AdamW(policy.parameters(), lr=0.05, weight_decay=0.5)
        for policy in (NoValues(), ToyActorCritic())
    }
    results = [run(batch, hyper, policy=policy, optimizer=opt) for policy, opt in optimizer_of.items()]
    assert torch.equal(results[0][0], results[1][0])
    assert math.isnan(results[0][1].value_loss)
    for policy in optimizer_of:
        assert torch.equal(policy.critic, ToyActorCritic().critic), "weight decay moved what is not trained"
        assert not torch.isclose(policy.actor, ToyActorCritic().actor).any()


# Imitation.


def test_imitated_actions_are_pulled_by_their_likelihood_under_the_mask_and_outside_of_it() -> None:
    batch = with_imitation(make_batch(LENGTHS))
    weights = batch.imitation_weights
    assert weights is not None
    assert ((weights > 0) & ~batch.mask).any()
    assert ((weights > 0) & batch.mask).any()
    with_it, stats = run(batch, PLAIN)
    without, _ = run(replace(batch, imitation_weights=None), PLAIN)

    policy = ToyActorCritic()
    logprobs, _, _ = policy.evaluate(batch)
    loss = -(weights * logprobs).sum() / batch.mask.sum()
    loss.backward()
    assert policy.actor.grad is not None
    pulled = torch.cat([policy.actor.grad.flatten(), torch.zeros_like(policy.critic)])
    torch.testing.assert_close(with_it, without - 0.5 * pulled, rtol=0, atol=2e-6)
    assert stats.metrics()["imitation/loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_the_micro_batch_size_changes_no_imitation(micro_batch_size: int) -> None:
    batch = with_imitation(make_batch(LENGTHS))
    assert_same(run(batch, HARD, micro_batch_size), run(batch, HARD, 2))


def test_while_the_critic_learns_alone_nothing_is_imitated() -> None:
    batch = make_batch(LENGTHS)
    imitating, _ = run(with_imitation(batch), PLAIN, value_only=True)
    plain, _ = run(batch, PLAIN, value_only=True)
    torch.testing.assert_close(imitating, plain, rtol=0, atol=0)


def test_nothing_is_imitated_in_the_micro_batches_that_keep_processes_in_step() -> None:
    batch = with_imitation(make_batch([2, 2]))
    *_, filler = batch.micro_batches([torch.tensor([0, 1])], 2)
    assert filler.imitation_weights is not None
    assert not filler.mask.any()
    assert not filler.imitation_weights.any()
