"""A critic over bins: its target and its loss by closed form, and the head of one number that it starts from."""

import math

import pytest
import torch
from torch import Tensor

from tieback.ppo_core import (
    Batch,
    PolicyOutputs,
    PPOHyperparameters,
    bin_offsets,
    expected_values,
    head_over_bins,
    policy_outputs,
    ppo_terms,
    two_hot_loss,
)
from tieback.ppo_core.stats import diagnostics

BINS, RANGE = 21, 10.0  # a bin at each whole number


def target(value: float) -> Tensor:
    """The two-hot target, written out anew: the nearest whole numbers share 1."""
    value = min(max(value, -RANGE), RANGE)
    return torch.tensor([max(0.0, 1 - abs(value - whole)) for whole in range(-10, 11)])


@pytest.mark.parametrize("value", [0.0, 3.0, 2.25, -2.25, -0.4, 9.9, 10.0, -10.0, 17.0, -1e6])
def test_the_loss_is_the_cross_entropy_to_a_target_whose_mean_is_the_return(value: float) -> None:
    within = min(max(value, -RANGE), RANGE)
    logits = torch.randn(2, 3, BINS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = two_hot_loss(logits, torch.full((2, 3), value), RANGE)
    torch.testing.assert_close(
        loss, -(torch.log_softmax(logits, -1) * target(value)).sum(-1), rtol=0, atol=3e-6
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.softmax(logits, -1) - target(value), rtol=0, atol=1e-6)
    exact = expected_values(target(value).clamp(min=1e-30).log(), RANGE)
    assert exact.item() == pytest.approx(within, abs=1e-5)


def test_the_best_fit_to_returns_that_vary_has_their_mean_as_its_value() -> None:
    returns = torch.tensor([-7.3, 0.4, 0.45, 1.0, 9.6])
    logits = torch.zeros(BINS, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(600):
        optimizer.zero_grad()
        two_hot_loss(logits.expand(5, BINS), returns, RANGE).mean().backward()
        optimizer.step()
    assert expected_values(logits.detach(), RANGE).item() == pytest.approx(returns.mean().item(), abs=1e-2)


@pytest.mark.parametrize(("bins", "value_range"), [(21, 10.0), (101, 10.0), (255, 3.0)])
def test_a_head_over_bins_starts_with_the_values_of_a_head_of_one_number(
    bins: int, value_range: float
) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(4, 5, 8, generator=draw),
        torch.randn(1, 8, generator=draw),
        0.1 * value_range,
    )
    weight *= 0.3 * value_range / (hidden @ weight.T).abs().max()
    numbers = (hidden @ weight.T).squeeze(-1) + bias
    logits = hidden @ head_over_bins(weight, bins, value_range).T + bin_offsets(bins, value_range, bias)
    torch.testing.assert_close(expected_values(logits, value_range), numbers, rtol=0, atol=1e-5 * value_range)
    # Its width is a tenth of the range, so that one step of a gradient on it goes as far for any number of bins.
    centres = torch.linspace(-value_range, value_range, bins)
    variance = (torch.softmax(logits, -1) * (centres - numbers.unsqueeze(-1)).square()).sum(-1)
    torch.testing.assert_close(variance.sqrt(), torch.full((4, 5), value_range / 10), rtol=1e-3, atol=0)


def test_no_return_pulls_harder_the_further_off_it_is() -> None:
    pulls = []
    for value in (1.0, 5.0, 50.0):
        logits = bin_offsets(BINS, RANGE, 0.0).requires_grad_()
        two_hot_loss(logits, torch.tensor(value), RANGE).backward()
        assert logits.grad is not None
        pulls.append(logits.grad.abs().sum().item())
    assert max(pulls) <= 2  # the distance between two distributions
    assert pulls[2] == pytest.approx(pulls[1], rel=1e-3)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_gives_no_gradient_and_is_not_hidden(garbage: float) -> None:
    logits = torch.zeros(3, BINS)
    logits[1, 4] = garbage
    logits.requires_grad_()
    returns = torch.tensor([0.5, 0.5, garbage])
    loss = two_hot_loss(logits, returns, RANGE)
    assert torch.isfinite(loss).tolist() == [True, False, False]
    loss[0].backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[1:].any()


def test_the_term_takes_the_place_of_the_squared_error() -> None:
    column = torch.zeros(1, 2)
    returns = torch.tensor([[0.5, -3.0]])
    batch = Batch({}, column, column, column, returns, torch.ones(1, 2, dtype=torch.bool))
    hyper = PPOHyperparameters(value_bins=BINS, value_clip_range=None, vf_coef=0.5)
    logits = torch.randn(1, 2, BINS, generator=torch.Generator().manual_seed(2))
    outputs = policy_outputs(column, logits, column, hyper)
    torch.testing.assert_close(outputs.values, expected_values(logits, RANGE))
    terms = ppo_terms(batch, outputs, hyper)
    coefficient, elements, trains_critic, mask = terms["value/loss"]
    assert (coefficient, trains_critic, mask) == (0.5, True, None)
    assert torch.equal(elements, two_hot_loss(logits, returns, RANGE))
    # A cross-entropy above the squared error is no value that was clipped.
    assert not diagnostics(batch, outputs, terms, hyper)["value_clip_fraction"].any()
    number = policy_outputs(column, column, column, PPOHyperparameters())
    assert number == PolicyOutputs(column, column, column, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_bins": 20}, "value_bins must be a whole number of at least 21, but is 20"),
        ({"value_bins": 51.5}, "value_bins must be a whole number of at least 21, but is 51.5"),
        ({"value_bins": 51, "value_range": math.inf}, "value_range must be finite, but is inf"),
        ({"value_range": 0.0}, "value_range must be greater than 0, but is 0.0"),
        ({"value_bins": 51, "value_clip_range": 0.2}, "value_clip_range=0.2 shapes the squared error.*set value_clip_range to null"),
        ({"value_bins": 51, "huber_delta": 1.0}, "huber_delta=1.0 shapes the squared error"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOHyperparameters(**({"value_clip_range": None} | settings))
