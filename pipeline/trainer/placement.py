"""Every model of a run to where it computes, in the precision that it computes in."""

from collections.abc import Sequence

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.critics import RewardRole
from tieback.pipeline.trainer.precision import attend_in_fp32, keep_frozen_in_bf16
from tieback.pipeline.trainer.sharding import place_reference, place_reward_model, place_trained
from tieback.reward_model.scoring import RewardScorer


def place_models(
    trained: ActorCritic,
    reference: PreTrainedModel | None,
    scorers: Sequence[RewardScorer],
    accelerator: Accelerator,
    replicate: bool,
    moving: bool,
) -> PreTrainedModel | None:
    """Put all models in their places; those of the scorers are replaced in them.

    Args:
        trained: policy and critic.
        reference: frozen policy; None where it is the trained one with its adapter off.
        scorers: reward models and judges.
        accelerator: names backend and precision.
        replicate: hold frozen models whole on each process whatever the backend.
        moving: whether the reference moves; it then keeps its precision, in which small steps do not vanish.

    Returns:
        The reference.
    """
    for module in (trained, reference, *(scorer.model for scorer in scorers)):
        if isinstance(module, nn.Module):
            if not (moving and module is reference):
                keep_frozen_in_bf16(module, accelerator)
            attend_in_fp32(module, accelerator)
    if reference is not None:
        reference = place_reference(reference, accelerator, replicate)
    for scorer in scorers:
        scorer.autocast = accelerator.autocast
        if not isinstance(scorer.model, RewardRole):  # which has come with the policy
            scorer.model = place_reward_model(scorer.model, accelerator, replicate)
    place_trained(trained, accelerator)
    return reference
