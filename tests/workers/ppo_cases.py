"""PPO on the same global batches in this process, or in as many as `accelerate launch` starts.

accelerate launch --config_file ... tests/workers/ppo_cases.py FOLDER
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import toy

from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.rollout.sampler import TransformersSampler
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.checkpoints import STATE_FILE

CASES: dict[str, dict[str, Any]] = {
    "everything": {
        "kl_target": 0.3,
        "kl_horizon": 40,
        "normalize_rewards": True,
        "ent_coef": 0.01,
        "critic_warmup_iterations": 1,
        "critic_learning_rate": 0.02,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "lora": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "gradient checkpointing": {"gradient_checkpointing": True},
    # The greatest seed, of which the second process must not make a greater one.
    "bootstrap": {"truncation": "bootstrap", "gamma": 0.9, "micro_batch_size": 1, "seed": 2**32 - 1},
}


def make_trainer(folder: Path, processes: int, reward: Any = toy.id_reward, **settings: Any) -> PPOTrainer:
    """A trainer of global batches of eight, two minibatches each, and micro-batches that do not fall evenly."""
    TransformersSampler.sample = toy.fixed_sample
    tok = toy.tokenizer()
    reward_model = toy.reward_model(tok)
    defaults = {
        "per_device_train_batch_size": 8 // processes,
        "micro_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 1,
    }
    return toy.ppo_trainer(
        folder,
        [reward, reward_model],
        tok=tok,
        reward_processing_classes=[None, tok],
        value_model=reward_model,
        eval_dataset=toy.prompts(7),
        reward_weights=[1.0, 0.3],
        **(defaults | settings),
    )


def summary(trainer: PPOTrainer) -> dict[str, Any]:
    """All that one process and several must agree on."""
    return {
        "weights": toy.weights(trainer.accelerator.unwrap_model(trainer.model)),
        "logs": [entry for entry in trainer.state.log_history if "train_runtime" not in entry],
        "kl": trainer.kl_controller.state_dict(),
        "moments": trainer.reward_moments.state_dict(),
    }


def run(folder: Path, processes: int) -> dict[str, Any]:
    """The stage, every case, one of them resumed in its middle, and a run that one process alone is told to stop."""
    run_stage(folder, processes)
    results: dict[str, Any] = {}
    for name, settings in CASES.items():
        trainer = make_trainer(folder / name, processes, **settings)
        trainer.train()
        results[name] = summary(trainer)
    straight = folder / "everything"
    resumed = make_trainer(folder / "resumed", processes, **CASES["everything"])
    resumed.train(resume_from_checkpoint=str(straight / "checkpoint-2"))
    results["resumed"] = summary(resumed)
    trainer = make_trainer(folder / "everything", processes)
    trainer.evaluate()
    results["evaluation"] = trainer.state.log_history
    results["interrupted"] = interrupted(folder / "interrupted", processes)
    return results


def run_stage(folder: Path, processes: int) -> None:
    """pipeline/ppo.py, on the models and the recipe that stand beside `folder`, into `folder/ppo`."""
    TransformersSampler.sample = toy.fixed_sample
    batch = [
        "--per_device_train_batch_size",
        str(8 // processes),
        "--optim",
        "sgd",
        "--learning_rate",
        "0.05",
    ]
    device = ["--use_cpu"] if processes == 1 else []
    toy.run_ppo(folder.parent, "--run_dir", str(folder), *batch, *device)


def interrupted(folder: Path, processes: int) -> tuple[int, bool, list[str]]:
    """Iterations done, whether this process knows why, and the checkpoints, where the last rank gets a signal."""
    calls = [0]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 2 and trainer.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGINT)
        return toy.id_reward(completion_ids)

    trainer = make_trainer(folder, processes, reward, max_steps=4, save_strategy="steps", save_steps=100)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    names = [checkpoint.name for checkpoint in whole_checkpoints(folder, STATE_FILE)]
    return trainer.state.global_step, trainer.interrupt.interrupted, names


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    outcome = run(destination, int(os.environ["WORLD_SIZE"]))
    torch.save(outcome, destination / f"rank{os.environ['RANK']}.pt")
