"""PPO on the same global batches in this process, or in as many as `accelerate launch` starts.

accelerate launch --config_file ... tests/workers/ppo_cases.py FOLDER
"""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import toy
from workers import sharding_checks

from tieback.cli import errors
from tieback.pipeline.model_loading import load_whole
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.rollout.sampler import TransformersSampler
from tieback.pipeline.trainer import PPOTrainer
from tieback.pipeline.trainer.checkpoints import STATE_FILE
from tieback.ppo_core.step import MinibatchStep
from tieback.reward_model.scoring import RewardScorer

ADAPTIVE: dict[str, Any] = {
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
}
SAVED: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
LORA: dict[str, Any] = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), **SAVED}
SAMPLE, CLIP = TransformersSampler.sample, MinibatchStep._clip
CASES: dict[str, dict[str, Any]] = {
    "everything": ADAPTIVE,
    "lora": LORA,
    # Policy, critic, reference and reward model are adapters of one base.
    "one base": {**LORA, "critic": "adapter", "gradient_checkpointing": True},
    "shared critic": {"critic": "shared", **SAVED},
    "critic over bins": {"value_bins": 41, "value_range": 20.0, "value_clip_range": None, **SAVED},
    "shared critic over bins": {
        "value_bins": 41,
        "value_range": 20.0,
        "value_clip_range": None,
        "critic": "shared",
    },
    "gradient checkpointing": {"gradient_checkpointing": True},
    # Of 14 prompts an epoch leaves 6 out: three iterations are three epochs.
    "uneven": {"train_dataset": toy.prompts(14), "max_steps": 3, "num_minibatches": 4},
    # The greatest seed, of which the second process must not make a greater one.
    "bootstrap": {"truncation": "bootstrap", "gamma": 0.9, "micro_batch_size": 1, "seed": 2**32 - 1},
    "whole minibatches": {"micro_batch_size": None, "replicate_frozen_models": True},
    # The policy is to stay as it is in the first iteration, decay and momentum of the second one included.
    "warm-up": {
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "critic_warmup_iterations": 1,
        **SAVED,
    },
    "imitation": {
        "ptx_dataset": toy.demonstrations(),
        "ptx_coef": 0.5,
        "positive_nll_coef": 0.2,
        "positive_score": 0.4,
        "num_ppo_epochs": 2,
    },
    # Of two turns with an environment's between them, which processes sample in unequal numbers of calls.
    "environment": {"rollout_func": toy.two_turns, "max_completion_length": 14, "truncation": "bootstrap"},
    "moving reference": {"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.4, **SAVED, "max_steps": 3},
    "reset reference": {**LORA, "ref_model_sync_steps": 1, "max_steps": 3},
    "reset whole reference": {"ref_model_sync_steps": 1, "replicate_frozen_models": True},
    "scores by token": {"per_token_reward_model": True},
    # The second step of an iteration goes too far, and is not taken.
    "target KL": {"target_kl": 1e-4, "num_ppo_epochs": 3},
}
# The checkpoint from which a case is resumed: within the critic's warm-up (where the policy has no optimiser state), after it.
RESUMED = {
    "everything": 2,
    "warm-up": 1,
    "lora": 1,
    "one base": 1,
    "shared critic": 1,
    "critic over bins": 1,
    "moving reference": 2,
    "reset reference": 2,
}


def make_trainer(folder: Path, processes: int, reward: Any = toy.id_reward, **settings: Any) -> PPOTrainer:
    """A trainer of global batches of eight, two minibatches each, and micro-batches that do not fall evenly."""
    TransformersSampler.sample = toy.fixed_sample
    load_whole()  # models made here are whole, and given as objects
    tok = toy.tokenizer()
    adapted = settings.get("critic") == "adapter"
    reward_model = RewardScorer(toy.reward_adapter(), tok) if adapted else toy.reward_model(tok)
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
        value_model=None if "critic" in settings else reward_model,
        eval_dataset=toy.prompts(7),
        reward_weights=[1.0, 0.3],
        **(defaults | settings),
    )


def summary(trainer: PPOTrainer) -> dict[str, Any]:
    """All that one process and several must agree on."""
    return {
        # Whole; ZeRO-3 gathers them on the first process alone.
        "weights": dict(trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}),
        "logs": [
            toy.without_measurements(entry)
            for entry in trainer.state.log_history
            if "train_runtime" not in entry
        ],
        "kl": trainer.kl_controller.state_dict(),
        "moments": trainer.reward_moments.state_dict(),
    }


def run(folder: Path, processes: int) -> dict[str, Any]:
    """The stage, every case, one of them resumed in its middle, and a run that one process alone is told to stop."""
    run_stage(folder, processes)
    results: dict[str, Any] = {}
    for name, settings in CASES.items():
        trainer = make_trainer(folder / name, processes, **settings)
        steps = count_steps(trainer)
        trainer.train()
        results[name] = {**summary(trainer), "steps": len(steps)}
    for name, step in RESUMED.items():
        resumed = make_trainer(folder / f"{name} resumed", processes, **CASES[name])
        resumed.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{step}"))
        results[f"{name} resumed"] = summary(resumed)
    trainer = make_trainer(folder / "everything", processes)
    trainer.evaluate()
    results["evaluation"] = trainer.state.log_history
    results["interrupted"] = interrupted(folder / "interrupted", processes)
    results["dynamic sampling"] = dynamic(folder / "dynamic", processes)
    results["fp32"] = small_steps(folder / "fp32", processes)
    results["bf16"] = small_steps(folder / "bf16", processes, bf16=True)
    results["sharding"] = sharding_checks.run(folder.parent, folder, processes, SAMPLE)
    return results


def dynamic(folder: Path, processes: int) -> dict[str, Any]:
    """Whether this process has learnt from prompts that are scored unlike alone, and the log of all, where one lacks more than another."""

    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        alike = [len(prompt[0]["content"].split()) <= 2 for prompt in prompts]
        return [0.5 if no else row % 2 for row, no in enumerate(alike)]

    settings = {"num_generations": 2, "dynamic_sampling_batches": 30, "max_steps": 2}
    trainer = make_trainer(folder, processes, reward, **settings)
    trainer.train()
    scores = trainer._last_rollout.raw_scores.view(-1, 2)
    logs = toy.iteration_logs(trainer)
    return {"unlike": bool((scores[:, 0] != scores[:, 1]).all()), "logs": logs}


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


def count_steps(trainer: PPOTrainer) -> list[float]:
    """Norms of the gradients with which the optimiser has stepped (filled in as it trains)."""
    norms: list[float] = []

    def clip(self: MinibatchStep) -> float:
        norms.append(CLIP(self))
        return norms[-1]

    MinibatchStep._clip = clip
    return norms


def small_steps(folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """Changes [N] of this process's log-probabilities and values by one iteration of small steps, and its log."""
    trainer = make_trainer(folder, processes, optim="adamw_torch", learning_rate=1e-5, **settings)
    batches = []

    def to_batch(scored: Any) -> Any:
        batches.append(PPOTrainer.to_batch(trainer, scored))
        return batches[-1]

    trainer.to_batch = to_batch
    trainer.train()
    (batch,) = batches
    logprobs, values, ref_logprobs = trainer._score_tokens(batch.inputs)
    return {
        "log ratios": (logprobs - batch.old_logprobs)[batch.mask],
        "value changes": (values[:, :-1] - batch.old_values)[batch.mask],
        "reference drift": (ref_logprobs - batch.ref_logprobs)[batch.mask].abs().max().item(),
        "logs": [toy.without_measurements(entry) for entry in trainer.state.log_history[:1]],
    }


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


def main() -> None:
    """What the launcher runs."""
    gc.freeze()  # as in conftest.py
    destination = Path(sys.argv[1])
    outcome = run(destination, int(os.environ["WORLD_SIZE"]))
    torch.save(outcome, destination / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    errors.run(main)
