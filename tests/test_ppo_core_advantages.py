"""GAE, whitening, masked mean and explained variance: closed forms, the NumPy reference, and invariances."""

import math

import numpy as np
import pytest
import torch
from reference import ppo as reference
from torch import Tensor

from tieback.ppo_core import explained_variance, gae, length_adaptive_lambda, masked_mean, whiten

GARBAGE = [math.nan, math.inf, -math.inf, 1e9]


def random_rollout(seed: int, num_rows: int = 6, num_steps: int = 9) -> dict[str, Tensor]:
    """Rewards, discounts with terminations, values, and a mask with holes anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    discounts = torch.where(rand(num_rows, num_steps) < 0.2, 0.0, 0.8 + 0.2 * rand(num_rows, num_steps))
    return {
        "rewards": 4 * rand(num_rows, num_steps) - 2,
        "discounts": discounts,
        "values": 4 * rand(num_rows, num_steps + 1) - 2,
        "mask": rand(num_rows, num_steps) < 0.7,
    }


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_gae_equals_the_mixture_of_n_step_advantages_without_the_masked_steps(
    seed: int, gae_lambda: float
) -> None:
    rollout = random_rollout(seed)
    expected = [
        reference.gae_row(*(rollout[name][b].numpy().astype(np.float64) for name in ("rewards", "discounts", "values")),
                          gae_lambda, rollout["mask"][b].numpy())
        for b in range(6)
    ]  # fmt: skip
    torch.testing.assert_close(
        gae(**rollout, gae_lambda=gae_lambda).numpy(),
        np.stack(expected, dtype=np.float32),
        rtol=1e-5,
        atol=1e-5,
    )


def test_each_row_may_have_its_own_lambda() -> None:
    rollout = random_rollout(3)
    lambdas = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.95, 1.0])
    together = gae(**rollout, gae_lambda=lambdas)
    for row, gae_lambda in enumerate(lambdas.tolist()):
        alone = gae(
            **{name: column[row : row + 1] for name, column in rollout.items()}, gae_lambda=gae_lambda
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-6)


def test_the_adaptive_lambda_reaches_a_reward_over_a_share_of_the_length() -> None:
    lengths = torch.tensor([1, 20, 40, 200, 2000])
    expected = [0.0, 0.0, 0.5, 0.9, 0.99]
    assert length_adaptive_lambda(lengths, 0.05).tolist() == pytest.approx(expected)
    # Σ λ^t over a long row, the reach in steps, is α·l.
    for length in (200, 2000):
        gae_lambda = length_adaptive_lambda(torch.tensor([length]), 0.05).item()
        assert 1 / (1 - gae_lambda) == pytest.approx(0.05 * length, rel=1e-4)


def test_gae_does_not_bootstrap_from_a_padded_value() -> None:
    advantages = gae(
        rewards=torch.tensor([[0.0, 1.0, 7.0]]),
        discounts=torch.tensor([[1.0, 0.0, 1.0]]),
        values=torch.tensor([[0.0, 0.0, 100.0, 100.0]]),
        gae_lambda=0.95,
        mask=torch.tensor([[True, True, False]]),
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.95, 1.0, 0.0]]))


def test_gae_with_lambda_0_is_the_td_error_and_with_lambda_1_the_return_minus_the_value() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[0.5, 1.0, -1.0, 4.0]])
    discounts = torch.full((1, 3), 0.5)
    td_error = torch.tensor([[1 + 0.5 * 1 - 0.5, 2 + 0.5 * -1 - 1, 3 + 0.5 * 4 + 1]])
    torch.testing.assert_close(gae(rewards, discounts, values, 0.0), td_error)
    last = 3 + 0.5 * 4
    returns = torch.tensor([[1 + 0.5 * (2 + 0.5 * last), 2 + 0.5 * last, last]])
    torch.testing.assert_close(gae(rewards, discounts, values, 1.0), returns - values[:, :-1])


def test_gae_bootstraps_a_row_that_goes_on_from_the_last_column_even_past_padding() -> None:
    advantages = gae(
        rewards=torch.zeros(1, 3),
        discounts=torch.tensor([[0.9, 0.9, 0.1]]),
        values=torch.tensor([[0.0, 0.0, 55.0, 10.0]]),
        gae_lambda=1.0,
        mask=torch.tensor([[True, True, False]]),
    )
    torch.testing.assert_close(advantages, torch.tensor([[8.1, 9.0, 0.0]]))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gae_ignores_whatever_stands_under_the_mask(garbage: float) -> None:
    rollout = random_rollout(3)
    clean = gae(**rollout, gae_lambda=0.95)
    mask = rollout["mask"]
    dirty = {
        "rewards": rollout["rewards"].masked_fill(~mask, garbage),
        "discounts": rollout["discounts"].masked_fill(~mask, garbage),
        "values": torch.cat(
            [rollout["values"][:, :-1].masked_fill(~mask, garbage), rollout["values"][:, -1:]], dim=1
        ),
        "mask": mask,
    }
    assert torch.equal(gae(**dirty, gae_lambda=0.95), clean)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gae_does_not_read_the_bootstrap_after_a_discount_of_0(garbage: float) -> None:
    advantages = gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0, garbage]]), 0.95
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.95, 1.0]]))


def test_gae_is_unchanged_by_right_padding() -> None:
    rollout = random_rollout(4)
    clean = gae(**rollout, gae_lambda=0.95)
    pad = torch.full((6, 5), math.nan)
    padded = gae(
        rewards=torch.cat([rollout["rewards"], pad], dim=1),
        discounts=torch.cat([rollout["discounts"], pad], dim=1),
        values=torch.cat([rollout["values"][:, :-1], pad, rollout["values"][:, -1:]], dim=1),
        gae_lambda=0.95,
        mask=torch.cat([rollout["mask"], torch.zeros(6, 5, dtype=torch.bool)], dim=1),
    )
    assert torch.equal(padded[:, :9], clean)
    assert not padded[:, 9:].any()


def test_gae_is_unchanged_by_masked_steps_inserted_in_the_middle() -> None:
    rollout = random_rollout(5) | {"mask": torch.ones(6, 9, dtype=torch.bool)}
    clean = gae(**rollout, gae_lambda=0.9)
    kept = [0, 1, 4, 5, 6, 8, 9, 10, 11]  # a tool's tokens stand at 2, 3 and 7

    def spread(x: Tensor, fill: float) -> Tensor:
        wide = torch.full((6, 12), fill, dtype=x.dtype)
        wide[:, kept] = x
        return wide

    inserted = gae(
        rewards=spread(rollout["rewards"], 9.0),
        discounts=spread(rollout["discounts"], 0.0),
        values=torch.cat([spread(rollout["values"][:, :-1], math.nan), rollout["values"][:, -1:]], dim=1),
        gae_lambda=0.9,
        mask=spread(rollout["mask"], False),
    )
    assert torch.equal(inserted[:, kept], clean)


def test_gae_treats_each_row_by_itself() -> None:
    rollout = random_rollout(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = {name: tensor[order] for name, tensor in rollout.items()}
    assert torch.equal(gae(**permuted, gae_lambda=0.95), gae(**rollout, gae_lambda=0.95)[order])


def test_gae_without_a_mask_counts_every_step() -> None:
    rollout = random_rollout(7)
    everything = torch.ones_like(rollout.pop("mask"))
    assert torch.equal(gae(**rollout, gae_lambda=0.95), gae(**rollout, gae_lambda=0.95, mask=everything))


def test_gae_names_the_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"values must be \[B, T \+ 1\] = \[2, 4\].*\[2, 3\]"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), 0.95)
    with pytest.raises(ValueError, match=r"discounts \[2, 2\]"):
        gae(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 4), 0.95)


def test_masked_mean_weighs_every_unmasked_element_alike() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_mean(x, mask).item() == 4.0


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_mean_gives_no_gradient_to_what_is_masked(garbage: float) -> None:
    x = torch.tensor([1.0, 2.0, garbage], requires_grad=True)
    masked_mean(x, torch.tensor([True, True, False])).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.5, 0.0]


def test_masked_mean_of_nothing_is_0() -> None:
    assert masked_mean(torch.tensor([math.nan]), torch.tensor([False])).item() == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_whiten_equals_the_reference_whatever_is_masked(garbage: float, shift_mean: bool) -> None:
    rollout = random_rollout(8)
    x, mask = 3 * rollout["rewards"] + 100, rollout["mask"]
    expected = reference.whiten(x.numpy().astype(np.float64), mask.numpy(), shift_mean)
    result = whiten(x.masked_fill(~mask, garbage), mask, shift_mean)
    torch.testing.assert_close(result.numpy(), expected.astype(np.float32), rtol=1e-5, atol=2e-5)


def test_whiten_brings_the_mean_to_0_and_the_variance_to_1() -> None:
    rollout = random_rollout(9)
    kept = whiten(rollout["rewards"], rollout["mask"])[rollout["mask"]]
    assert abs(kept.mean().item()) < 1e-6
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_whiten_without_shift_keeps_the_mean() -> None:
    x, mask = torch.tensor([[3.0, 5.0, 7.0]]), torch.ones(1, 3, dtype=torch.bool)
    kept = whiten(x, mask, shift_mean=False)
    assert kept.mean().item() == pytest.approx(5)
    assert kept.var(unbiased=False).item() == pytest.approx(1)


def test_whiten_of_equal_elements_or_of_one_is_0() -> None:
    assert not whiten(torch.full((2, 2), 3.5), torch.ones(2, 2, dtype=torch.bool)).any()
    assert not whiten(torch.tensor([[8.0, math.nan]]), torch.tensor([[True, False]])).any()


def test_explained_variance_of_perfect_constant_and_opposite_critics() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(torch.full((1, 4), 9.0), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_explained_variance_ignores_whatever_stands_under_the_mask(garbage: float) -> None:
    rollout = random_rollout(10)
    values, returns, mask = rollout["values"][:, 1:], rollout["rewards"], rollout["mask"]
    kept_values, kept_returns = values[mask].numpy(), returns[mask].numpy()
    expected = 1 - np.var(kept_returns - kept_values) / np.var(kept_returns)
    result = explained_variance(values.masked_fill(~mask, garbage), returns.masked_fill(~mask, garbage), mask)
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_explained_variance_of_returns_that_do_not_vary_is_nan() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert math.isnan(explained_variance(torch.zeros(1, 2), torch.ones(1, 2), mask).item())
