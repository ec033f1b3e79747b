"""The passes that an iteration of PPO cannot do without, by the bare models: `floor_ppo.py WORLD DTYPE THREADS`.

Generation with a key-value cache that finished rows leave; log-probabilities of policy and reference, values, scores;
and the policy's and the critic's passes forward and backward, once an epoch. No padding: tokens of all rows stand in rows
of one length, the mean. No rewards, advantages, clipped objective, or optimiser.
"""

import random
import sys

import torch
from accelerate import Accelerator
from llm_world import PPO_EPOCHS, WORLDS, World, make_classifier, make_policy
from protocol import Turns, resident_mib
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from tieback.pipeline.trainer.precision import attend_in_fp32

TOKENS_AT_A_TIME = 1024


def lengths(world: World) -> tuple[list[int], list[int]]:
    """Tokens of the prompts, and of completions that end as the policy's do."""
    dice = random.Random(1)
    prompt_lengths = [dice.randint(*world.prompt_lengths) for _ in range(world.rows)]
    longest = world.max_completion_length
    if world.mean_length is None:
        return prompt_lengths, [longest] * world.rows
    ends = 1 / world.mean_length
    drawn = [next((n for n in range(1, longest) if dice.random() < ends), longest) for _ in range(world.rows)]
    return prompt_lengths, drawn


def generate(policy: torch.nn.Module, prompt_length: int, completion_lengths: list[int]) -> None:
    """Sample, with rows that leave the batch as they end; the longest row first."""
    ordered = sorted(completion_lengths, reverse=True)
    cache = DynamicCache()
    ids = torch.randint(2, 2000, (len(ordered), prompt_length))
    for step in range(ordered[0]):
        alive = sum(length > step for length in ordered)
        if alive < len(ids):
            ids = ids[:alive]
            cache.batch_select_indices(torch.arange(alive))
        logits = policy(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        ids = torch.multinomial(logits.float().softmax(-1), 1)


def main() -> None:
    """Run as many iterations as there are turns."""
    world, dtype = WORLDS[sys.argv[1]], sys.argv[2]
    torch.set_num_threads(int(sys.argv[3]))
    policy, reference = make_policy(world), make_policy(world)
    critic, reward_model = make_classifier(world, 1), make_classifier(world, 2)
    own = resident_mib()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if dtype == "bf16" else "no")
    for model in (policy, reference, critic, reward_model):
        attend_in_fp32(model, accelerator)  # the fastest attention that is known here
    prompt_lengths, completion_lengths = lengths(world)
    total = sum(prompt_lengths) + sum(completion_lengths)
    width = round(total / world.rows)
    completion = round(sum(completion_lengths) / world.rows)
    batches = torch.randint(2, world.vocab_size, (round(total / width), width)).split(
        TOKENS_AT_A_TIME // width
    )

    def loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -completion - 1 : -1]
        if hasattr(model, "score"):
            return model.score(hidden).float().square().sum()
        logits = model.lm_head(hidden).float()
        return cross_entropy(logits.flatten(0, 1), ids[:, -completion:].flatten(), reduction="sum")

    turns = Turns()
    while True:
        turns.wait()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            with torch.no_grad():
                generate(policy, round(sum(prompt_lengths) / world.rows), completion_lengths)
                for ids in batches:
                    for model in (policy, reference, critic, reward_model):
                        loss(model, ids)
            for _ in range(PPO_EPOCHS):
                for model in (policy, critic):
                    model.zero_grad()
                    for ids in batches:
                        loss(model, ids).backward()
        turns.done(own=own)


if __name__ == "__main__":
    main()
