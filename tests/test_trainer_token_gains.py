"""A reward model's score by token: what each prefix scores, that the sum is the score, and that the best policy stays the same."""

from pathlib import Path
from typing import Any

import pytest
import test_optimum as language
import torch
import toy
from peft import LoraConfig

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import FunctionRewards
from tieback.pipeline.trainer.token_gains import with_gains
from tieback.reward_model.scoring import RewardScorer


def scorer(**settings: Any) -> RewardScorer:
    tok = toy.tokenizer()
    return RewardScorer(toy.reward_model(tok), tok, **settings)


def test_each_prefix_scores_what_it_does_by_itself_whatever_stands_beside_it() -> None:
    prompts, completions = [[3, 9, 20], [7], [11, 12]], [[5, 30, 6], [8, 9, 10, 11, 12, 13], [4]]
    found = scorer(batch_size=2).score_prefixes(prompts, completions)
    one = scorer()
    for prompt, completion, values in zip(prompts, completions, found, strict=True):
        alone = one.score_ids([prompt + completion[: end + 1] for end in range(len(completion))])
        assert values == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 4) for values in found for value in values or []}) > 5


def rollout_of(prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Rollout:
    count = len(prompt_ids)
    return Rollout(["q"] * count, {}, prompt_ids, completion_ids, [False] * count, ["a"] * count)


def test_the_gains_are_differences_and_add_up_to_the_score_of_the_whole_text() -> None:
    judge, rollout = scorer(), rollout_of([[3, 9], [7]], [[5, 30, 6], [8]])
    totals = [0.75, -2.0]  # of the texts as the chat template writes them
    function = FunctionRewards([1.0, 1.0], [None, None])
    gained, same = with_gains(
        [FunctionRewards(totals, [None, None]), function], [judge, toy.id_reward], rollout
    )
    assert same is function
    assert gained.totals == totals
    first, second, _ = judge.score_prefixes(rollout.prompt_ids, rollout.completion_ids)[0] or []
    assert gained.by_token[0] == pytest.approx([first, second - first, 0.75 - second], abs=1e-6)
    assert gained.by_token[1] == [-2.0]


def test_a_text_that_is_too_long_for_the_reward_model_keeps_its_score_at_the_end() -> None:
    judge, rollout = scorer(max_length=4), rollout_of([[3, 9], [7]], [[5, 30, 6], [8]])
    (gained,) = with_gains([FunctionRewards([0.75, -2.0], [None, None])], [judge], rollout)
    assert gained.by_token == [None, [-2.0]]


def test_what_is_paid_for_a_completion_is_the_same(tmp_path: Path) -> None:
    def paid(by_token: bool) -> Any:
        tok = toy.tokenizer()
        trainer = toy.ppo_trainer(
            tmp_path,
            [toy.reward_model(tok), toy.id_reward],
            tok=tok,
            reward_processing_classes=[tok, None],
            per_token_reward_model=by_token,
            reward_weights=[1.0, 0.5],
            normalize_rewards=True,
            **{"rollout_func": toy.two_turns, "max_completion_length": 14},
        )
        torch.manual_seed(2)
        return trainer.score(trainer.generate(list(toy.prompts(8))))

    whole, by_token = paid(False), paid(True)
    assert whole.rollout.completion_ids == by_token.rollout.completion_ids
    torch.testing.assert_close(by_token.raw_scores, whole.raw_scores, rtol=0, atol=0)
    torch.testing.assert_close(by_token.scores, whole.scores, rtol=1e-5, atol=1e-5)
    assert (by_token.token_scores != 0).sum() > 2 * (whole.token_scores != 0).sum()
    # An environment's tokens are paid for at the policy's token before them.
    for row, own in enumerate(by_token.rollout.env_mask):
        assert not by_token.token_scores[row, : len(own)][~torch.tensor(own)].any()


@pytest.mark.slow
@pytest.mark.parametrize("gae_lambda", [1.0, 0.8])
def test_ppo_comes_to_the_optimum_of_the_scores(tmp_path: Path, gae_lambda: float) -> None:
    tokenizer = language.six_words()
    torch.manual_seed(4)
    vocabulary = {"vocab_size": len(language.WORDS), "eos_token_id": language.END, "pad_token_id": 0}
    config = toy.config(**vocabulary, max_position_embeddings=16)
    config.num_labels = 1
    model = toy.LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    judge = RewardScorer(model, tokenizer)
    trainer = language.language_trainer(
        tmp_path,
        judge,
        per_token_reward_model=True,
        gae_lambda=gae_lambda,
        critic_gae_lambda=1.0,
        max_steps=60,
    )
    policy, prompt = trainer.model.policy, tokenizer("q")["input_ids"]
    responses = language.all_responses()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    scores = judge.score(["q"] * len(texts), [f" {text}" for text in texts])
    cut = [ids[-1] != language.END for ids in responses]
    rewards = torch.tensor(scores).double() - language.PENALTY * torch.tensor(cut).double()
    log_start = language.log_distribution(policy, prompt)
    best = language.BETA * torch.logsumexp(log_start + rewards / language.BETA, dim=0)
    before = (log_start.exp() * rewards).sum()
    trainer.train()
    log_policy = language.log_distribution(policy, prompt)
    reached = (log_policy.exp() * (rewards - language.BETA * (log_policy - log_start))).sum()
    assert reached <= best + 1e-6
    assert (reached - before) / (best - before) >= 0.97


# What cannot be paid by token.


def test_without_a_reward_model_there_is_nothing_to_pay_by_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pays the scores of reward models by token, and there is none"):
        toy.ppo_trainer(tmp_path, per_token_reward_model=True)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tok, other = toy.tokenizer(), toy.tokenizer()
    other.add_tokens(["zebra"])
    model = toy.reward_model(tok)
    model.resize_token_embeddings(len(other))
    with pytest.raises(UsageError, match="has another vocabulary than the policy"):
        toy.ppo_trainer(
            tmp_path, model, tok=tok, reward_processing_classes=other, per_token_reward_model=True
        )


def test_an_adapter_of_the_policys_base_is_refused(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    adapter = RewardScorer(toy.reward_adapter(), tok)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {"peft_config": lora, "critic": "adapter", "per_token_reward_model": True}
    with pytest.raises(UsageError, match="is an adapter of the policy's base, or reads a text as a whole"):
        toy.ppo_trainer(tmp_path, adapter, tok=tok, **settings)
