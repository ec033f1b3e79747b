"""The coefficient of the KL penalty: fixed, or steered to a target."""

import math


class FixedKLController:
    """A KL coefficient that stays what it is.

    Args:
        kl_coef: the coefficient β ≥ 0.

    Raises:
        ValueError: `kl_coef` is negative or not a number.
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = _checked_coefficient(kl_coef)

    def update(self, kl: float, num_steps: int) -> None:
        """Do nothing: the coefficient is fixed."""

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Do nothing: a fixed coefficient is a setting, which a resumed run is given anew, and no state."""


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that is raised where the KL lies above its target, and lowered where it lies below.

        e = clip(KL / target − 1, −0.2, 0.2)
        β ← β · (1 + e · n / horizon)

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2; n / horizon takes the
    place of their K_β, so that the pace does not depend on the batch size.

    Args:
        kl_coef: the coefficient β > 0 to begin with.
        target: the KL to keep to, in the unit of the `kl` given to `update` (nats a response, say); > 0.
        horizon: number of steps n (responses, say) over which a full error changes β by about a fifth; > 0.

    Raises:
        ValueError: one of them is not positive.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        if not (kl_coef > 0 and target > 0 and horizon > 0):
            raise ValueError(
                f"An adaptive KL coefficient needs kl_coef > 0, target > 0 and horizon > 0, but they are "
                f"{kl_coef}, {target} and {horizon}."
            )
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_steps: int) -> None:
        """Move the coefficient after `num_steps` more steps of mean KL `kl`.

        Args:
            kl: measured mean KL, the same on all ranks.
            num_steps: steps since the last update, of all ranks together.

        Raises:
            ValueError: `kl` is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"The measured KL is {kl}: the KL coefficient cannot follow it.")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A batch of five horizons would otherwise bring the coefficient to 0, where it would stay.
        self.value *= max(1 + error * num_steps / self.horizon, 0.1)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a state of `state_dict`: the coefficient as it had become."""
        self.value = _checked_coefficient(state["value"])


def _checked_coefficient(kl_coef: float) -> float:
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must be at least 0, but is {kl_coef}.")
    return kl_coef
