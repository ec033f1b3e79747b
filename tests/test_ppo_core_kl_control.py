"""The fixed and the adaptive KL coefficient."""

import math

import pytest

from tieback.ppo_core import AdaptiveKLController, FixedKLController


def test_a_fixed_coefficient_stays_what_it_is() -> None:
    controller = FixedKLController(0.05)
    controller.update(kl=100.0, num_steps=1000)
    assert controller.value == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.01),  # 10% above the target, a tenth of the horizon
        (5.4, 0.99),
        (60.0, 1.02),  # the error is clipped at 20%
        (0.0, 0.98),
        (-1.0, 0.98),  # a noisy k1 mean may be negative
    ],
)
def test_an_adaptive_coefficient_moves_by_the_clipped_error(kl: float, factor: float) -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    controller.update(kl, num_steps=100)
    assert controller.value == pytest.approx(0.2 * factor)


def test_an_adaptive_coefficient_brings_a_responsive_kl_to_its_target() -> None:
    controller = AdaptiveKLController(0.01, target=6.0, horizon=1000)
    for _ in range(2000):
        controller.update(kl=1.2 / controller.value, num_steps=100)
    assert 1.2 / controller.value == pytest.approx(6.0, rel=1e-3)


def test_a_batch_of_many_horizons_leaves_the_coefficient_positive() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10)
    controller.update(kl=0.0, num_steps=1000)
    assert controller.value > 0


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_refused(kl: float) -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    with pytest.raises(ValueError, match=f"KL is {kl}"):
        controller.update(kl, num_steps=1)
    assert controller.value == 0.2


def test_a_resumed_controller_goes_on_where_the_other_stopped() -> None:
    straight, stopped, resumed = (AdaptiveKLController(0.2, target=6.0, horizon=1000) for _ in range(3))
    for controller in (straight, stopped):
        controller.update(7.0, num_steps=64)
    resumed.load_state_dict(stopped.state_dict())
    for controller in (straight, resumed):
        controller.update(5.0, num_steps=64)
    assert resumed.value == straight.value


@pytest.mark.parametrize(
    "settings", [(0.0, 6.0, 10.0), (0.1, 0.0, 10.0), (0.1, 6.0, 0.0), (math.nan, 6.0, 10.0)]
)
def test_settings_that_make_no_sense_are_refused(settings: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        AdaptiveKLController(*settings)
    with pytest.raises(ValueError, match="at least 0"):
        FixedKLController(-0.1)


def test_a_fixed_coefficient_is_no_state_that_could_be_brought_back() -> None:
    controller = FixedKLController(0.3)
    controller.load_state_dict(FixedKLController(0.05).state_dict())
    assert controller.value == 0.3
