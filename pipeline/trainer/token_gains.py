"""A reward model's score paid token by token: at each token, what it adds to the score of the text so far.

That is potential-based shaping, with the score as potential: the sum over a completion is its score, so that the best policy is the
same one, and the critic hears at once which token was good. Ng, Harada and Russell 1999, "Policy Invariance Under Reward
Transformations".
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import FunctionRewards, Scorer
from tieback.reward_model.scoring import RewardScorer


def check_gains(scorers: Sequence[Scorer], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that each reward model reads the policy's tokens one after the other.

    Raises:
        UsageError: there is no reward model, or names the one that does not.
    """
    models = [scorer for scorer in scorers if isinstance(scorer, RewardScorer)]
    if not models:
        raise UsageError(
            "per_token_reward_model pays the scores of reward models by token, and there is none: leave it out. A function may return a "
            "list with a number for each token itself."
        )
    for scorer in models:
        if not scorer.reads_prefixes:
            raise UsageError(
                f"per_token_reward_model: {scorer.name} is an adapter of the policy's base, or reads a text as a whole; only a causal reward model "
                "that is a model of its own says what each token adds."
            )
        if scorer.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UsageError(
                f"per_token_reward_model: {scorer.name} has another vocabulary than the policy, whose tokens are not its own."
            )


def with_gains(
    judged: Sequence[FunctionRewards], scorers: Sequence[Scorer], rollout: Rollout
) -> list[FunctionRewards]:
    """What the scorers gave, with that of each reward model by token.

    The last token brings what is missing to the score of the whole text as the reward model reads it, with its own chat template. A text
    that is too long for it keeps its score at the end.

    Args:
        judged: of each scorer, for B completions.
        scorers: in that order.
        rollout: the completions.
    """
    return [
        _by_token(rewards, scorer, rollout) if isinstance(scorer, RewardScorer) else rewards
        for rewards, scorer in zip(judged, scorers, strict=True)
    ]


def _by_token(rewards: FunctionRewards, scorer: RewardScorer, rollout: Rollout) -> FunctionRewards:
    prefixes = scorer.score_prefixes(rollout.prompt_ids, rollout.completion_ids)
    gains = [
        None if scores is None else _gains(scores, total)
        for scores, total in zip(prefixes, rewards.totals, strict=True)
    ]
    return FunctionRewards(rewards.totals, gains)


def _gains(scores: Sequence[float], total: float) -> list[float]:
    """Gains of T tokens, whose sum is `total`, from the scores after each of them."""
    reached = [*scores[:-1], total]
    return [after - before for before, after in zip([0.0, *reached[:-1]], reached, strict=True)]
