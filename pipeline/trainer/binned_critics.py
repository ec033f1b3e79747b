"""Critics with `value_bins`: the head of one number, made into one with a logit for each bin."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.sharded_tensors import gathered
from tieback.ppo_core import PPOHyperparameters, head_over_bins
from tieback.reward_model.head import Fp32Linear, is_binned, reward_head


def start_of_head(
    weight: Tensor, value_range: float | None, hyper: PPOHyperparameters, source: str
) -> Tensor:
    """Weight of the head that the critic starts with: [1, d], or with `value_bins` K [K, d].

    Args:
        weight: of the model that it starts from, [1, d] or [K, d].
        value_range: of that model; None for a head of one number.
        hyper: settings of the run.
        source: name of that model, for messages.

    Raises:
        UsageError: the model has bins other than the run.
    """
    bins, wanted = hyper.value_bins, hyper.value_range
    if value_range is None:
        return weight if bins is None else head_over_bins(weight, bins, wanted)
    if (bins, wanted) != (len(weight), value_range):
        asked = "null" if bins is None else f"{bins} and value_range {wanted}"
        raise UsageError(
            f"{source} is a critic with value_bins {len(weight)} and value_range {value_range}, and this run asks for value_bins "
            f"{asked}. Set both as they were, or start the critic from another model."
        )
    return weight


def set_bins(critic: PreTrainedModel, hyper: PPOHyperparameters, source: str) -> None:
    """Give a whole model the head of `start_of_head`, and say so in its config.

    Raises:
        UsageError: see `start_of_head`.
    """
    if hyper.value_bins is None and not is_binned(critic.config):
        return
    old = reward_head(critic)
    with gathered(old.parameters()):
        weight = start_of_head(
            old.weight.detach(), getattr(critic.config, "value_range", None), hyper, source
        ).to(old.weight.dtype)
        if weight.shape == old.weight.shape:
            return
        head = Fp32Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight.clone())
    holder: Any = critic
    holder.score = head
    holder.config.num_labels = len(weight)
    holder.config.value_range = hyper.value_range
