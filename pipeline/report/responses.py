"""What the two policies answer: sampled responses, shared out over processes, and how far apart the policies are."""

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from rich.progress import track
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tieback.pipeline.trainer.actor_critic import completion_logprobs
from tieback.pipeline.trainer.rollout import (
    Rollout,
    decode_completions,
    encode_prompts,
    pack_sequences,
    sample,
)
from tieback.reward_model.scoring import RewardScorer


def sample_responses(
    policy: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    batch_size: int,
    seed: int,
    name: str,
    reference: PreTrainedModel | None = None,
) -> tuple[Rollout, list[float]]:
    """Sample one response to each prompt, on all processes together.

    A process takes every n-th batch, and each batch is sampled with a seed of its own, so the responses are the same
    for any number of processes.

    Args:
        policy: causal language model in eval mode.
        dataset: N rows with a `prompt`, the same on every process.
        tokenizer: the policy's.
        config: from `trainer.rollout.sampling_config`.
        batch_size: prompts in a batch.
        seed: of the sampling. `name` is mixed in, so that two policies with one seed draw independently.
        name: of the policy, for the seed and the progress bar.
        reference: see `log_ratios`.

    Returns:
        The responses in the order of the prompts, and their `log_ratios` (empty without a reference), on every process.
    """
    state = PartialState()
    prompts = list(dataset["prompt"])
    prompt_ids = encode_prompts(prompts, tokenizer)
    starts = range(0, len(prompts), batch_size)[state.process_index :: state.num_processes]
    own: list[tuple[int, list[int], bool, float]] = []
    for start in track(starts, description=f"{name}: responses", disable=not state.is_main_process):
        torch.manual_seed(_batch_seed(seed, name, start))
        batch = prompt_ids[start : start + batch_size]
        ids, truncated = sample(policy, batch, config, len(batch), policy.device)
        ratios = (
            [0.0] * len(batch) if reference is None else log_ratios(policy, reference, batch, ids, config)
        )
        own += zip(range(start, start + len(batch)), ids, truncated, ratios, strict=True)
    _, completion_ids, cut, ratios = map(list, zip(*sorted(gather_object(own)), strict=True))
    columns = {column: list(dataset[column]) for column in dataset.column_names if column != "prompt"}
    completions = decode_completions(prompts, completion_ids, tokenizer)
    rollout = Rollout(prompts, columns, prompt_ids, completion_ids, cut, completions)
    return rollout, [] if reference is None else ratios


def _batch_seed(seed: int, name: str, start: int) -> int:
    return int(np.random.SeedSequence([seed, *name.encode(), start]).generate_state(1)[0])


@torch.no_grad()
def log_ratios(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    config: GenerationConfig,
) -> list[float]:
    """Return Σ_t log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) of each response, at the sampling temperature.

    Over responses sampled from π its mean estimates KL(π ‖ π_ref) of whole responses, without bias.
    """
    inputs = pack_sequences(prompt_ids, completion_ids, config.pad_token_id, policy.device)
    difference = (
        completion_logprobs(policy, inputs, config.temperature)[0]
        - completion_logprobs(reference, inputs, config.temperature)[0]
    )
    return torch.where(inputs["mask"], difference, 0.0).sum(dim=1).tolist()


def reward_scores(scorer: RewardScorer, rollout: Rollout) -> list[float]:
    """Score N responses with the reward model, each process its share; N scores in order, on every process."""
    state = PartialState()
    own = range(state.process_index, len(rollout), state.num_processes)
    scores = scorer.score([rollout.prompts[i] for i in own], [rollout.completions[i] for i in own])
    return [score for _, score in sorted(gather_object(list(zip(own, scores, strict=True))))]
