"""Rollout functions: what an environment writes is read and not learnt, rewards reach the policy's tokens, and faults are named."""

import random
from pathlib import Path
from typing import Any

import pytest
import test_optimum as language
import torch
import toy

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import FunctionRewards
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.rewards import last_written, place_rewards, token_rewards
from tieback.ppo_core import gae

SETTINGS: dict[str, Any] = {"rollout_func": toy.two_turns, "max_completion_length": 14}
CPU = torch.device("cpu")


def rollout_of(*env_mask: list[int]) -> Rollout:
    rows = [[bool(own) for own in mask] for mask in env_mask]
    ids = [[9] * len(mask) for mask in rows]
    count = len(rows)
    return Rollout(["q"] * count, {}, [[1]] * count, ids, [False] * count, ["a"] * count, env_mask=rows)


# Where rewards are paid.


def test_a_reward_of_a_whole_completion_is_paid_at_the_last_token_that_the_policy_wrote() -> None:
    rollout = rollout_of([1, 1, 0, 1, 0], [0, 1])
    placed = place_rewards([FunctionRewards([2.0, 3.0], [None, None])], [0.5], rollout, CPU)
    assert placed.tolist() == [[0, 0, 0, 1.0, 0], [0, 1.5, 0, 0, 0]]


def test_a_reward_for_what_the_environment_wrote_is_paid_at_the_policys_token_before_it() -> None:
    rollout = rollout_of([0, 1, 0, 0, 1, 0])
    by_token = FunctionRewards([63.0], [[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    # At its first token, where there is none before.
    assert place_rewards([by_token], [1.0], rollout, CPU).tolist() == [[0, 15.0, 0, 0, 48.0, 0]]


def test_rewards_and_advantages_are_those_of_the_policys_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False, True, True, False, False, True, False]])
    kl, values = torch.randn(1, 8, generator=generator), torch.randn(1, 9, generator=generator)
    scores = torch.where(mask, torch.randn(1, 8, generator=generator), 0.0)
    bootstrap = torch.tensor([0.7])
    assert last_written(mask).tolist() == [[6]]
    rewards, discounts = token_rewards(scores, kl, 0.3, mask, 0.9, bootstrap)
    advantages = gae(rewards, discounts, values, 0.8, mask)

    own = mask[0].nonzero().squeeze(1)
    short = torch.ones(1, len(own), dtype=torch.bool)
    rewards, discounts = token_rewards(scores[:, own], kl[:, own], 0.3, short, 0.9, bootstrap)
    expected = gae(rewards, discounts, values[:, [*own, 8]], 0.8, short)
    torch.testing.assert_close(advantages[mask], expected[0], rtol=0, atol=1e-6)
    assert advantages[~mask].eq(0).all()


# What the policy learns: a game of which the optimum is known. The policy writes a word, the environment says b or c, each by
# half, and the policy writes another one.

END, B, C = language.END, 4, 5
ANSWERS = {B: 3, C: B}  # what is to be said to b, and to c


def said_right(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0 * (ids[2] == ANSWERS[ids[1]]) + 0.5 * (ids[0] == C) for ids in completion_ids]


def play(prompts: list[str], trainer: PPOTrainer) -> dict[str, Any]:
    before = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    first = [turn.ids for turn in trainer.sample(before, max_length=1)]
    said = [[random.choice([B, C])] for _ in prompts]
    contexts = [before[row] + first[row] + said[row] for row in range(len(prompts))]
    second = [turn.ids for turn in trainer.sample(contexts, max_length=1)]
    return {
        "prompt_ids": before,
        "completion_ids": [first[row] + said[row] + second[row] for row in range(len(prompts))],
        "env_mask": [[1, 0, 1]] * len(prompts),
        "truncated": [False] * len(prompts),
    }


def next_word(model: torch.nn.Module, contexts: list[list[int]]) -> torch.Tensor:
    """log π of each word after each context, [..., 6], in float64."""
    with torch.no_grad():
        return model(torch.tensor(contexts)).logits[:, -1].double().log_softmax(-1)


def game(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of the first word [6], and of the second one after each first word and answer [6, 2, 6]."""
    words = range(len(language.WORDS))
    start = language.six_words()("q")["input_ids"]
    contexts = [[*start, word, said] for word in words for said in (B, C)]
    return next_word(model, [start])[0], next_word(model, contexts).view(len(words), 2, -1)


@pytest.mark.slow
def test_ppo_with_an_environment_comes_to_the_optimum_of_the_game(tmp_path: Path) -> None:
    trainer = language.language_trainer(tmp_path, said_right, rollout_func=play)
    first, second = game(trainer.model.policy)
    rewards = torch.zeros(6, 2, 6, dtype=torch.float64)
    for place, said in enumerate((B, C)):
        rewards[:, place, ANSWERS[said]] += 1.0
    rewards[C] += 0.5
    # The last word first: V(s) = β log Σ_a π_ref(a | s) exp(Q(s, a) / β).
    beta = language.BETA
    after = beta * torch.logsumexp(second + rewards / beta, dim=-1).mean(1)
    best = beta * torch.logsumexp(first + after / beta, dim=0)
    trainer.train()

    one, two = game(trainer.model.policy)
    later = (two.exp() * (rewards - beta * (two - second))).sum(-1).mean(1)
    reached = (one.exp() * (later - beta * (one - first))).sum()
    start = (first.exp() * (second.exp() * rewards).sum(-1).mean(1)).sum()
    assert start < 0.5 * best
    assert 0.98 * best <= reached <= best + 1e-6


def test_what_the_environment_wrote_is_under_the_mask_of_what_is_learnt(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, **SETTINGS)
    torch.manual_seed(5)
    scored = trainer.score(trainer.generate(list(toy.prompts(8))))
    rollout, batch = scored.rollout, trainer.to_batch(scored)
    assert rollout.env_mask is not None
    for row, own in enumerate(rollout.env_mask):
        padding = batch.mask.shape[1] - len(own)
        assert batch.mask[row].tolist() == own + [False] * padding
        assert batch.advantages[row][~batch.mask[row]].eq(0).all()
        assert set(scored.token_scores[row].nonzero().flatten().tolist()) <= {rollout.written(row)[-1]}
    torch.manual_seed(5)
    figures = trainer.figures(list(toy.prompts(8)))
    assert figures["completions/mean_length"].tolist() == [sum(own) for own in rollout.env_mask]


# Figures, evaluation, resuming.


def test_the_sampler_is_compared_where_it_sampled(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, importance_sampling="token", **SETTINGS)
    trainer.train()
    for log in toy.iteration_logs(trainer):
        assert log["rollout/logprob_gap_max"] < 1e-4
        assert log["rollout/importance_weight_mean"] == pytest.approx(1, abs=1e-4)


def test_further_columns_reach_reward_functions_and_evaluation_draws_the_same_each_time(
    tmp_path: Path,
) -> None:
    seen: list[int] = []

    def turns_taken(turns: list[int], target: list[str], constant: list[str], **_: Any) -> list[float]:
        assert set(constant) == {"the same"}
        assert len(turns) == len(target)
        seen.extend(turns)
        return [float(number) for number in turns]

    def rollout(prompts: list[Any], trainer: PPOTrainer) -> dict[str, Any]:
        return toy.two_turns(prompts, trainer) | {
            "constant": "the same",
            "luck": [random.random() for _ in prompts],
        }

    def luck_of(luck: list[float], **_: Any) -> list[float]:
        return luck

    trainer = toy.ppo_trainer(
        tmp_path,
        [turns_taken, luck_of],
        eval_dataset=toy.prompts(6),
        **(SETTINGS | {"rollout_func": rollout}),
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert set(seen) == {1, 2}
    assert first["eval_reward/luck_of"] == second["eval_reward/luck_of"]
    assert 1 < first["eval_reward/turns_taken"] < 2


@pytest.mark.slow
def test_a_run_with_an_environment_resumes_bit_for_bit(tmp_path: Path) -> None:
    def trainer(folder: str) -> PPOTrainer:
        return language.language_trainer(
            tmp_path / folder,
            said_right,
            rollout_func=play,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=16,
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed._last_rollout.rollout.completion_ids == whole._last_rollout.rollout.completion_ids
    for name, weight in toy.weights(whole.model).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


# Faults.

GOOD = {"prompt_ids": [[3], [4]], "completion_ids": [[5, 6, 7], [6]], "env_mask": [[1, 0, 1], [1]]}
FAULTS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "returned NoneType, not a dictionary"),
    "no ids": ({"prompt_ids": [[3], [4]]}, r"no completion_ids: the keys are \['prompt_ids'\]"),
    "too few": (GOOD | {"completion_ids": [[5]]}, "1 items in completion_ids for 2 prompts"),
    "no list": (GOOD | {"completion_ids": "ab"}, "str as completion_ids, not a list"),
    "empty": (GOOD | {"completion_ids": [[5], []]}, r"\[\] as completion_ids\[1\], which must be"),
    "no token": (GOOD | {"completion_ids": [[5, 6, 7], [999]]}, r"999 in completion_ids\[1\], which is no token"),
    "a mask too short": (GOOD | {"env_mask": [[1], [1]]}, r"1 entries in env_mask\[0\] for the 3 tokens"),
    "log-probabilities too few": (GOOD | {"logprobs": [[0.0] * 3, []]}, r"0 entries in logprobs\[1\]"),
    "nothing written": (GOOD | {"env_mask": [[1, 0, 1], [0]]}, r"env_mask\[1\] with no token that the policy wrote"),
    "too long": (GOOD | {"completion_ids": [[5] * 15, [6]], "env_mask": None}, "15 tokens in completion_ids.0., more than max_comp"),
    "beyond the context": (GOOD | {"prompt_ids": [[3] * 200, [4]]}, "200 . 3 tokens in prompt and completion 0, more than the"),
    "texts": (GOOD | {"completions": ["a", "b"]}, "'a' as completions.0.; .* it must be a list of messages"),
    "a taken name": (GOOD | {"prompts": [1, 2]}, "`prompts`, a name that reward functions receive"),
    "a column too short": (GOOD | {"found": [1]}, "1 items in found for 2 prompts"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_learnt_from_is_named(tmp_path_factory: pytest.TempPathFactory, fault: str) -> None:
    returned, message = FAULTS[fault]
    trainer = toy.ppo_trainer(
        tmp_path_factory.mktemp("fault"), **(SETTINGS | {"rollout_func": lambda prompts, trainer: returned})
    )
    with pytest.raises(UsageError, match=f"rollout function `<lambda>` returned {message}|{message}"):
        trainer.generate(list(toy.prompts(2)))


def test_importance_sampling_without_log_probabilities_is_refused(tmp_path: Path) -> None:
    def silent(prompts: list[Any], trainer: PPOTrainer) -> dict[str, Any]:
        returned = toy.two_turns(prompts, trainer)
        return {name: value for name, value in returned.items() if name != "logprobs"}

    trainer = toy.ppo_trainer(
        tmp_path, **(SETTINGS | {"rollout_func": silent, "importance_sampling": "token"})
    )
    with pytest.raises(
        UsageError, match="`silent` returned no logprobs, which importance_sampling corrects by"
    ):
        trainer.train()


def test_what_is_left_out_is_filled_in(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, **(SETTINGS | {"rollout_func": lambda prompts, trainer: GOOD}))
    end = trainer.sampler.end_ids[0]
    rollout = trainer.generate(list(toy.prompts(2)))
    assert rollout.truncated == [token not in trainer.sampler.end_ids for token in (7, 6)]
    assert [message["role"] for completion in rollout.completions for message in completion] == [
        "assistant"
    ] * 2
    ended = GOOD | {
        "completion_ids": [[5, 6, end], [6]],
        "completions": [[{"role": "user", "content": "x"}]] * 2,
    }
    trainer.rollout_func = lambda prompts, trainer: ended
    rollout = trainer.generate(list(toy.prompts(2)))
    assert not rollout.truncated[0]
    assert rollout.completions == ended["completions"]


def test_an_error_of_the_function_is_told_with_its_name_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    calls: list[int] = []

    def falls(prompts: list[Any], trainer: PPOTrainer) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the game has no board")
        return toy.two_turns(prompts, trainer)

    trainer = toy.ppo_trainer(tmp_path, **(SETTINGS | {"rollout_func": falls}))
    with pytest.raises(
        UsageError, match="rollout function `falls` raised RuntimeError: the game has no board"
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rollout_func: nowhere:play cannot be imported"):
        toy.ppo_trainer(tmp_path, rollout_func="nowhere:play")


@pytest.mark.slow
def test_the_stage_takes_a_rollout_function_by_name(tmp_path: Path) -> None:
    toy.write_ppo_home(tmp_path, max_steps=2, max_completion_length=14)
    # A name of its own: another test's my_rewards may have been imported.
    (tmp_path / "turns_by_name.py").write_text("from toy import two_turns\n")
    toy.run_ppo(tmp_path, "--run_dir", str(tmp_path / "run"), "--rollout_func", "turns_by_name:two_turns")
    assert (tmp_path / "run" / "ppo" / "model.safetensors").is_file()
