"""A PPO run on global batches of eight, straight or resumed, in as many processes as `accelerate launch` starts.

accelerate launch --config_file ... tests/workers/resume_cases.py FOLDER [CHECKPOINT ...]
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import toy

from tieback.cli import errors
from tieback.pipeline.model_loading import load_whole
from tieback.pipeline.rollout.sampler import TransformersSampler
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.sharded_tensors import gathered

# All that has a state; Adam with an epsilon that keeps rounding from being magnified. Two iterations an epoch.
SETTINGS: dict[str, Any] = {
    "max_steps": 5,
    "kl_target": 0.3,
    "kl_horizon": 40,
    "normalize_rewards": True,
    "critic_learning_rate": 0.02,
    "adam_epsilon": 1e-2,
    "micro_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}
# What is changed, by name, after the second iteration.
CHANGES = {"learning_rate": 0.03, "critic_learning_rate": 0.05, "weight_decay": 0.2, "adam_beta1": 0.5}


def make_trainer(folder: Path, processes: int, **settings: Any) -> PPOTrainer:
    """A trainer whose processes share eight completions an iteration."""
    load_whole()  # the arguments of a trainer before have set ZeRO-3 up for every model
    tok = toy.tokenizer()
    shared = {"per_device_train_batch_size": 8 // processes, **SETTINGS}
    return toy.ppo_trainer(folder, tok=tok, value_model=toy.reward_model(tok), **(shared | settings))


def summary(trainer: PPOTrainer) -> dict[str, Any]:
    """All that runs of different numbers of processes must agree on, and where this process draws numbers from."""
    figures = ("policy/loss", "value/loss", "kl/ref", "kl_coef", "reward/mean", "learning_rate", "step")
    return {
        "weights": full_weights(trainer),
        "logs": [{name: entry[name] for name in figures} for entry in toy.iteration_logs(trainer)],
        "kl": trainer.kl_controller.state_dict(),
        "moments": trainer.reward_moments.state_dict(),
        "seed": torch.initial_seed(),
    }


def full_weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Every parameter, gathered where it is sharded."""
    module = trainer.accelerator.unwrap_model(trainer.model)
    weights = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            weights[name] = whole.detach().clone()
    return weights


def run(folder: Path, processes: int, checkpoints: list[str]) -> dict[str, Any]:
    """A straight run, one that goes on from its middle with changes, and one resumed from each checkpoint."""
    TransformersSampler.sample = toy.fixed_sample
    # It compares with samples, of which there are none here.
    PPOTrainer._check_sampling = lambda trainer, rows: None  # type: ignore[method-assign]
    straight = make_trainer(folder / "straight", processes)
    straight.train()
    changed = make_trainer(folder / "changed", processes, **CHANGES, resume_with_changes=list(CHANGES))
    changed.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-2"))
    results = {"straight": summary(straight), "changed": summary(changed)}
    for number, checkpoint in enumerate(checkpoints):
        resumed = make_trainer(folder / f"resumed{number}", processes)
        resumed.train(resume_from_checkpoint=checkpoint)
        results[checkpoint] = summary(resumed)
    return results


def main() -> None:
    """What the launcher runs."""
    gc.freeze()  # as in conftest.py
    destination = Path(sys.argv[1])
    outcome = run(destination, int(os.environ["WORLD_SIZE"]), json.loads(sys.argv[2]))
    torch.save(outcome, destination / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    errors.run(main)
