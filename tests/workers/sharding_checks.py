"""What the processes of a sharded backend hold, and when: parameters, gradients, and the policy while it generates."""

from pathlib import Path
from typing import Any

import toy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tieback.pipeline.rollout.sampler import Completion, TransformersSampler
from tieback.pipeline.trainer import PPOConfig, PPOTrainer

SETTINGS: dict[str, Any] = {
    "max_steps": 1,
    "max_completion_length": 6,
    "num_minibatches": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def by_name(home: Path, folder: Path, processes: int, **settings: Any) -> PPOTrainer:
    """A trainer that loads its models itself, after the settings were made; the critic is made of the policy."""
    args = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8 // processes, **(SETTINGS | settings)
    )
    models = (str(home / "sft"), str(home / "reward"))
    return PPOTrainer(*models, args=args, train_dataset=toy.prompts(), eval_dataset=toy.prompts(7))


def run(home: Path, folder: Path, processes: int, sample: Any) -> dict[str, Any]:
    """Everything below, for models that are loaded by name.

    Args:
        home: of `toy.write_ppo_home`.
        folder: to write to.
        processes: their number.
        sample: `TransformersSampler.sample` as it was before anything took its place.
    """
    TransformersSampler.sample = toy.fixed_sample
    trainer = by_name(home, folder / "by name", processes, micro_batch_size=1)
    sharded = type(trainer.reference).__name__.startswith("FSDP") or is_part(next(trainer.model.parameters()))
    results: dict[str, Any] = {"sharded when loaded": sharded, "shares": shares(trainer)}
    results["evaluation"] = trainer.evaluate()
    gradients = count_gradients(trainer)
    trainer.train()
    results |= {
        "gradients": gradients,
        "shares afterwards": shares(trainer),
        "weights": dict(trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}),
        "logs": [
            toy.without_measurements(entry)
            for entry in trainer.state.log_history
            if "train_runtime" not in entry
        ],
    }
    replicated = by_name(home, folder / "replicated", processes, replicate_frozen_models=True)
    results["replicated"] = {"evaluation": replicated.evaluate(), "shares": shares(replicated)}
    TransformersSampler.sample = sample
    results["generation"] = generation(by_name(home, folder / "generation", processes), sample)
    return results


def is_part(parameter: Tensor) -> bool:
    """Whether this process holds a part of a parameter alone."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def held(parameter: Tensor) -> int:
    """Number of elements of a parameter that this process holds."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel() if not parameter.data.numel() else parameter.numel()
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def whole(parameter: Tensor) -> int:
    """Number of its elements on all processes together."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def share(model: nn.Module) -> float:
    """Share of a model's elements that this process holds."""
    parameters = list(model.parameters())
    return sum(map(held, parameters)) / sum(map(whole, parameters))


def shares(trainer: PPOTrainer) -> dict[str, float]:
    """That of each role."""
    actor_critic = trainer.accelerator.unwrap_model(trainer.model)
    roles = {"policy": actor_critic.policy, "critic": actor_critic.critic, "reference": trainer.reference}
    return {name: share(model) for name, model in roles.items()} | {"reward": share(trainer.scorers[0].model)}


def count_gradients(trainer: PPOTrainer) -> list[tuple[float, list[str]]]:
    """After each micro-batch: gradient elements held over those of the model, and their dtypes (filled in as it trains)."""
    counts: list[tuple[float, list[str]]] = []
    backward = trainer.accelerator.backward

    def counted(loss: Tensor, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        actor_critic = trainer.accelerator.unwrap_model(trainer.model)
        gradients = [p.grad for p in actor_critic.parameters() if p.grad is not None]
        for module in actor_critic.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        gradients += [g for g in (parameter.unsharded_accumulated_grad,) if g is not None]
        total = sum(map(whole, actor_critic.parameters()))
        counts.append((sum(map(held, gradients)) / total, sorted({str(g.dtype) for g in gradients})))

    trainer.accelerator.backward = counted
    return counts


def generation(trainer: PPOTrainer, sample: Any) -> dict[str, Any]:
    """An iteration with real sampling: completions of this process, and whose weights were whole while it sampled."""
    seen: dict[str, Any] = {"lengths": [], "whole": [], "whole afterwards": []}
    score = trainer.score

    def watched(self: TransformersSampler, *args: Any, **kwargs: Any) -> list[Completion]:
        completions = sample(self, *args, **kwargs)
        seen["lengths"] += [len(completion.ids) for completion in completions]
        seen["whole"].append((is_whole(self._model.policy), is_whole(self._model.critic)))
        return completions

    def scored(*args: Any, **kwargs: Any) -> Any:
        seen["whole afterwards"].append(is_whole(trainer.accelerator.unwrap_model(trainer.model).policy))
        return score(*args, **kwargs)

    TransformersSampler.sample = watched
    trainer.score = scored
    trainer.train()
    return seen


def is_whole(model: nn.Module) -> bool:
    """Whether this process can read all of a model's weights at this moment."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if units:
        groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
        return all(group.is_unsharded for group in groups)
    return all(parameter.data.numel() > 0 for parameter in model.parameters())
