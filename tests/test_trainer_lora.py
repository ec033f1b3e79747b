"""A LoRA policy: the frozen reference beside it, an adapter of the SFT stage, an adapter on the head, and saving."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer import PPOTrainer

PROMPTS = [[3, 40, 41, 1, 4], [3, 50, 1, 4], [3, 60, 61, 62, 1, 4]]
COMPLETIONS = [[70, 71, 72, 1], [73, 1], [74, 75, 76]]
ATTENTION = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def logprobs(model: nn.Module) -> Tensor:
    """Log-probabilities of the fixed completions under a model as it stands; 0 at padding."""
    packed = pack_sequences(PROMPTS, COMPLETIONS, 0, torch.device("cpu"))
    with torch.no_grad():
        return torch.where(packed["mask"], completion_logprobs(model, packed, 1.0)[0], 0.0)


def reference_logprobs(trainer: PPOTrainer) -> Tensor:
    """The same under the trainer's reference, by the trainer's own way."""
    packed = pack_sequences(PROMPTS, COMPLETIONS, 0, torch.device("cpu"))
    mask = packed.pop("mask")
    return torch.where(mask, trainer._score_tokens(packed)[2], 0.0)


def sft_adapter(**changes: Any) -> PeftModel:
    """A policy whose adapter an SFT stage has trained, so to say."""
    torch.manual_seed(7)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    return get_peft_model(toy.brief_policy(toy.tokenizer()), LoraConfig(**settings))


def lora_trainer(folder: Path, model: PeftModel, **settings: Any) -> PPOTrainer:
    return toy.ppo_trainer(folder, model=model, value_model=toy.reward_model(toy.tokenizer()), **settings)


def test_the_reference_of_a_new_adapter_is_the_model_without_it_before_and_after_training(
    tmp_path: Path,
) -> None:
    model = toy.brief_policy(toy.tokenizer())
    sft = logprobs(copy.deepcopy(model))
    trainer = toy.ppo_trainer(tmp_path, model=model, peft_config=LoraConfig(r=4, lora_alpha=8))
    assert trainer.reference is None
    torch.testing.assert_close(reference_logprobs(trainer), sft, rtol=0, atol=1e-6)
    before = toy.weights(trainer.model)
    trainer.train()
    torch.testing.assert_close(reference_logprobs(trainer), sft, rtol=0, atol=1e-6)
    assert (logprobs(trainer.model.policy) - sft).abs().max() > 1e-2
    for name, parameter in toy.weights(trainer.model).items():
        trained = name.startswith("critic.") or "lora" in name
        assert torch.equal(parameter, before[name]) != trained, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["norm"]},
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 32},
    ],
    ids=["attention", "embedding", "a module trained in full", "DoRA", "rsLoRA"],
)
def test_the_reference_of_a_policy_with_an_sft_adapter_is_that_adapter_before_and_after_training(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = sft_adapter(**changes)
    if "modules_to_save" in changes:
        model.base_model.model.model.norm.modules_to_save["default"].weight.data += 0.3
    sft = logprobs(model)
    with model.disable_adapter():
        assert (logprobs(model) - sft).abs().max() > 1e-2
    trainer = lora_trainer(tmp_path, model)
    torch.testing.assert_close(reference_logprobs(trainer), sft, rtol=0, atol=1e-6)
    torch.testing.assert_close(logprobs(trainer.model.policy), sft, rtol=0, atol=1e-6)
    before = toy.weights(trainer.model)
    trainer.train()
    torch.testing.assert_close(reference_logprobs(trainer), sft, rtol=0, atol=1e-6)
    assert (logprobs(trainer.model.policy) - sft).abs().max() > 1e-2
    for name, parameter in toy.weights(trainer.model).items():
        trained = name.startswith("critic.") or ".default" in name
        assert torch.equal(parameter, before[name]) != trained, name
    assert trainer.state.log_history[0]["kl/ref"] == pytest.approx(0.0, abs=1e-5)
    # The k1 estimate from eight completions may be negative.
    assert abs(trainer.state.log_history[1]["kl/ref"]) > 1e-3


def test_an_sft_adapter_loaded_for_inference_is_trained_further(tmp_path: Path) -> None:
    sft_adapter().save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(toy.brief_policy(toy.tokenizer()), tmp_path / "sft")
    sft = logprobs(model)
    trainer = lora_trainer(tmp_path, model)
    trainer.train()
    torch.testing.assert_close(reference_logprobs(trainer), sft, rtol=0, atol=1e-6)
    assert (logprobs(trainer.model.policy) - sft).abs().max() > 1e-2


@pytest.mark.parametrize("target_modules", [["lm_head"], ["lm_head", "q_proj"]])
def test_an_adapter_on_the_head_is_scored_as_if_it_were_merged(target_modules: list[str]) -> None:
    torch.manual_seed(3)
    model = toy.brief_policy(toy.tokenizer(), tie_word_embeddings=False)
    without = logprobs(copy.deepcopy(model))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    torch.testing.assert_close(logprobs(adapted), logprobs(merged), rtol=0, atol=1e-5)
    assert (logprobs(adapted) - without).abs().max() > 0.1


def test_a_second_adapter_on_top_of_the_first_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has an adapter already.*merge_and_unload"):
        lora_trainer(tmp_path, sft_adapter(), peft_config=ATTENTION)


def test_an_adapter_with_another_name_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = get_peft_model(toy.brief_policy(toy.tokenizer()), ATTENTION, adapter_name="sft")
    with pytest.raises(ValueError, match=r"one adapter, named `default`.*\['sft'\]"):
        lora_trainer(tmp_path, model)


def test_the_saved_adapter_loads_on_the_base_with_identical_outputs(tmp_path: Path) -> None:
    for name, trainer in {
        "new": toy.ppo_trainer(tmp_path / "new", peft_config=ATTENTION),
        "sft": lora_trainer(tmp_path / "sft", sft_adapter()),
    }.items():
        trainer.train()
        trainer.save_model()
        folder = tmp_path / name
        assert not (folder / "model.safetensors").exists()
        assert not (folder / "reference").exists()
        loaded = PeftModel.from_pretrained(toy.brief_policy(toy.tokenizer()), folder)
        torch.testing.assert_close(logprobs(loaded), logprobs(trainer.model.policy), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["new", "sft"])
def test_an_adapters_run_resumes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    def trainer(folder: str, **settings: Any) -> PPOTrainer:
        settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        if kind == "new":
            return toy.ppo_trainer(tmp_path / folder, peft_config=ATTENTION, **settings)
        return lora_trainer(tmp_path / folder, sft_adapter(), **settings)

    straight = trainer("straight")
    straight.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    torch.testing.assert_close(toy.weights(resumed.model), toy.weights(straight.model), rtol=0, atol=0)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_adapter(tmp_path: Path) -> None:
    results = []
    for settings in (
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        trainer = toy.ppo_trainer(
            tmp_path,
            peft_config=ATTENTION,
            critic="separate",
            optim="sgd",
            learning_rate=0.05,
            max_steps=1,
            **settings,
        )
        before = toy.weights(trainer.model)
        trainer.train()
        results.append(toy.weights(trainer.model))
    assert not torch.equal(
        *(
            w["policy.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
            for w in (before, results[0])
        )
    )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)
