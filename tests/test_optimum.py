"""PPO against the closed-form optimum of the KL-regularised problem, on a language small enough to enumerate.

With J(π) = E_π[r] − β·KL(π ‖ π_ref), the best policy is π*(y) ∝ π_ref(y)·exp(r(y)/β) and J(π*) = β·log E_ref[exp(r/β)].
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer import PPOConfig, PPOTrainer

WORDS = ["<pad>", "<end>", "q", "a", "b", "c"]
END, LENGTH, BETA, PENALTY = 1, 3, 0.25, 0.5


def six_words() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def all_responses(length: int = LENGTH) -> list[list[int]]:
    """Every response: ended by <end>, or cut at so many tokens."""
    going_on = [i for i in range(len(WORDS)) if i != END]
    ended = [[*middle, END] for n in range(length) for middle in itertools.product(going_on, repeat=n)]
    return ended + [list(cut) for cut in itertools.product(going_on, repeat=length)]


def reward_of(ids: list[int]) -> float:
    """2 for "a b <end>", less for its parts: the order of two tokens and the end all matter."""
    return 1.0 * (ids[:1] == [3]) + 0.5 * (ids[1:2] == [4]) + 0.5 * (ids[-1] == END) - 0.3 * ids.count(5)


def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


def reward_by_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    """The parts of `reward_of`, each at the token that it is for."""
    rewards = [[-0.3 * (i == 5) for i in ids] for ids in completion_ids]
    for row, ids in zip(rewards, completion_ids, strict=True):
        assert len(row) > 0
        row[0] += 1.0 * (ids[0] == 3)
        if len(ids) > 1:
            row[1] += 0.5 * (ids[1] == 4)
        row[-1] += 0.5 * (ids[-1] == END)
        assert abs(sum(row) - reward_of(ids)) < 1e-9
    return rewards


def log_distribution(model: torch.nn.Module, prompt: list[int], length: int = LENGTH) -> torch.Tensor:
    responses = all_responses(length)
    inputs = pack_sequences([prompt] * len(responses), responses, 0, torch.device("cpu"))
    with torch.no_grad():
        logprobs, _ = completion_logprobs(model, inputs, temperature=1.0)
    return torch.where(inputs["mask"], logprobs, 0.0).sum(1).double()


def language_trainer(
    folder: Path, reward_function: Any = reward, rollout_func: Any = None, **settings: Any
) -> PPOTrainer:
    """PPO of 40 iterations on this language."""
    tokenizer = six_words()
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(WORDS), "eos_token_id": END, "pad_token_id": 0}
    policy = toy.LlamaForCausalLM(toy.config(**vocabulary, max_position_embeddings=16))
    defaults = {
        "per_device_train_batch_size": 256, "max_steps": 40, "max_completion_length": LENGTH, "num_minibatches": 2,
        "num_ppo_epochs": 4, "kl_coef": BETA, "missing_eos_penalty": PENALTY, "learning_rate": 3e-3,
        "gae_lambda": 1.0, "vf_coef": 0.5, "value_clip_range": None, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    args = PPOConfig(output_dir=str(folder), **(defaults | settings))
    prompts = Dataset.from_dict({"prompt": ["q"] * 256})
    return PPOTrainer(policy, reward_function, args, prompts, None, tokenizer, rollout_func=rollout_func)


def train_and_compare(trainer: PPOTrainer) -> tuple[float, float]:
    """Train; J before and after, as shares of the optimum's."""
    policy, length = trainer.model.policy, trainer.args.max_completion_length
    prompt = six_words()("q")["input_ids"]
    log_reference = log_distribution(policy, prompt, length)
    rewards = torch.tensor(
        [reward_of(ids) - PENALTY * (ids[-1] != END) for ids in all_responses(length)], dtype=torch.float64
    )
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(log_reference.exp().sum(), one, atol=1e-5, rtol=0)
    best = BETA * torch.logsumexp(log_reference + rewards / BETA, dim=0)
    start = (log_reference.exp() * rewards).sum()
    trainer.train()
    log_policy = log_distribution(policy, prompt, length)
    reached = (log_policy.exp() * (rewards - BETA * (log_policy - log_reference))).sum()
    print(f"start {start:.4f} reached {reached:.4f} best {best:.4f} ratio {reached / best:.4f}")
    assert reached <= best + 1e-6
    return float(start / best), float(reached / best)


def test_ppo_comes_to_the_closed_form_optimum(tmp_path: Path) -> None:
    start, reached = train_and_compare(language_trainer(tmp_path))
    assert start < 0.5
    assert reached >= 0.98


# With the KL in the loss each token is pulled by itself: J is what it maximises where a completion is one token, and where
# advantages are not scaled.
IN_THE_LOSS = {"kl_coef": 0.0, "kl_loss_coef": BETA, "whiten_advantages": False}
VARIANTS = {
    "rewards by token": {"reward_function": reward_by_token},
    "rewards by token, λ 0.8": {
        "reward_function": reward_by_token,
        "gae_lambda": 0.8,
        "critic_gae_lambda": 1.0,
    },
    "the critic has a λ of its own": {"gae_lambda": 0.9, "critic_gae_lambda": 1.0},
    "a critic over bins": {"value_bins": 101, "value_range": 4.0},
    "a shared critic over bins": {"value_bins": 101, "value_range": 4.0, "critic": "shared"},
    "λ by length": {"gae_lambda_alpha": 2.0, "critic_gae_lambda": 1.0},
    **{
        f"{estimator} in the loss": IN_THE_LOSS | {"kl_loss_estimator": estimator, "max_completion_length": 1}
        for estimator in ("k1", "k2", "k3")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_algorithm_come_to_it_too(tmp_path: Path, name: str) -> None:
    start, reached = train_and_compare(language_trainer(tmp_path, **VARIANTS[name]))
    assert start < 0.5
    assert reached >= 0.98


@pytest.mark.slow
def test_the_kl_in_the_loss_is_not_that_of_whole_completions(tmp_path: Path) -> None:
    _, reached = train_and_compare(language_trainer(tmp_path, **IN_THE_LOSS))
    assert 0.9 < reached < 0.97
