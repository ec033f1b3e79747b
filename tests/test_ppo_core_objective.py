"""Policy loss, value loss, entropy, KL estimators and their settings: closed forms and the NumPy reference."""

import math
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
import torch
from reference import ppo as reference
from torch import Tensor

from tieback.ppo_core import (
    Batch,
    PolicyOutputs,
    PPOHyperparameters,
    entropy,
    kl_estimate,
    kl_loss,
    masked_mean,
    policy_loss,
    ppo_terms,
    value_loss,
)

GARBAGE = [math.nan, math.inf, -math.inf, 1e9, -1e9]


def one_loss(ratio: float, advantage: float, **settings: float) -> tuple[float, float]:
    """Loss at a probability ratio, and its slope in log π."""
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1).double(), torch.tensor([advantage]).double(), 0.2, **settings)
    loss.sum().backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 1.0, -1.2, 0.0),  # likelier and good: clipped
        (1.5, -1.0, 1.5, 1.5),  # likelier and bad: not clipped
        (0.5, 1.0, -0.5, -0.5),  # less likely and good: not clipped
        (0.5, -1.0, 0.8, 0.0),  # less likely and bad: clipped
    ],
)
def test_policy_loss_is_clipped_where_that_lowers_the_objective(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    assert one_loss(ratio, advantage) == pytest.approx((loss, slope))


def test_clip_range_high_moves_the_upper_bound_alone() -> None:
    assert one_loss(1.25, 1.0, clip_range_high=0.28) == pytest.approx((-1.25, -1.25))
    assert one_loss(1.5, 1.0, clip_range_high=0.28) == pytest.approx((-1.28, 0.0))
    assert one_loss(0.5, -1.0, clip_range_high=0.28) == pytest.approx((0.8, 0.0))


def test_dual_clip_bounds_the_loss_of_bad_actions_alone() -> None:
    assert one_loss(10.0, -1.0, dual_clip=3.0) == pytest.approx((3.0, 0.0))
    assert one_loss(2.0, -1.0, dual_clip=3.0) == pytest.approx((2.0, 2.0))
    assert one_loss(10.0, 1.0, dual_clip=3.0) == pytest.approx((-1.2, 0.0))


@pytest.mark.parametrize("dual_clip", [None, 2.0])
@pytest.mark.parametrize("clip_range_high", [None, 0.4])
def test_policy_loss_and_its_gradient_equal_the_reference(
    clip_range_high: float | None, dual_clip: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 4, 60, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    losses = policy_loss(logprobs, old, advantages, 0.2, clip_range_high, dual_clip)
    losses.sum().backward()
    expected = [
        reference.policy_loss(math.exp(p - q), a, 0.2, clip_range_high or 0.2, dual_clip)
        for p, q, a in zip(logprobs.flatten().tolist(), old.flatten().tolist(), advantages.flatten().tolist(), strict=True)
    ]  # fmt: skip
    assert logprobs.grad is not None
    np.testing.assert_allclose(losses.detach().flatten(), [loss for loss, _, _ in expected], rtol=1e-12)
    np.testing.assert_allclose(logprobs.grad.flatten(), [slope for _, slope, _ in expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 1.0, 0.405, -0.9),  # within the range
        (0.7, 1.0, 0.32, 0.0),  # nearer the target than allowed: clipped at 0.2
        (0.7, -1.0, 1.445, 1.7),  # moved away from the target: the greater loss stands
        (-0.7, -1.0, 0.32, 0.0),
    ],
)
def test_value_loss_is_clipped_where_that_raises_it(
    value: float, target: float, loss: float, slope: float
) -> None:
    values = torch.tensor([value], requires_grad=True)
    result = value_loss(values, torch.zeros(1), torch.tensor([target]), 0.2)
    result.sum().backward()
    assert values.grad is not None
    assert (result.item(), values.grad.item()) == pytest.approx((loss, slope))


@pytest.mark.parametrize("value_clip_range", [None, 0.3])
def test_value_loss_and_its_gradient_equal_the_reference(value_clip_range: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    values, old, returns = torch.randn(3, 4, 60, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    losses = value_loss(values, old, returns, value_clip_range)
    losses.sum().backward()
    expected = [
        reference.value_loss(v, o, r, value_clip_range)
        for v, o, r in zip(values.flatten().tolist(), old.flatten().tolist(), returns.flatten().tolist(), strict=True)
    ]  # fmt: skip
    assert values.grad is not None
    np.testing.assert_allclose(losses.detach().flatten(), [loss for loss, _, _ in expected], rtol=1e-12)
    np.testing.assert_allclose(
        values.grad.flatten(), [slope for _, slope, _ in expected], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 0.4, 0.045, -0.3),  # within δ = 0.5: ½ e²
        (0.1, 3.0, 0.5 * (2.9 - 0.25), -0.5),  # beyond: δ (|e| − ½ δ), of slope δ
        (0.7, -1.0, 0.5 * (1.7 - 0.25), 0.5),  # the unclipped one is the greater
        (0.7, 2.0, 0.5 * (1.8 - 0.25), 0.0),  # the clipped one is, at 0.2
    ],
)
def test_huber_loss_is_linear_beyond_delta_and_clipped_alike(
    value: float, target: float, loss: float, slope: float
) -> None:
    values = torch.tensor([value], requires_grad=True)
    result = value_loss(values, torch.zeros(1), torch.tensor([target]), 0.2, huber_delta=0.5)
    result.sum().backward()
    assert values.grad is not None
    assert (result.item(), values.grad.item()) == pytest.approx((loss, slope))


def test_a_large_delta_is_the_squared_error() -> None:
    values, old, returns = torch.randn(3, 4, 60, generator=torch.Generator().manual_seed(1))
    for clip in (None, 0.3):
        torch.testing.assert_close(
            value_loss(values, old, returns, clip, huber_delta=1e3), value_loss(values, old, returns, clip)
        )


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_under_the_mask_changes_neither_losses_nor_gradients(garbage: float, place: int) -> None:
    mask = torch.tensor([True, True, False])
    columns = torch.tensor([[0.3, -0.1, 0.0], [0.1, 0.2, 0.0], [1.0, -2.0, 0.0]])

    def loss_and_gradient(columns: Tensor) -> tuple[Tensor, Tensor]:
        first = columns[0].clone().requires_grad_()
        loss = masked_mean(policy_loss(first, columns[1], columns[2], 0.2, dual_clip=3.0), mask)
        loss = loss + masked_mean(value_loss(first, columns[1], columns[2], 0.1), mask)
        for estimator in ("k1", "k2", "k3"):
            loss = loss + masked_mean(kl_estimate(first, columns[1], estimator), mask)
        loss.backward()
        assert first.grad is not None
        return loss.detach(), first.grad

    dirty = columns.clone()
    dirty[place, 2] = garbage
    for clean_one, dirty_one in zip(loss_and_gradient(columns), loss_and_gradient(dirty), strict=True):
        assert torch.equal(clean_one, dirty_one)


def test_a_non_finite_input_that_counts_is_not_hidden() -> None:
    nan, zero = torch.tensor([math.nan]), torch.zeros(1)
    for bad in ((nan, zero, zero), (zero, nan, zero), (zero, zero, nan)):
        assert not policy_loss(*bad, 0.2).isfinite().any()
        assert not value_loss(*bad, 0.2).isfinite().any()
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(nan, zero, estimator).isnan().all()
        assert kl_estimate(zero, torch.tensor([-math.inf]), estimator).item() == math.inf


def test_the_terms_of_the_loss_have_their_coefficients_and_every_setting_reaches_them() -> None:
    def column(*elements: float) -> Tensor:
        return torch.tensor([elements])

    # A ratio of 1.5 above and far above the bounds, and values half a range and two ranges from the old ones.
    batch = Batch(
        inputs={},
        old_logprobs=column(0.0, 0.0),
        old_values=column(1.0, 1.0),
        advantages=column(1.0, -1.0),
        returns=column(0.0, 0.0),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    outputs = PolicyOutputs(column(math.log(1.5), math.log(10.0)), column(0.9, 0.6), column(0.7, 0.8))
    hyper = PPOHyperparameters(
        clip_range=0.1, clip_range_high=0.3, dual_clip=4.0, value_clip_range=0.2, vf_coef=0.25, ent_coef=0.01
    )
    terms = ppo_terms(batch, outputs, hyper)
    assert {name: (term.coefficient, term.trains_critic) for name, term in terms.items()} == {
        "value/loss": (0.25, True),
        "policy/loss": (1.0, False),
        "policy/entropy": (-0.01, False),
    }
    expected = {
        "value/loss": column(0.9**2 / 2, 0.8**2 / 2),
        "policy/loss": column(-1.3, 4.0),
        "policy/entropy": outputs.entropies,
    }
    for name, elements in expected.items():
        torch.testing.assert_close(terms[name].elements, elements)


@pytest.mark.parametrize("num_actions", [2, 7, 1000])
def test_entropy_of_a_uniform_policy_is_log_v(num_actions: int) -> None:
    assert entropy(torch.full((2, 3, num_actions), -4.2)).numpy() == pytest.approx(math.log(num_actions))


def test_entropy_and_its_gradient_equal_numerical_ones() -> None:
    logits = torch.randn(
        5, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True
    )

    def by_hand(z: reference.Array) -> float:
        p = np.exp(z) / np.exp(z).sum()
        return float(-(p * np.log(p)).sum())

    result = entropy(logits)
    result.backward()
    assert logits.grad is not None
    point = logits.detach().numpy()
    assert result.item() == pytest.approx(by_hand(point), rel=1e-12)
    np.testing.assert_allclose(logits.grad, reference.numerical_gradient(by_hand, point), atol=1e-8)


def test_entropy_leaves_out_actions_that_cannot_be_taken() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0], requires_grad=True)
    result = entropy(logits)
    result.backward()
    assert result.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0, 0, 0], abs=1e-7)


def test_kl_estimators_follow_their_formulas() -> None:
    logprobs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    d = np.array([0.5, -1.0, 0.0])
    assert kl_estimate(logprobs, ref, "k1").numpy() == pytest.approx(d)
    assert kl_estimate(logprobs, ref, "k2").numpy() == pytest.approx(d**2 / 2)
    assert kl_estimate(logprobs, ref, "k3").numpy() == pytest.approx(np.exp(-d) - 1 + d)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logprobs, ref, "k4")


def test_k3_keeps_its_digits_where_the_policies_are_close() -> None:
    d = torch.tensor([1e-3, -1e-3])
    exact = torch.expm1(-d.double()) + d.double()
    torch.testing.assert_close(kl_estimate(d, torch.zeros(2), "k3").double(), exact, rtol=1e-3, atol=0)


class SmallCategorical:
    """A policy over four actions and a reference, small enough for exact expectations."""

    def __init__(self) -> None:
        self.logits = torch.tensor([0.7, -0.4, 0.1, -1.2], dtype=torch.float64, requires_grad=True)
        self.logprobs = self.logits.log_softmax(-1)
        self.ref = torch.tensor([-0.3, 0.5, 0.9, -0.2], dtype=torch.float64).log_softmax(-1)
        self.probs = self.logprobs.exp().detach()

    def kl(self) -> Tensor:
        return (self.logprobs.exp() * (self.logprobs - self.ref)).sum()

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]

    def expected_loss_gradient(self, per_action: Tensor) -> Tensor:
        """Gradient of a loss averaged over sampled actions, in expectation: sampling carries none."""
        return self.gradient((self.probs * per_action).sum())


def test_k1_and_k3_are_unbiased_estimates_and_k2_is_not() -> None:
    policy = SmallCategorical()
    kl = policy.kl().item()
    mean = {k: (policy.probs * kl_estimate(policy.logprobs, policy.ref, k)).sum().item() for k in ("k1", "k2", "k3")}  # fmt: skip
    assert mean["k1"] == pytest.approx(kl, rel=1e-12)
    assert mean["k3"] == pytest.approx(kl, rel=1e-12)
    assert abs(mean["k2"] - kl) > 0.01 * kl


def test_k1_inside_the_reward_has_the_gradient_of_the_kl() -> None:
    policy = SmallCategorical()
    reward = -kl_estimate(policy.logprobs, policy.ref, "k1").detach()
    losses = policy_loss(policy.logprobs, policy.logprobs.detach(), reward, 0.2)
    torch.testing.assert_close(policy.expected_loss_gradient(losses), policy.gradient(policy.kl()))


def test_k3_as_a_loss_has_the_gradient_of_the_wrong_kl_and_k2_that_of_the_right_one() -> None:
    policy = SmallCategorical()
    exact = policy.gradient(policy.kl())
    reverse = policy.gradient((policy.ref.exp() * (policy.ref - policy.logprobs)).sum())

    def as_loss(estimator: str) -> Tensor:
        return policy.expected_loss_gradient(kl_estimate(policy.logprobs, policy.ref, estimator))

    torch.testing.assert_close(as_loss("k2"), exact)
    torch.testing.assert_close(as_loss("k3"), reverse)
    assert (as_loss("k3") - exact).norm() > 0.1 * exact.norm()
    torch.testing.assert_close(as_loss("k1"), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_loss_has_the_gradient_of_the_kl_also_where_an_older_policy_acted(
    estimator: str,
) -> None:
    policy = SmallCategorical()
    old = torch.tensor([0.2, 0.3, -0.6, 0.4], dtype=torch.float64).log_softmax(-1)

    def expectation(per_action: Tensor) -> Tensor:
        return (old.exp() * per_action).sum()

    loss = expectation(kl_loss(policy.logprobs, old, policy.ref, estimator))
    torch.testing.assert_close(policy.gradient(loss), policy.gradient(policy.kl()), rtol=1e-12, atol=1e-12)
    if estimator != "k2":
        assert loss.item() == pytest.approx(policy.kl().item(), rel=1e-12)
    # The estimator as it stands, without the ratio, is another gradient.
    plain = policy.gradient(expectation(kl_estimate(policy.logprobs, policy.ref, estimator)))
    assert (plain - policy.gradient(policy.kl())).norm() > 0.1 * plain.norm()


def test_k3_in_the_loss_has_a_gradient_of_less_variance_than_k1() -> None:
    policy = SmallCategorical()

    def variance(estimator: str) -> float:
        losses = kl_loss(policy.logprobs, policy.logprobs.detach(), policy.ref, estimator)
        gradients = torch.stack([policy.gradient(loss) for loss in losses])
        mean = (policy.probs[:, None] * gradients).sum(0)
        return float((policy.probs[:, None] * (gradients - mean).square()).sum())

    assert variance("k3") == pytest.approx(variance("k2"), rel=1e-9)
    assert variance("k3") < 0.9 * variance("k1")


def test_the_kl_in_the_loss_is_a_term_and_asks_for_a_reference() -> None:
    column = torch.zeros(1, 2)
    batch = Batch({}, column, column, column, column, torch.ones(1, 2, dtype=torch.bool))
    outputs = PolicyOutputs(torch.tensor([[-0.2, 0.1]]), column, column)
    with pytest.raises(ValueError, match="kl_loss_coef needs a reference policy"):
        ppo_terms(batch, outputs, PPOHyperparameters(kl_loss_coef=0.1))
    with pytest.raises(ValueError, match="kl_loss_estimator must be k1, k2 or k3, but is 'k4'"):
        PPOHyperparameters(kl_loss_estimator="k4")
    batch.ref_logprobs = torch.tensor([[0.3, -0.1]])
    assert "kl/loss" not in ppo_terms(batch, outputs, PPOHyperparameters())
    for estimator in ("k1", "k2", "k3"):
        hyper = PPOHyperparameters(kl_loss_coef=0.1, kl_loss_estimator=estimator)
        coefficient, elements, trains_critic, mask = ppo_terms(batch, outputs, hyper)["kl/loss"]
        assert (coefficient, trains_critic, mask) == (0.1, False, None)
        assert torch.equal(elements, kl_loss(outputs.logprobs, column, batch.ref_logprobs, estimator))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_loss_coef", -0.1),
        ("clip_range", 0.0),
        ("clip_range_high", -0.1),
        ("value_clip_range", 0.0),
        ("dual_clip", 1.0),
        ("target_kl", 0.0),
        ("vf_coef", -1.0),
        ("ent_coef", math.nan),
        ("max_grad_norm", math.inf),
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("num_ppo_epochs", 0),
        ("num_minibatches", 1.5),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_its_value(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .* {value}"):
        PPOHyperparameters(**{name: value})


def test_every_setting_has_a_help_text_that_argparse_can_print() -> None:
    for setting in fields(PPOHyperparameters):
        assert setting.metadata["help"] % {} == setting.metadata["help"]


@dataclass
class OtherArguments:
    """Stands for Transformers' TrainingArguments, which has a `max_grad_norm` and a `__post_init__`, too."""

    output_dir: str | None = None
    max_grad_norm: float = field(default=1.0, metadata={"help": "theirs"})
    ready: bool = False

    def __post_init__(self) -> None:
        self.ready = True


@dataclass
class BothArguments(PPOHyperparameters, OtherArguments):
    """A trainer's configuration."""

    gae_lambda: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()


def test_hyperparameters_combine_with_another_dataclass() -> None:
    config = BothArguments(output_dir="runs", max_grad_norm=0.5, clip_range=0.1)
    assert (config.output_dir, config.max_grad_norm, config.clip_range, config.gae_lambda) == ("runs", 0.5, 0.1, 0.9)  # fmt: skip
    assert config.ready, "the other dataclass's __post_init__ did not run"
    with pytest.raises(ValueError, match=r"^gamma must"):
        BothArguments(gamma=2.0)
