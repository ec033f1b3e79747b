"""Settings of PPO that the classic tasks share, and checks of settings."""

from dataclasses import dataclass, field
from typing import Any

from tieback.cli.errors import UsageError
from tieback.ppo_core import PPOHyperparameters


def require_positive(settings: Any, *names: str) -> None:
    """Refuse settings below 1.

    Raises:
        UsageError: names the first of them.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"{name} must be at least 1, but is {getattr(settings, name)}.")


def new_default(parent: type, name: str, value: Any) -> Any:
    """Give a setting inherited from a dataclass another default; its help stands once, in `parent`."""
    return field(default=value, metadata=parent.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]


@dataclass
class PPOArguments(PPOHyperparameters):
    """Settings of PPO on a vector environment."""

    total_steps: int = field(
        default=100_000, metadata={"help": "Steps of the environments together, at most."}
    )
    num_envs: int = field(default=16, metadata={"help": "Environments that are stepped together."})
    num_steps: int = field(default=64, metadata={"help": "Steps of each environment in a rollout."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of Adam; it falls to 0 linearly."}
    )
    anneal_ent_coef: bool = field(
        default=False, metadata={"help": "Let ent_coef fall to 0 with the learning rate."}
    )
    # No flags of a game, which has no reference policy, and whose critic gives one number.
    kl_loss_coef: float = field(default=0.0, init=False)
    kl_loss_estimator: str = field(default="k3", init=False)
    value_bins: int | None = field(default=None, init=False)
    value_range: float = field(default=10.0, init=False)
    value_clip_range: float | None = new_default(PPOHyperparameters, "value_clip_range", None)
    vf_coef: float = new_default(PPOHyperparameters, "vf_coef", 0.5)
    gamma: float = new_default(PPOHyperparameters, "gamma", 0.99)
    max_grad_norm: float = new_default(PPOHyperparameters, "max_grad_norm", 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "total_steps", "num_envs", "num_steps")
        if self.steps_per_iteration % self.num_minibatches:
            raise UsageError(
                f"num_envs {self.num_envs} x num_steps {self.num_steps} = {self.steps_per_iteration} steps a rollout "
                f"do not divide into num_minibatches {self.num_minibatches}."
            )

    @property
    def steps_per_iteration(self) -> int:
        """Steps of all environments together in a rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        """Iterations that take `total_steps`, rounded up."""
        return -(-self.total_steps // self.steps_per_iteration)
