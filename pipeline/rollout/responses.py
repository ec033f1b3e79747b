"""Sampling and scoring, shared out over processes, with the results on every process in the order of the rows."""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tieback.pipeline.rollout.sampler import Sampler
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.texts import Rollout, encode_prompts, make_rollout
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.reward_model.scoring import RewardScorer

T = TypeVar("T")


def own_share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of `items`: every n-th, for work that processes need not do in step."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gather_in_order(places: Sequence[int], values: Sequence[T]) -> list[T]:
    """All processes' values in the order of their places (a number for each value, none twice), on every process."""
    gathered = gather_object(list(zip(places, values, strict=True)))
    return [value for _, value in sorted(gathered, key=itemgetter(0))]


def equal_share(count: int, rank: int, processes: int) -> list[int]:
    """Rows of a data set for one process: as many on each, for models that all processes must compute with in step.

    The processes' rows one after the other are the data set in its order, and then some of its first rows again.
    """
    share = math.ceil(count / processes)
    return [row % count for row in range(rank * share, (rank + 1) * share)]


def sample_responses(
    policy: PreTrainedModel,
    sampler: Sampler,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RolloutSettings,
    batch_size: int,
    seed: int,
    name: str,
    reference: PreTrainedModel | None = None,
) -> tuple[Rollout, list[float]]:
    """Sample one response to each prompt, on all processes together.

    Each batch is sampled with a seed of its own, so the responses are the same for any number of processes.

    Args:
        policy: causal language model in eval mode.
        sampler: made for it.
        dataset: N rows with a `prompt`, the same on every process.
        tokenizer: the policy's.
        settings: the sampler's.
        batch_size: prompts in a batch.
        seed: of the sampling. `name` is mixed in, so that two policies with one seed draw independently.
        name: of the policy, for the seed and the progress bar.
        reference: see `log_ratios`.

    Returns:
        The responses in the order of the prompts, and their `log_ratios` (empty without a reference), on every process.
    """
    rows = list(dataset)
    prompt_ids = encode_prompts([row["prompt"] for row in rows], tokenizer, settings.template_arguments)
    sampler.sync(policy)
    starts = own_share(range(0, len(rows), batch_size))
    places: list[int] = []
    completions, ratios = [], []
    is_main = PartialState().is_main_process
    for start in track(starts, description=f"{name}: responses", disable=not is_main):
        batch = prompt_ids[start : start + batch_size]
        sampled = sampler.sample(batch, seed=_batch_seed(seed, name, start))
        if reference is not None:
            ids = [completion.ids for completion in sampled]
            ratios += log_ratios(policy, reference, batch, ids, settings.temperature, tokenizer.pad_token_id)
        completions += sampled
        places += range(start, start + len(batch))
    everything = make_rollout(rows, prompt_ids, gather_in_order(places, completions), tokenizer)
    return everything, [] if reference is None else gather_in_order(places, ratios)


def _batch_seed(seed: int, name: str, start: int) -> int:
    return int(np.random.SeedSequence([seed, *name.encode(), start]).generate_state(1)[0])


@torch.no_grad()
def log_ratios(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    temperature: float,
    pad_id: int,
) -> list[float]:
    """Return Σ_t log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) of each response, at the sampling temperature.

    Over responses sampled from π its mean estimates KL(π ‖ π_ref) of whole responses, without bias.
    """
    inputs = pack_sequences(prompt_ids, completion_ids, pad_id, policy.device)
    difference = (
        completion_logprobs(policy, inputs, temperature)[0]
        - completion_logprobs(reference, inputs, temperature)[0]
    )
    return torch.where(inputs["mask"], difference, 0.0).sum(dim=1).tolist()


def reward_scores(scorer: RewardScorer, rollout: Rollout) -> list[float]:
    """Score N responses with the reward model, each process its share; N scores in order, on every process."""
    own = own_share(range(len(rollout)))
    scores = scorer.score([rollout.prompts[i] for i in own], [rollout.completions[i] for i in own])
    return gather_in_order(own, scores)
