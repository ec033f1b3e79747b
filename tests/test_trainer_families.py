"""Families of language models that differ in kind: PPO on the whole model and with LoRA, and what is saved."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
import toy
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from tieback.pipeline.model_loading import new_adapter
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer.models import active_dropouts
from tieback.reward_model.head import load_reward_model

LORA = ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0)
TOKENIZER = toy.tokenizer()
IDS = torch.arange(5, 15).unsqueeze(0)


def packed(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
    return pack_sequences(prompts, completions, TOKENIZER.pad_token_id, torch.device("cpu"))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_ppo_tunes_the_whole_model_and_saves_what_loads_by_itself(name: str, tmp_path: Path) -> None:
    model = families.family(name, TOKENIZER)
    # The trainer itself compares sampling with scoring, and the ratio before the first step with 1.
    trainer = toy.ppo_trainer(tmp_path, model=model, tok=TOKENIZER)
    before = toy.weights(trainer.model)
    trainer.train()
    after = toy.weights(trainer.model)
    moved = {part for part in ("policy", "critic") for n in after if n.startswith(part) and not after[n].equal(before[n])}  # fmt: skip
    assert moved == {"policy", "critic"}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    trainer.save_model()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(policy(IDS).logits, trainer.model.policy.eval()(IDS).logits, atol=1e-6, rtol=0)
    critic = load_reward_model(tmp_path / "value_model").eval()
    torch.testing.assert_close(critic(IDS).logits, trainer.model.critic.eval()(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_ppo_tunes_an_adapter_and_saves_what_peft_loads(name: str, tmp_path: Path) -> None:
    families.family(name, TOKENIZER).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = new_adapter(LORA, base)
    trainer = toy.ppo_trainer(tmp_path / "run", model=base, tok=TOKENIZER, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    tuned = trainer.model.policy.eval()(IDS).logits
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (whole(IDS).logits - tuned).abs().max() > 1e-4
    loaded = PeftModel.from_pretrained(whole, tmp_path / "run").eval()
    torch.testing.assert_close(loaded(IDS).logits, tuned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_padded_row_is_scored_as_the_bare_one(name: str) -> None:
    model = families.family(name, TOKENIZER)
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 9)]
    completions = [list(range(40, 40 + length)) for length in (12, 1, 5)]
    with torch.no_grad():
        together, _ = completion_logprobs(model, packed(prompts, completions), 0.7)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            alone, _ = completion_logprobs(model, packed([prompt], [completion]), 0.7)
            torch.testing.assert_close(together[row, : len(completion)], alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),  # PEFT has no default
        ("mamba", {"in_proj", "x_proj", "dt_proj"}),  # PEFT refuses out_proj
        ("gpt_oss", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # experts are no linear layers
    ],
)
def test_an_adapter_goes_into_all_linear_layers_where_none_are_named(name: str, targets: set[str]) -> None:
    model = families.family(name, TOKENIZER)
    adapted = get_peft_model(model, new_adapter(LORA, model))
    found = {n.split(".")[-4] for n, _ in adapted.named_parameters() if n.endswith("lora_A.default.weight")}
    assert found == targets
    named = new_adapter(ModelConfig(use_peft=True, lora_target_modules=["in_proj"]), model)
    assert named is not None
    assert named.target_modules == {"in_proj"}
    assert new_adapter(ModelConfig(), model) is None


def test_noise_of_a_router_is_found_and_switched_off(tmp_path: Path) -> None:
    model = families.family("mixtral", TOKENIZER, num_local_experts=4, router_jitter_noise=0.2)
    trainer = toy.ppo_trainer(tmp_path, model=model, tok=TOKENIZER)
    assert not list(active_dropouts(trainer.model))
    trainer.train()  # which checks the ratio
    noisy = families.family("mixtral", TOKENIZER, num_local_experts=4, router_jitter_noise=0.2)
    trainer = toy.ppo_trainer(tmp_path, model=noisy, tok=TOKENIZER, disable_dropout=False)
    with pytest.raises(ValueError, match=r"jitter_noise 0.2 is active in .*disable_dropout=True"):
        trainer.train()
