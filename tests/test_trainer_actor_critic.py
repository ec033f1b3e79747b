"""What an actor-critic says of its weights is all that the trainer knows: another kind of critic is one class."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tieback.pipeline.rollout.token_scores import completion_logprobs, completion_values
from tieback.pipeline.trainer import PPOTrainer, models
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.checkpoints import CheckpointError

HEAD = "value_head.safetensors"


class SharedTrunk(ActorCritic):
    """A critic that is a head on the policy's own trunk."""

    def __init__(self, policy: Any, critic: Any, *settings: Any) -> None:
        super().__init__(policy, critic, *settings)
        self.critic = critic.score

    def score_tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy = completion_logprobs(
            self.policy, inputs, self.temperature, self.entropy_requires_grad
        )
        trunk_and_head: Any = SimpleNamespace(
            base_model=self.policy.base_model, score=self.critic, config=self.config
        )
        return logprobs, completion_values(trunk_and_head, inputs), entropy

    def models_with_layers(self) -> Any:
        return (self.policy,)

    def trained_parameters(self) -> Any:
        return {
            role: dict(module.named_parameters(prefix=role))
            for role, module in (("policy", self.policy), ("critic", self.critic))
        }

    def save(self, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
        self.policy.save_pretrained(folder)
        save_file(self.critic.state_dict(), Path(folder, HEAD))

    def load(self, folder: str) -> None:
        self.policy.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        self.critic.load_state_dict(load_file(Path(folder, HEAD)))


@pytest.fixture
def shared_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.CRITICS, "separate", SharedTrunk)


def trainer(folder: Path, **settings: Any) -> PPOTrainer:
    defaults = {
        "learning_rate": 1e-3,
        "critic_learning_rate": 4e-3,
        "weight_decay": 0.1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_checkpointing": True,
    }
    return toy.ppo_trainer(folder, **(defaults | settings))


@pytest.mark.usefixtures("shared_trunk")
def test_a_critic_on_the_policys_trunk_is_optimised_saved_and_resumed_by_the_same_trainer(
    tmp_path: Path,
) -> None:
    straight = trainer(tmp_path / "straight")
    groups = straight.create_optimizer().param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    parameters = dict(straight.model.named_parameters())
    assert isinstance(parameters["critic.weight"], nn.Parameter)
    assert sum(len(group["params"]) for group in groups) == len(settings) == len(parameters)
    for name, parameter in parameters.items():
        expected = (4e-3 if name == "critic.weight" else 1e-3, 0.0 if "norm" in name else 0.1)
        assert settings[id(parameter)] == expected, name

    before = toy.weights(straight.model)
    straight.train()
    after = toy.weights(straight.model)
    assert all(not before[name].equal(after[name]) for name in before)

    checkpoint = tmp_path / "straight" / "checkpoint-2"
    assert not (checkpoint / "value_model").exists()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    for name, parameter in toy.weights(resumed.model).items():
        assert parameter.equal(after[name]), name

    saved = load_file(tmp_path / "straight" / "checkpoint-4" / HEAD)["weight"]
    assert saved.equal(after["critic.weight"])
    (checkpoint / HEAD).write_bytes(bytes((checkpoint / HEAD).stat().st_size))
    with pytest.raises(CheckpointError, match=r"weights in .*checkpoint-2 cannot be loaded"):
        trainer(tmp_path / "damaged").train(resume_from_checkpoint=str(checkpoint))


def test_a_trained_parameter_that_no_role_has_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(ActorCritic):
        def trained_parameters(self) -> Any:
            parameters = super().trained_parameters()
            del parameters["critic"]["critic.score.weight"]
            return parameters

    monkeypatch.setitem(models.CRITICS, "separate", Forgetful)
    with pytest.raises(ValueError, match=r"trained_parameters leaves out \['critic.score.weight'\]"):
        trainer(tmp_path).train()


def test_what_is_frozen_has_no_role(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model.policy.requires_grad_(False)
    by_role = run.model.trained_parameters()
    assert by_role["policy"] == {}
    assert set(by_role["critic"]) == {name for name in toy.weights(run.model) if name.startswith("critic.")}
