"""`update` on one process: early stop, figures, refusals, autocast and wrappers."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
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
)
from torch import Tensor, nn

from tieback.ppo_core import Batch, PPOHyperparameters, update
from tieback.ppo_core.calling import call_as


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process: one test must not set up the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_target_kl_ends_the_update_before_the_step_that_would_follow() -> None:
    batch, hyper = make_batch(LENGTHS, off_policy=0.0), PPOHyperparameters(num_ppo_epochs=6)
    _, full = run(batch, hyper)
    by_epoch = full.approx_kl_by_epoch
    assert full.optimizer_steps == 6
    assert by_epoch[2] > by_epoch[1] > by_epoch[0]

    between = (by_epoch[1] + by_epoch[2]) / 2 / 1.5
    policy = ToyActorCritic()
    stopped, stats = run(batch, replace(hyper, target_kl=between), policy=policy)
    assert stats.stopped_early
    assert stats.optimizer_steps == 2
    assert stats.approx_kl_by_epoch == pytest.approx(by_epoch[:3])
    torch.testing.assert_close(stopped, run(batch, replace(hyper, num_ppo_epochs=2))[0])
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_target_kl_before_the_first_step_leaves_the_policy_as_it_was() -> None:
    after, stats = run(make_batch(LENGTHS, off_policy=0.5), replace(HARD, target_kl=1e-6))
    assert torch.equal(after, parameters(ToyActorCritic()))
    assert stats.optimizer_steps == 0
    assert stats.stopped_early
    assert math.isnan(stats.grad_norm)


def test_the_ratio_is_1_before_the_first_step() -> None:
    batch = make_batch(LENGTHS, off_policy=0.0)
    _, stats = run(batch, PPOHyperparameters(num_ppo_epochs=3))
    assert stats.max_abs_log_ratio_first < 1e-6
    assert stats.ratio_by_epoch[0] == pytest.approx(1, abs=1e-6)
    assert stats.approx_kl_by_epoch[0] == pytest.approx(0, abs=1e-9)
    assert stats.clip_fraction_by_epoch[0] == 0
    assert stats.approx_kl_by_epoch[2] > stats.approx_kl_by_epoch[1] > 1e-4

    shifted = batch.old_logprobs.clone()
    shifted[1, 2] += 0.3
    _, stats = run(replace(batch, old_logprobs=shifted), PPOHyperparameters(num_ppo_epochs=3))
    assert stats.max_abs_log_ratio_first == pytest.approx(0.3, abs=1e-6)


def test_the_entropy_shown_of_a_uniform_policy_is_log_v() -> None:
    policy = ToyActorCritic()
    nn.init.zeros_(policy.actor)
    _, stats = run(poisoned(make_batch(LENGTHS), math.nan), PLAIN, learning_rate=0.0, policy=policy)
    assert stats.metrics()["policy/entropy"] == pytest.approx(math.log(4))


def test_explained_variance_is_that_of_the_rollout() -> None:
    batch = make_batch(LENGTHS)
    values, returns = batch.old_values[batch.mask].numpy(), batch.returns[batch.mask].numpy()
    _, stats = run(poisoned(batch, math.nan), HARD)
    assert stats.metrics()["value/explained_variance"] == pytest.approx(
        1 - np.var(returns - values) / np.var(returns), rel=1e-5
    )


def test_a_policy_needs_no_more_than_evaluate() -> None:
    toy = ToyActorCritic()

    class OnlyEvaluate:
        evaluate = staticmethod(toy.evaluate)

    optimizer, batch = torch.optim.SGD(toy.parameters(), lr=0.5), make_batch(LENGTHS)
    generator = torch.Generator().manual_seed(7)
    stats = update(OnlyEvaluate(), optimizer, batch, HARD, Accelerator(cpu=True), 2, generator=generator)
    assert_same((parameters(toy), stats), run(batch, HARD))


def test_without_a_generator_torch_s_own_decides_the_order() -> None:
    batch = make_batch(LENGTHS)
    torch.manual_seed(7)
    one = run(batch, HARD, generator=None)
    torch.manual_seed(7)
    assert_same(run(batch, HARD, generator=None), one)
    assert_same(one, run(batch, HARD))


def test_a_wholly_masked_minibatch_takes_no_step() -> None:
    batch = make_batch([0, 3], num_steps=3)
    optimizer = CountingSGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    policy = ToyActorCritic()
    optimizer.add_param_group({"params": list(policy.parameters())})
    _, stats = run(
        batch, PPOHyperparameters(num_ppo_epochs=3, num_minibatches=2), policy=policy, optimizer=optimizer
    )
    assert optimizer.steps == stats.optimizer_steps == 3


@pytest.mark.parametrize("part", ["old_logprobs", "old_values", "advantages", "returns"])
def test_a_batch_that_is_not_finite_is_refused_by_name_and_number(part: str) -> None:
    batch = make_batch(LENGTHS)
    getattr(batch, part)[2, :3] = math.nan
    with pytest.raises(FloatingPointError, match=rf"{part} \(3 of 21 elements\)"):
        run(batch, HARD)


@pytest.mark.parametrize(
    ("output", "named"),
    [(0, "policy loss"), (1, "value loss"), (2, "entropy")],
    ids=["policy", "value", "entropy"],
)
def test_a_loss_that_is_not_finite_is_refused_before_the_step(output: int, named: str) -> None:
    class Overflowing(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            outputs = list(super().evaluate(minibatch))
            outputs[output] = outputs[output] + torch.where(minibatch.inputs["x"][..., 0] > 0, math.nan, 0.0)
            return outputs[0], outputs[1], outputs[2]

    batch, policy = make_batch(LENGTHS), Overflowing()
    num_bad = int(((batch.inputs["x"][..., 0] > 0) & batch.mask).sum())
    with pytest.raises(FloatingPointError, match=rf"{named} \({num_bad} of 21 elements\)"):
        run(batch, replace(HARD, num_minibatches=1), policy=policy)
    assert torch.equal(parameters(policy), parameters(ToyActorCritic()))


def test_a_gradient_that_is_not_finite_is_refused_before_the_step() -> None:
    class InfiniteSlope(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            logprobs, values, entropies = super().evaluate(minibatch)
            return logprobs + (self.critic - self.critic.detach()).abs().sqrt().sum(), values, entropies

    policy = InfiniteSlope()
    with pytest.raises(FloatingPointError, match="gradient"):
        run(make_batch(LENGTHS), HARD, policy=policy)
    assert torch.equal(parameters(policy), parameters(ToyActorCritic()))


def test_an_entropy_that_is_not_used_may_be_anything() -> None:
    class NoEntropy(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            logprobs, values, entropies = super().evaluate(minibatch)
            return logprobs, values, entropies * math.nan

    batch = make_batch(LENGTHS)
    after, stats = run(batch, PLAIN, policy=NoEntropy())
    assert math.isnan(stats.entropy)
    torch.testing.assert_close(after, run(batch, PLAIN)[0])


def test_settings_that_do_not_fit_are_refused() -> None:
    batch = make_batch(LENGTHS)
    with pytest.raises(ValueError, match=r"7 rows .* num_minibatches = 8"):
        run(batch, replace(HARD, num_minibatches=8))
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, but is 0"):
        run(batch, HARD, micro_batch_size=0)
    with pytest.raises(ValueError, match="every element of the batch is masked"):
        run(make_batch([0, 0], num_steps=2), PLAIN)
    with pytest.raises(ValueError, match="value_only trains the critic alone, but vf_coef is 0"):
        run(batch, replace(HARD, vf_coef=0.0), value_only=True)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be 1, but is 2"):
        run(batch, HARD, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))


def test_fp16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    with pytest.raises(ValueError, match=r"fp16 is not supported.*bf16 or fp32"):
        run(make_batch(LENGTHS), HARD, accelerator=accelerator)


def test_an_evaluate_of_a_wrong_shape_is_refused() -> None:
    class LastOnly(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            logprobs, values, entropies = super().evaluate(minibatch)
            return logprobs, values[:, -1:], entropies

    with pytest.raises(ValueError, match=r"values of shape \[2, 1\] for a minibatch of shape \[2, 5\]"):
        run(make_batch(LENGTHS), HARD, policy=LastOnly())


def test_bf16_autocast_reaches_evaluate_and_losses_stay_in_fp32() -> None:
    class Recorder(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            autocast.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().evaluate(minibatch)

    autocast: set[Any] = set()
    batch = make_batch(LENGTHS)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    policy = accelerator.prepare(Recorder())
    after, stats = run(batch, PLAIN, policy=policy, accelerator=accelerator)
    assert autocast == {torch.bfloat16}
    AcceleratorState._reset_state(reset_partial_state=True)
    exact, exact_stats = run(batch, PLAIN)
    torch.testing.assert_close(after, exact, rtol=0.02, atol=0.02)
    assert stats.policy_loss == pytest.approx(exact_stats.policy_loss, abs=0.02)


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_outputs_are_refused(column: int, dtype: torch.dtype) -> None:
    class Rounded(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            outputs = list(super().evaluate(minibatch))
            outputs[column] = outputs[column].to(dtype)
            return tuple(outputs)

    name = ("log-probabilities", "values", "entropies")[column]
    with pytest.raises(ValueError, match=rf"returned {name} in {dtype}.*compute them in float32"):
        run(make_batch(LENGTHS), HARD, policy=Rounded())


def test_a_call_of_a_module_or_its_wrapper_leads_to_evaluate_and_the_policy_gets_its_forward_back() -> None:
    class Policy(ToyActorCritic):
        def forward(self) -> str:
            return "its own forward"

        def evaluate(self, minibatch: Batch) -> Any:
            if len(minibatch) == 0:
                raise RuntimeError("no rows")
            return self.forward()

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> str:
            return "wrapped: " + self.module(*args)

    batch = make_batch(LENGTHS)
    for instance_forward in (None, lambda: "mixed precision's forward"):
        policy = Policy()
        if instance_forward is not None:
            policy.forward = instance_forward  # type: ignore[method-assign]
        expected = policy.forward()
        assert call_as(policy, policy.evaluate, batch) == expected
        assert call_as(policy, policy.evaluate, batch, through=Wrapper(policy)) == f"wrapped: {expected}"
        with pytest.raises(RuntimeError, match="no rows"):
            call_as(policy, policy.evaluate, batch[:0], through=Wrapper(policy))
        assert policy.forward() == expected
        assert ("forward" in vars(policy)) == (instance_forward is not None)


def test_a_batch_names_the_shapes_that_do_not_fit() -> None:
    batch = make_batch(LENGTHS)
    with pytest.raises(ValueError, match=r"old_values has the shape \[7, 6\], but mask \[7, 5\]"):
        replace(batch, old_values=torch.zeros(7, 6))
    with pytest.raises(ValueError, match=r"inputs\['x'\] has 6 rows, but mask 7"):
        replace(batch, inputs={"x": torch.zeros(6, 5)})
    with pytest.raises(ValueError, match=r"bool .* torch\.float32"):
        replace(batch, mask=torch.ones(7, 5))


def test_an_optional_column_goes_wherever_the_others_go_and_none_stays_none() -> None:
    batch = make_batch(LENGTHS)
    # Twins of a column that every test of `update` follows.
    full = replace(batch, ref_logprobs=batch.old_logprobs.clone())
    order, rows = torch.tensor([4, 2, 0, 6, 5, 1, 3]), torch.tensor([5, 0, 3])

    def views(one: Batch) -> list[Batch]:
        return [
            one[order],
            one[2:4],
            one[one.mask[:, 1]],
            one.flatten_time(),
            *one.micro_batches(rows.split(2), 3),
        ]

    for with_column, without in zip(views(full), views(batch), strict=True):
        assert with_column.ref_logprobs is not None
        torch.testing.assert_close(with_column.ref_logprobs, with_column.old_logprobs, rtol=0, atol=0)
        torch.testing.assert_close(with_column.old_logprobs, without.old_logprobs, rtol=0, atol=0)
        assert without.ref_logprobs is None
    moved = full.to("meta")
    assert moved.ref_logprobs is not None
    assert moved.ref_logprobs.device.type == "meta"
    assert batch.to("meta").ref_logprobs is None
    with pytest.raises(ValueError, match=r"ref_logprobs has the shape \[7, 6\], but mask \[7, 5\]"):
        replace(batch, ref_logprobs=torch.zeros(7, 6))
