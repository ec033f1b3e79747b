"""PPO on a language model, the whole algorithm in one file: a tiny Llama learns to count.

The prompt is a digit, and the score of a completion is the share of its eight tokens that count on by one: after 7
come 8 9 0 1 2 3 4 5. Nobody shows it how: it samples, is scored, and makes likelier what scored well.

    python examples/ppo_loop.py        # ten seconds on one CPU core; no network

Left out, and to be found in `tieback.PPOTrainer`: a tokenizer, prompts of different lengths, reward models, LoRA,
several processes, checkpoints. Shapes: B completions an iteration, P tokens a prompt, T tokens a completion.
"""

import argparse
import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from tieback.ppo_core import Batch, PPOHyperparameters, gae, kl_estimate, update

EOS = 10  # ids 0 to 9 are the digits; what follows the first EOS is padding
MAX_COMPLETION_LENGTH = 8
BATCH_SIZE = 128
KL_COEF = 0.01


class ActorCritic(nn.Module):
    """A policy, and a critic with a backbone of its own."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=EOS + 1, eos_token_id=EOS, pad_token_id=EOS, **size)
        self.policy = LlamaForCausalLM(config)
        self.critic = LlamaModel(config)
        self.value_head = nn.Linear(config.hidden_size, 1)

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies, each [b, T]: what `update` asks for."""
        input_ids, completion_ids = minibatch.inputs["input_ids"], minibatch.inputs["completion_ids"]
        logprobs, entropies = token_logprobs(self.policy, input_ids, completion_ids)
        return logprobs, self.values(input_ids, completion_ids)[:, :-1], entropies

    def values(self, input_ids: Tensor, completion_ids: Tensor) -> Tensor:
        """Value of the state before each token, and of the one after the last: [B, T + 1]."""
        hidden = self.critic(input_ids).last_hidden_state[:, -completion_ids.shape[1] - 1 :]
        return self.value_head(hidden).squeeze(-1)


def token_logprobs(policy: nn.Module, input_ids: Tensor, completion_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the completions, and entropy of its distribution: [B, T] each.

    No attention mask: padding stands at the end alone, where causal attention hides it from every real token.
    """
    logits = policy(input_ids).logits[:, -completion_ids.shape[1] - 1 : -1]  # each position predicts the next
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(completion_ids), distribution.entropy()


def counting_score(prompts: Tensor, completion_ids: Tensor) -> Tensor:
    """Share of the tokens that are one more than the token before them, 0 after 9: [B]."""
    previous = torch.cat([prompts[:, -1:], completion_ids[:, :-1]], dim=1)
    right = (completion_ids == (previous + 1) % 10) & (previous != EOS)
    return right.sum(dim=1) / MAX_COMPLETION_LENGTH


def main(iterations: int = 40, seed: int = 0) -> list[float]:
    """Train; returns the mean score of each iteration."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    hyper = PPOHyperparameters(num_ppo_epochs=2, num_minibatches=4, vf_coef=0.5)
    model = ActorCritic()
    reference = copy.deepcopy(model.policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # top_k=0: tokens are drawn from the very distribution of which the log-probabilities are taken.
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": MAX_COMPLETION_LENGTH}
    mean_scores = []
    for iteration in range(iterations):
        with torch.no_grad():
            # 1. Generate, and score.
            prompts = torch.randint(10, (BATCH_SIZE, 1))  # [B, P]
            ones = torch.ones_like(prompts)
            input_ids = model.policy.generate(prompts, attention_mask=ones, **sampling)  # [B, P + T]
            completion_ids = input_ids[:, prompts.shape[1] :]  # [B, T]
            is_eos = (completion_ids == EOS).long()
            mask = is_eos.cumsum(dim=1) - is_eos == 0  # [B, T], True up to the first EOS and at it
            scores = counting_score(prompts, completion_ids)  # [B]
            # 2. Log-probabilities and values, as they are before the update.
            logprobs, _ = token_logprobs(model.policy, input_ids, completion_ids)  # [B, T]
            ref_logprobs, _ = token_logprobs(reference, input_ids, completion_ids)  # [B, T]
            values = model.values(input_ids, completion_ids)  # [B, T + 1]
        # 3. Rewards per token: the KL penalty for each, the score for the last, after which nothing follows.
        kl = kl_estimate(logprobs, ref_logprobs, "k1")  # [B, T]
        is_last = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1  # [B, T]
        rewards = -KL_COEF * kl + torch.where(is_last, scores.unsqueeze(1), 0.0)  # [B, T]
        discounts = torch.where(is_last, 0.0, hyper.gamma)  # [B, T]
        # 4. Advantages, and the returns that the critic is fitted to.
        advantages = gae(rewards, discounts, values, hyper.gae_lambda, mask)  # [B, T]
        returns = advantages + values[:, :-1]  # [B, T]
        # 5. Update: num_ppo_epochs x num_minibatches optimizer steps.
        inputs = {"input_ids": input_ids, "completion_ids": completion_ids}
        batch = Batch(inputs, logprobs, values[:, :-1], advantages, returns, mask)
        update(model, optimizer, batch, hyper, accelerator, micro_batch_size=BATCH_SIZE)
        mean_scores.append(scores.mean().item())
        if iteration % 10 == 0 or iteration == iterations - 1:
            sample = completion_ids[0][mask[0]].tolist()
            print(
                f"iteration {iteration}: mean score {mean_scores[-1]:.2f}, {prompts[0].tolist()} -> {sample}"
            )
    print(f"mean score: from {mean_scores[0]:.2f} to {mean_scores[-1]:.2f}")
    return mean_scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
