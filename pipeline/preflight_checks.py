"""What the figures of a short trial say of a run of PPO: one finding for each question."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Verdict(StrEnum):
    """Whether a run can be started as it is."""

    PASSED = "passed"
    LOOK = "look"  # it can run, and a person should know this before
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """An answer.

    Args:
        check: what was asked.
        verdict: whether to start.
        found: the figures.
        advice: what to do, where it is not passed.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def prompts_of_training(prompts: Sequence[Hashable], num_left_out: int) -> Finding:
    """How many prompts there are, how many of them twice, and how many were too long."""
    repeated = len(prompts) - len(set(prompts))
    found = (
        f"{len(prompts):,} prompts, {repeated:,} of them repeated; {num_left_out:,} left out for their length"
    )
    advice = []
    if repeated > 0.1 * len(prompts):
        advice.append("Repeated prompts weigh more than others: remove them, unless that is meant.")
    if num_left_out > 0.25 * (len(prompts) + num_left_out):
        advice.append("Raise max_prompt_length, or accept that PPO never sees the longer prompts.")
    return Finding("prompts", Verdict.LOOK if advice else Verdict.PASSED, found, " ".join(advice))


def prompts_of_evaluation(training: Sequence[Hashable], held_out: Sequence[Hashable]) -> Finding:
    """How many of the prompts that evaluate draws from are prompts of PPO, too."""
    known = set(training)
    shared = sum(prompt in known for prompt in held_out)
    found = f"{shared:,} of the {len(held_out):,} prompts that evaluate draws from are among PPO's"
    if shared == 0:
        return Finding("held-out prompts", Verdict.PASSED, found)
    advice = "Keep the two apart: dataset_train_split of ppo.yaml, dataset_test_split of evaluate.yaml."
    verdict = Verdict.FAILED if shared > 0.05 * len(held_out) else Verdict.LOOK
    return Finding("held-out prompts", verdict, found, advice)


def completions(
    texts: Sequence[str], truncated: Sequence[bool], max_length: int, missing_eos_penalty: float
) -> Finding:
    """Whether the model to start from comes to an end, where it is to, and says different things."""
    cut, (_, most) = sum(truncated) / len(truncated), Counter(texts).most_common(1)[0]
    found = f"{cut:.0%} of {len(texts)} cut at {max_length} tokens; the most frequent one {most} times"
    if cut > 0.95 and missing_eos_penalty > 0:
        advice = "The model hardly ever ends: raise max_completion_length, name stop_tokens, or look at its chat template."
        return Finding("completions", Verdict.FAILED, found, advice)
    if cut > 0.5:
        advice = "Unless that is meant, raise max_completion_length, or name stop_tokens."
        return Finding("completions", Verdict.LOOK, found, advice)
    if most > 0.5 * len(texts) > 1:
        return Finding(
            "completions", Verdict.LOOK, found, "The model has little left to choose: PPO explores nothing."
        )
    return Finding("completions", Verdict.PASSED, found)


def spread_of_scores(name: str, scores: Sequence[float], lengths: Sequence[int]) -> Finding:
    """Whether a judge tells completions apart, and by more than their length."""
    judged = [(score, length) for score, length in zip(scores, lengths, strict=True) if not math.isnan(score)]
    check = f"scores of {name}"
    if not judged:
        return Finding(
            check, Verdict.FAILED, "it judges none of the completions", "See when it returns None."
        )
    values, tokens = np.array(judged).T
    found = f"mean {values.mean():.3g}, standard deviation {values.std():.3g}"
    if len(judged) < len(scores):
        found += f"; judges {len(judged)} of {len(scores)}"
    if values.std() == 0:
        advice = (
            "All completions score alike, so PPO has nothing to learn from. Look at completions and judge."
        )
        return Finding(check, Verdict.FAILED, found, advice)
    if tokens.std() == 0:
        return Finding(check, Verdict.PASSED, found)
    correlation = float(np.corrcoef(values, tokens)[0, 1])
    found += f"; correlation with length {correlation:.2f}"
    if abs(correlation) > 0.7:
        longer = "longer" if correlation > 0 else "shorter"
        advice = f"The judge mostly counts tokens: PPO will make completions {longer}."
        return Finding(check, Verdict.LOOK, found, advice)
    return Finding(check, Verdict.PASSED, found)


def same_in_any_company(
    name: str, together: Sequence[float], alone: Sequence[float], spread: float, is_model: bool
) -> Finding:
    """Whether a judge gives the same completion the same score by itself as among others.

    Args:
        name: of the judge.
        together, alone: its scores of the same completions.
        spread: standard deviation of its scores.
        is_model: whether it is a reward model; a function may draw at random.
    """
    difference = float(np.nanmax(np.abs(np.subtract(together, alone)), initial=0.0))
    share = difference / spread if spread > 0 else (0.0 if difference == 0 else math.inf)
    found = f"differ by {difference:.2g} at most, {share:.0%} of their standard deviation"
    check = f"scores of {name}, alone and among others"
    if share <= 0.05:
        return Finding(check, Verdict.PASSED, found)
    advice = "The same text scores differently: look at padding, or at random numbers in the judge."
    return Finding(check, Verdict.FAILED if is_model and share > 0.3 else Verdict.LOOK, found, advice)


def preference_of(name: str, accuracy: float, num_pairs: int) -> Finding:
    """Whether a reward model prefers the chosen side of pairs that it was not trained on by more than chance."""
    margin = 1.96 * 0.5 / math.sqrt(num_pairs)
    found = f"prefers the chosen side of {accuracy:.1%} of {num_pairs:.0f} held-out pairs (by chance 50 ± {margin:.0%})"
    check = f"preferences of {name}"
    if accuracy < 0.5 - margin:
        return Finding(check, Verdict.FAILED, found, "Are chosen and rejected mixed up?")
    if accuracy < 0.5 + margin:
        advice = "It has not been shown to know better than a coin: more pairs, or a larger model."
        return Finding(check, Verdict.LOOK, found, advice)
    return Finding(check, Verdict.PASSED, found)


def size_of_steps(approx_kl: float, clip_fraction: float) -> Finding:
    """Whether an iteration at the full learning rate moves the policy by as much as PPO's clipping is made for."""
    found = f"approximate KL {approx_kl:.2g} nats a token, {clip_fraction:.0%} clipped"
    if approx_kl > 0.1:
        return Finding("first iterations", Verdict.LOOK, found, "Lower learning_rate, or num_ppo_epochs.")
    if approx_kl < 1e-6:
        advice = "The policy hardly moves: raise learning_rate, and look at which weights are trained, and in what type."
        return Finding("first iterations", Verdict.LOOK, found, advice)
    return Finding("first iterations", Verdict.PASSED, found)


def fit_of_critic(before: float, after: float, num_epochs: int) -> Finding:
    """Whether the critic can learn the returns of one rollout by heart.

    Args:
        before, after: explained variance; NaN where the returns do not vary.
        num_epochs: over the rollout.
    """
    found = f"explained variance of one rollout {before:.2f} → {after:.2f} in {num_epochs} epochs"
    if after > max(before, 0.0):
        return Finding("critic", Verdict.PASSED, found)
    advice = "The critic does not learn: raise critic_learning_rate or vf_coef, or look at value_clip_range."
    return Finding("critic", Verdict.LOOK, found, advice)


def memory_needed(estimate: int, available: int, on_cpu: bool) -> Finding:
    """Whether the estimate of a process, in bytes, is there.

    On a CPU up to 2.4 times the estimate was held, since glibc keeps freed memory (docs/pretrained.md).
    """
    found = f"{estimate / 2**20:,.0f} MiB estimated, {available / 2**20:,.0f} there"
    if estimate > available:
        advice = (
            "Lower micro_batch_size or the lengths, use LoRA, or shard: `tieback memory` says what takes it."
        )
        return Finding("memory", Verdict.FAILED, found, advice)
    if on_cpu and 2.4 * estimate > available:
        advice = "glibc may keep more than twice what is alive: set MALLOC_MMAP_THRESHOLD_=131072, which is slower."
        return Finding("memory", Verdict.LOOK, found, advice)
    if estimate > 0.9 * available:
        return Finding(
            "memory", Verdict.LOOK, found, "Little is left for fragments and for whatever else runs."
        )
    return Finding("memory", Verdict.PASSED, found)


def time_needed(seconds: float, num_iterations: int) -> Finding:
    """How long the run will take at the speed of the trial."""
    hours = seconds * num_iterations / 3600
    length = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    found = f"about {length}: {num_iterations:,} iterations of {seconds:.3g} seconds, without evaluation and saving"
    return Finding("time", Verdict.PASSED, found)
