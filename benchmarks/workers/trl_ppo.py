"""Iterations of TRL's `PPOTrainer`: `trl_ppo.py WORLD DTYPE THREADS`, run in the environment of the peers."""

import sys
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from llm_world import (
    MICRO_BATCH_SIZE,
    PPO_EPOCHS,
    WORLDS,
    make_classifier,
    make_policy,
    make_tokenizer,
    prompts,
)
from protocol import Turns, resident_mib
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class TakeTurns(TrainerCallback):
    """Waits for the turn before each iteration."""

    def __init__(self, own: float) -> None:
        self.turns = Turns()
        self.own = own

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.done(own=self.own)
        self.turns.wait()


def main() -> None:
    """Train for as many turns as there are."""
    world, dtype = WORLDS[sys.argv[1]], sys.argv[2]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(sys.argv[3]))
    tokenizer = make_tokenizer(world)
    policy, reference = make_policy(world), make_policy(world)
    critic, reward_model = make_classifier(world, 1), make_classifier(world, 2)
    own = resident_mib()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in prompts(world)]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=MICRO_BATCH_SIZE,
            gradient_accumulation_steps=world.rows // MICRO_BATCH_SIZE,
            num_mini_batches=1,
            num_ppo_epochs=PPO_EPOCHS,
            total_episodes=1000 * world.rows,
            response_length=world.max_completion_length,
            temperature=1.0,
            stop_token="eos",
            learning_rate=1e-6,
            num_sample_generations=0,
            bf16=dtype == "bf16",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=critic,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=[TakeTurns(own)],
        ).train()


if __name__ == "__main__":
    main()
