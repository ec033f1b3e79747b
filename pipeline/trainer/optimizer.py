"""Parameter groups of the optimiser: roles from the actor-critic, learning rates and weight decay from the settings."""

from collections.abc import Collection
from typing import Any

from tieback.pipeline.trainer.actor_critic import ActorCritic, Role
from tieback.pipeline.trainer.config import PPOConfig


def optimizer_groups(
    actor_critic: ActorCritic, args: PPOConfig, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """One group for each role, with and without weight decay.

    Args:
        actor_critic: not wrapped.
        args: learning rates and weight decay.
        decayed: names of the parameters that weight decay applies to.

    Raises:
        ValueError: the actor-critic names a trained parameter for no role.
    """
    learning_rates: dict[Role, float] = {
        "policy": args.learning_rate,
        "critic": args.critic_learning_rate or args.learning_rate,
    }
    by_role = actor_critic.trained_parameters()
    trained = {name for name, parameter in actor_critic.named_parameters() if parameter.requires_grad}
    forgotten = trained.difference(*by_role.values())
    if forgotten:
        raise ValueError(
            f"{type(actor_critic).__name__}.trained_parameters leaves out {sorted(forgotten)}: name a role for "
            "each, or freeze them."
        )
    groups = []
    for role, parameters in by_role.items():
        for weight_decay, decay in ((args.weight_decay, True), (0.0, False)):
            chosen = [parameter for name, parameter in parameters.items() if (name in decayed) == decay]
            if chosen:
                groups.append({"params": chosen, "lr": learning_rates[role], "weight_decay": weight_decay})
    return groups
