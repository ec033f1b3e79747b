"""Policy, reference, critic and reward model on one base: what four models of their own would compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from accelerate import Accelerator
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.adapters import using_adapter
from tieback.pipeline.rollout.token_scores import completion_values, pack_sequences
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.ppo_core import PPOHyperparameters, update
from tieback.reward_model.head import as_reward_model, load_reward_model
from tieback.reward_model.scoring import RewardScorer

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and two adapters of it: `sft`, and `reward` with a head and a calibration bias."""
    folder = tmp_path_factory.mktemp("adapters")
    tok = toy.tokenizer()
    torch.manual_seed(3)
    toy.brief_policy(tok).save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(folder / "sft")
    tok.save_pretrained(folder / "sft")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    reward = get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS"))
    reward.save_pretrained(folder / "reward")
    model.config.reward_bias = 0.25
    model.config.save_pretrained(folder / "reward")
    tok.save_pretrained(folder / "reward")
    return folder


def sft_policy(folder: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / "sft", is_trainable=True)


def trainer(folder: Path, output: Path, **settings: Any) -> PPOTrainer:
    return toy.ppo_trainer(
        output, str(folder / "reward"), model=sft_policy(folder), **{"learning_rate": 1e-3} | settings
    )


def adapted_critic(folder: Path) -> nn.Module:
    """A critic of its own: another copy of the base, with the adapter of SFT in its layers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    config = PeftConfig.from_pretrained(folder / "sft")
    config.task_type = None
    adapted = PeftModel.from_pretrained(model, folder / "sft", is_trainable=True, config=config)
    critic = as_reward_model(adapted.get_base_model())
    critic.score.requires_grad_(True)
    return critic


def test_one_update_on_one_base_is_that_of_models_of_their_own(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path)
    torch.nn.init.normal_(run.model.critic.score.weight)
    batch = run.to_batch(run.score(run.generate([run.train_dataset[i] for i in range(8)])))
    one_base = run.model
    separate = ActorCritic(sft_policy(folder), adapted_critic(folder), 1.0, False)
    separate.critic.score.weight.data.copy_(one_base.critic.score.weight)

    inputs = batch.inputs
    with torch.no_grad():
        found, expected = one_base.score_tokens(inputs), separate.score_tokens(inputs)
        for name, one, other in zip(("logprobs", "values", "entropy"), found, expected, strict=True):
            mask = batch.mask
            torch.testing.assert_close(one[:, : mask.shape[1]][mask], other[:, : mask.shape[1]][mask], rtol=0, atol=2e-6, msg=name)  # fmt: skip

    hyper = PPOHyperparameters(num_ppo_epochs=2, num_minibatches=2)
    accelerator = Accelerator(cpu=True)
    after = []
    for model in (one_base, separate):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        update(model, optimizer, batch, hyper, accelerator, 3, generator=torch.Generator().manual_seed(0))
        after.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    one, other = after
    for name, parameter in other.items():
        if name.startswith("policy."):
            twin = one[name]
        elif "lora" in name:
            twin = one[
                name.replace("critic.model", "policy.base_model.model.model").replace(".default.", ".critic.")
            ]
        else:
            twin = one["critic.score.weight"]
        torch.testing.assert_close(twin, parameter, rtol=0, atol=1e-6, msg=name)
    assert len(one) == len(other)


def test_the_reward_model_on_the_policys_base_scores_as_by_itself_throughout_training(
    folder: Path, tmp_path: Path
) -> None:
    tok = toy.tokenizer()
    alone = RewardScorer(load_reward_model(folder / "reward"), tok)
    run = trainer(folder, tmp_path)
    (scorer,) = run.scorers
    assert not isinstance(scorer.model, nn.Module)
    prompts, completions = ["one two", "three"], [" four", " five six"]
    before = scorer.score(prompts, completions)
    assert before == pytest.approx(alone.score(prompts, completions), abs=2e-6)
    run.train()
    assert scorer.score(prompts, completions) == before
    stock = AutoPeftModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1).eval()
    ids = [
        tok(prompt + completion + tok.eos_token)["input_ids"]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    with torch.no_grad():
        expected = [stock(torch.tensor([row])).logits.item() + 0.25 for row in ids]
    assert before == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", ["adapter", "shared"])
def test_only_adapters_and_heads_are_trained_and_have_a_state(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    run = trainer(folder, tmp_path, critic=kind)
    by_role = run.model.trained_parameters()
    adapter = 2 * 3 * 2  # layers, modules, factors
    assert {role: len(parameters) for role, parameters in by_role.items()} == {
        "policy": adapter,
        "critic": 1 + (adapter if kind == "adapter" else 0),
    }
    before = toy.weights(run.model)
    run.train()
    trained = {name for parameters in by_role.values() for name in parameters}
    for name, parameter in toy.weights(run.model).items():
        assert before[name].equal(parameter) == (name not in trained), name
    assert len(run.optimizer.state) == len(trained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "shared"])
def test_recomputed_layers_change_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    weights = []
    for recompute in (False, True):
        run = trainer(folder, tmp_path / str(recompute), critic=kind, gradient_checkpointing=recompute, micro_batch_size=2)  # fmt: skip
        run.train()
        weights.append(toy.weights(run.model))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "whole"), [("adapter", False), ("shared", False), ("shared", True)])
def test_a_run_resumes_bit_for_bit_and_its_critic_is_saved(
    folder: Path, tmp_path: Path, kind: str, whole: bool
) -> None:
    def make(output: Path) -> PPOTrainer:
        settings = {"critic": kind, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
        if whole:
            return toy.ppo_trainer(output, **settings)
        return trainer(folder, output, **settings)

    straight = make(tmp_path / "straight")
    straight.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    torch.testing.assert_close(toy.weights(resumed.model), toy.weights(straight.model), rtol=0, atol=0)
    if whole:
        return
    saved = tmp_path / "straight" / "checkpoint-3"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), saved)
    ids = torch.tensor([[3, 40, 41, 1, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, straight.model.policy(ids).logits, rtol=0, atol=1e-6)
    if kind == "adapter":
        packed = pack_sequences([[3, 40, 41]], [[70, 71, 1]], 0, torch.device("cpu"))
        values = straight.model.score_tokens(packed)[1]
        critic = AutoPeftModelForSequenceClassification.from_pretrained(saved / "value_model", num_labels=1)
        with torch.no_grad():
            own = completion_values(as_reward_model(critic.get_base_model()), packed)
        torch.testing.assert_close(own, values.detach(), rtol=0, atol=1e-6)


def test_the_critic_starts_from_the_reward_models_adapter_and_head(folder: Path, tmp_path: Path) -> None:
    from tieback.reward_model.adapter import read_scalar_adapter

    run = trainer(folder, tmp_path, value_model=read_scalar_adapter(folder / "reward"))
    packed = pack_sequences([[3, 40, 41]], [[70, 71, 1]], 0, torch.device("cpu"))
    with torch.no_grad():
        values = run.model.score_tokens(packed)[1]
        expected = completion_values(load_reward_model(folder / "reward"), packed)
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-6)


def test_another_adapter_is_used_without_a_change_of_what_is_trained(folder: Path) -> None:
    model = sft_policy(folder)
    ids = torch.tensor([[3, 40, 41, 1, 4]])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = model(ids).logits
    with using_adapter(model, None):
        bare = model(ids).logits
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    torch.testing.assert_close(bare, AutoModelForCausalLM.from_pretrained(folder / "base")(ids).logits, rtol=0, atol=0)  # fmt: skip
    assert (own - bare).abs().max() > 1e-2
    torch.testing.assert_close(model(ids).logits, own, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "value_model", "message"),
    [
        ({"critic": "adapter"}, "whole", "cannot start from a whole model"),
        ({"critic": "shared"}, "adapter", "shared is a head on the policy's own states"),
        ({"critic": "separate"}, "adapter", "separate is a whole model, and .*reward is an adapter"),
        ({"critic": "separate"}, None, "Name a value_model"),
    ],
)
def test_a_critic_that_cannot_be_made_is_refused(
    folder: Path, tmp_path: Path, settings: dict[str, str], value_model: str | None, message: str
) -> None:
    from tieback.reward_model.adapter import read_scalar_adapter

    given: Any = None
    if value_model is not None:
        given = toy.reward_model(toy.tokenizer()) if value_model == "whole" else read_scalar_adapter(folder / "reward")  # fmt: skip
    with pytest.raises(UsageError, match=message):
        trainer(folder, tmp_path, value_model=given, **settings)


def test_an_adapter_as_critic_needs_a_policy_with_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="puts an adapter beside the policy's, which has none"):
        toy.ppo_trainer(tmp_path, critic="adapter")
