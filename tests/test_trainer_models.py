"""The models around the policy: critics, reward models with tokenizers of their own, tokenizers, and what is saved."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

from tieback.cli.errors import UsageError
from tieback.reward_model.head import load_reward_model, set_reward_bias
from tieback.reward_model.scoring import RewardScorer

CONVERSATION = [
    {"role": "user", "content": "red cat"},
    {"role": "assistant", "content": " blue"},
]


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [toy.prompts()[row] for row in range(count)]


# The critic.


def test_the_first_value_stands_at_the_prompts_last_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    critic = trainer.model.critic

    def positions(input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        places = torch.arange(input_ids.shape[1], dtype=torch.float32).expand(input_ids.shape)
        return BaseModelOutput(last_hidden_state=places.unsqueeze(-1).expand(-1, -1, 32))

    monkeypatch.setattr(critic.base_model, "forward", positions)
    critic.score.weight.data = torch.zeros(1, 32).index_fill(1, torch.tensor([0]), 1.0)
    scored = trainer.score(trainer.generate(rows()))
    batch = trainer.to_batch(scored)
    _, values, _ = trainer._score_tokens(trainer._pack(scored.rollout)[0])
    for row, (prompt, completion) in enumerate(
        zip(scored.rollout.prompt_ids, scored.rollout.completion_ids, strict=True)
    ):
        places = [len(prompt) - 1.0 + step for step in range(len(completion) + 1)]
        assert values[row, : len(completion) + 1].tolist() == places
        assert batch.old_values[row, : len(completion)].tolist() == places[:-1]


def test_a_critic_of_the_policys_backbone_begins_with_the_policys_weights_and_a_small_head(
    tmp_path: Path,
) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    policy, critic = trainer.model.policy, trainer.model.critic
    torch.testing.assert_close(toy.weights(critic.model), toy.weights(policy.model), rtol=0, atol=0)
    assert critic.score.weight.std().item() == pytest.approx(33**-0.5, rel=0.3)
    # No storage is shared: each learns for itself.
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}


def test_a_critic_that_reads_another_vocabulary_is_refused(tmp_path: Path) -> None:
    critic = toy.reward_model(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(permuted_json()[0]))
    )
    with pytest.raises(
        ValueError, match=r"critic's vocabulary has 600 tokens, the policy's 300.*value_model=None"
    ):
        toy.ppo_trainer(tmp_path, value_model=critic)


def test_a_critic_without_a_head_for_one_value_is_refused(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    for critic in (toy.policy(tok), toy.reward_model(tok, num_labels=2)):
        with pytest.raises(ValueError, match="without a `score` head for one value"):
            toy.ppo_trainer(tmp_path, value_model=critic)


# Reward models.


def permuted_json() -> tuple[str, list[int]]:
    """The toy tokenizer with other ids, spread over 600: the same pieces, so the same texts. And the new ids."""
    tok = toy.tokenizer()
    new = (torch.randperm(600, generator=torch.Generator().manual_seed(1))[: len(tok)]).tolist()
    description = json.loads(tok.backend_tokenizer.to_str())
    vocabulary = {token: new[i] for token, i in description["model"]["vocab"].items()}
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused {i}>": i for i in range(600) if i not in taken}
    description["model"]["vocab"] = vocabulary
    for added in description["added_tokens"]:
        added["id"] = new[added["id"]]
    return json.dumps(description), new


def permuted(reward_model: LlamaForSequenceClassification) -> tuple[Any, PreTrainedTokenizerFast]:
    """The same reward model for the permuted tokenizer, and that tokenizer."""
    tok = toy.tokenizer()
    description, new = permuted_json()
    other_tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(description),
        eos_token=tok.eos_token,
        pad_token=tok.pad_token,
        chat_template=tok.chat_template,
    )
    other = toy.reward_model(other_tok)
    state = copy.deepcopy(reward_model.state_dict())
    embedding = torch.zeros(600, 32)
    embedding[new] = state["model.embed_tokens.weight"]
    other.load_state_dict(state | {"model.embed_tokens.weight": embedding})
    return other, other_tok


def test_a_reward_model_with_another_vocabulary_gives_the_same_scores(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    reward_model = toy.reward_model(tok)
    other, other_tok = permuted(reward_model)
    assert other_tok.apply_chat_template(CONVERSATION, tokenize=False) == tok.apply_chat_template(
        CONVERSATION, tokenize=False
    )
    assert other_tok.encode("red cat") != tok.encode("red cat")
    trainer = toy.ppo_trainer(
        tmp_path,
        [reward_model, other],
        reward_processing_classes=[tok, other_tok],
        tok=tok,
        value_model=reward_model,
    )
    scored = trainer.score(trainer.generate(rows()))
    torch.testing.assert_close(scored.rewards[:, 0], scored.rewards[:, 1], rtol=0, atol=1e-5)
    assert scored.rewards.std(dim=0).min() > 0.05


@pytest.mark.parametrize("pad_id", [None, 0, 7, "eos"])
def test_a_stock_reward_model_scores_the_last_token_whatever_its_pad_id(tmp_path: Path, pad_id: Any) -> None:
    tok = toy.tokenizer()
    reward_model = toy.reward_model(tok)
    reward_model.config.pad_token_id = tok.eos_token_id if pad_id == "eos" else pad_id
    trainer = toy.ppo_trainer(tmp_path, reward_model, reward_processing_classes=tok, tok=tok)
    scored = trainer.score(trainer.generate(rows()))
    rollout = scored.rollout
    assert (
        len(
            {
                len(prompt) + len(ids)
                for prompt, ids in zip(rollout.prompt_ids, rollout.completion_ids, strict=True)
            }
        )
        > 2
    )
    for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        ids = tok.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            hidden = reward_model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = reward_model.score(hidden).item()
        assert scored.rewards[row, 0].item() == pytest.approx(expected, abs=1e-5)


def test_the_reward_models_bias_counts_in_the_scores(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    reward_model = toy.reward_model(tok)
    trainer = toy.ppo_trainer(tmp_path, reward_model, reward_processing_classes=tok, tok=tok)
    rollout = trainer.generate(rows())
    before = trainer.score(rollout).rewards
    set_reward_bias(reward_model, 2.5)
    torch.testing.assert_close(trainer.score(rollout).rewards, before + 2.5)


@pytest.mark.parametrize("where", ["object", "folder"])
def test_a_reward_model_with_two_labels_is_refused(tmp_path: Path, where: str) -> None:
    tok = toy.tokenizer()
    model: Any = toy.reward_model(tok, num_labels=2)
    if where == "folder":
        model.save_pretrained(tmp_path / "two")
        tok.save_pretrained(tmp_path / "two")
        model = str(tmp_path / "two")
    with pytest.raises(ValueError, match=r"(has|;.*has) 2( labels|\.)"):
        toy.ppo_trainer(tmp_path, model, reward_processing_classes=tok)


def test_tokenizers_of_reward_models_must_be_as_many(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    with pytest.raises(ValueError, match="reward_processing_classes has 2 entries for 1 reward_funcs"):
        toy.ppo_trainer(tmp_path, toy.reward_model(tok), reward_processing_classes=[tok, tok])


def test_a_bf16_reward_model_is_scored_with_an_fp32_head(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    toy.reward_model(tok).save_pretrained(tmp_path / "reward")
    reward_model = load_reward_model(tmp_path / "reward", dtype=torch.bfloat16)
    trainer = toy.ppo_trainer(
        tmp_path, reward_model, reward_processing_classes=tok, tok=tok, value_model=reward_model
    )
    assert reward_model.dtype == torch.bfloat16
    scored = trainer.score(trainer.generate(rows()))
    assert not torch.equal(scored.rewards, scored.rewards.bfloat16().float())
    # The critic that starts from it learns in fp32: small steps would round to nothing in bf16.
    assert {parameter.dtype for parameter in trainer.model.critic.parameters()} == {torch.float32}


def with_adapter(tok: PreTrainedTokenizerFast) -> Any:
    """A reward model whose adapter and head are far from those of its base."""
    model = get_peft_model(toy.reward_model(tok), LoraConfig(task_type="SEQ_CLS", lora_dropout=0.5))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("form", ["model", "scorer"])
def test_a_reward_model_with_an_adapter_scores_as_the_merged_one(tmp_path: Path, form: str) -> None:
    tok = toy.tokenizer()
    model = with_adapter(tok)
    merged = copy.deepcopy(model).merge_and_unload()
    given = model if form == "model" else RewardScorer(model, tok)
    trainer = toy.ppo_trainer(
        tmp_path, [given, merged, toy.reward_model(tok)], reward_processing_classes=tok, tok=tok
    )
    rewards = trainer.score(trainer.generate(rows())).rewards
    torch.testing.assert_close(rewards[:, 0], rewards[:, 1], rtol=0, atol=1e-5)
    assert (rewards[:, 0] - rewards[:, 2]).abs().min() > 1e-2
    trainer.train()
    assert "reward/reward_model" in trainer.state.log_history[0]


def test_the_trained_head_of_a_bf16_reward_model_with_an_adapter_computes_in_fp32() -> None:
    tok = toy.tokenizer()
    scores = RewardScorer(with_adapter(tok).to(torch.bfloat16), tok).score(["red"] * 2, [" cat", " dog"])
    assert any(score != torch.tensor(score).bfloat16().item() for score in scores)


def test_a_reward_model_with_an_adapter_that_scoring_would_lose_or_with_two_labels_is_refused(
    tmp_path: Path,
) -> None:
    tok = toy.tokenizer()
    virtual = get_peft_model(
        toy.reward_model(tok), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    )
    with pytest.raises(UsageError, match=r"adapter of virtual tokens \(PROMPT_TUNING\).*LoRA"):
        toy.ppo_trainer(tmp_path, virtual, reward_processing_classes=tok, tok=tok)
    two = get_peft_model(toy.reward_model(tok, num_labels=2), LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(UsageError, match="with one label, its score; LlamaForSequenceClassification has 2"):
        toy.ppo_trainer(tmp_path, two, reward_processing_classes=tok, tok=tok)


def test_a_critic_with_an_adapter_is_trained_as_the_whole_model_that_it_comes_to(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    results = []
    for merge in (False, True):
        critic = with_adapter(tok)
        trainer = toy.ppo_trainer(
            tmp_path, tok=tok, value_model=critic.merge_and_unload() if merge else critic
        )
        trainer.train()
        results.append(toy.weights(trainer.model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# The policy's tokenizer.


def test_a_tokenizer_without_a_pad_token_is_handled(tmp_path: Path) -> None:
    results = []
    for pad in ("<|pad|>", None):
        tok = toy.tokenizer()
        tok.pad_token = pad
        trainer = toy.ppo_trainer(tmp_path, tok=tok, model=toy.brief_policy(toy.tokenizer()))
        trainer.train()
        results.append(toy.weights(trainer.model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_tokenizer_with_neither_pad_nor_eos_is_handled_where_a_stop_token_is_named(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    tok.pad_token = tok.eos_token = None
    model = toy.policy(toy.tokenizer())
    model.generation_config.eos_token_id = None
    trainer = toy.ppo_trainer(tmp_path, tok=tok, model=model, stop_tokens=["a", "b"])
    # The chat template says how a turn ends.
    assert trainer.sampler.end_ids == [tok.encode(token)[0] for token in ("<|end|>", "a", "b")]
    trainer.train()


# What is saved.


def test_saved_models_are_stock_models_with_identical_outputs_and_nothing_is_pickled_but_training_state(
    tmp_path: Path,
) -> None:
    trainer = toy.ppo_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    policy, critic = trainer.model.policy.eval(), trainer.model.critic.eval()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        saved = AutoModelForCausalLM.from_pretrained(folder)
        saved_critic = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
        with torch.no_grad():
            assert torch.equal(saved(ids).logits, policy(ids).logits)
            assert torch.equal(saved_critic(ids).logits, critic(ids).logits)
        assert AutoTokenizer.from_pretrained(folder).encode("red cat") == toy.tokenizer().encode("red cat")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    pickles = {name for name in files if Path(name).suffix in {".pt", ".pth", ".bin", ".pkl"}}
    assert pickles == {
        f"checkpoint-{step}/{name}"
        for step in (1, 2)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    }
    assert {"model.safetensors", "value_model/model.safetensors", "ppo_config.json"} <= files


def test_a_trainer_can_be_made_of_folders_alone(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    toy.brief_policy(tok).save_pretrained(tmp_path / "sft")
    toy.reward_model(tok).save_pretrained(tmp_path / "reward")
    for folder in ("sft", "reward"):
        tok.save_pretrained(tmp_path / folder)
    trainer = toy.ppo_trainer(
        tmp_path, str(tmp_path / "reward"), model=str(tmp_path / "sft"), value_model=str(tmp_path / "reward")
    )
    trainer.train()
    assert "reward/reward_model" in trainer.state.log_history[0]
    expected = RewardScorer(load_reward_model(tmp_path / "reward"), tok).score(
        trainer._last_rollout.rollout.prompts, trainer._last_rollout.rollout.completions
    )
    assert trainer._last_rollout.rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_plain_prompts_train_too(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"prompt": ["red cat", "blue", "one two three", "up"] * 2})
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend([*prompts, *completions])
        return [float(len(text)) for text in completions]

    toy.ppo_trainer(tmp_path, reward, train_dataset=texts).train()
    assert all(isinstance(text, str) for text in seen)
