"""What the two policies answer: sampled responses, shared out over processes, and how far apart the policies are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from pipeline.trainer.actor_critic import completion_logprobs
from pipeline.trainer.rollout import Rollout, pack_sequences, sample
from reward_model.scoring import RewardScorer


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Args:
        index: of its prompt.
        ids: sampled token ids, the end token included; never empty.
        truncated: whether it was cut at the length limit, without an end of its own.
        log_ratio: log-probability of the whole response under the policy that sampled it minus that under the
            reference, in nats; None where there is no reference.
    """

    index: int
    ids: list[int]
    truncated: bool
    log_ratio: float | None = None


def sample_responses(
    policy: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    seed: int,
    name: str,
    reference: PreTrainedModel | None = None,
) -> list[Response]:
    """Sample one response to each prompt, on all processes together.

    A process takes every n-th batch, and each batch is sampled with a seed of its own, so the responses are the same
    for any number of processes.

    Args:
        policy: causal language model in eval mode.
        prompt_ids: token ids of N prompts, the same on every process.
        config: from `trainer.rollout.sampling_config`; its temperature divides the logits in `log_ratio` too.
        batch_size: prompts in a batch.
        seed: of the sampling. `name` is mixed in, so that two policies with one seed draw independently.
        name: of the policy, for the seed and the progress bar.
        reference: see `Response.log_ratio`.

    Returns:
        N responses in the order of the prompts, on every process.
    """
    state = PartialState()
    starts = range(0, len(prompt_ids), batch_size)[state.process_index :: state.num_processes]
    mine = []
    for start in tqdm(starts, desc=f"{name}: sampling", unit="batch", disable=not state.is_main_process):
        torch.manual_seed(_batch_seed(seed, name, start))
        prompts = list(prompt_ids[start : start + batch_size])
        completions, truncated = sample(policy, prompts, config, len(prompts), policy.device)
        ratios: list[float] | list[None] = [None] * len(prompts)
        if reference is not None:
            ratios = log_ratios(policy, reference, prompts, completions, config)
        mine += [
            Response(start + row, *response)
            for row, response in enumerate(zip(completions, truncated, ratios, strict=True))
        ]
    return sorted(gather_object(mine), key=lambda response: response.index)


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
