"""Iterations of our `PPOTrainer`: `tieback_ppo.py WORLD DTYPE THREADS CRITIC [SAMPLER]`."""

import sys
import tempfile
from typing import Any

import torch
from llm_world import (
    PPO_EPOCHS,
    World,
    make_classifier,
    make_policy,
    make_tokenizer,
    prompts,
    world_named,
)
from protocol import Turns, resident_mib
from torch import Tensor

from tieback import PPOConfig, PPOTrainer


class Timed(PPOTrainer):
    """Waits for the turn before each iteration, and tells what share of it each phase took."""

    turns: Turns
    figures_of_turn: dict[str, float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.turns.wait()
        loss = super().training_step(*args, **kwargs)
        phases = {name: values[-1] for name, values in self._metrics.items() if name.startswith("time/")}
        self.turns.done(**self.figures_of_turn, **phases)
        return loss


def make_trainer(
    world: World,
    dtype: str,
    critic: str,
    folder: str,
    trainer_class: type[Timed] = Timed,
    sampler: str = "transformers",
) -> Timed:
    """Our trainer on the models and prompts of a case."""
    policy, reward_model = make_policy(world), make_classifier(world, 2)
    value_model = make_classifier(world, 1) if critic == "separate" else None
    # The trainer makes the reference by itself.
    own = resident_mib() + sum(p.numel() * p.element_size() for p in policy.parameters()) / 2**20
    trainer = trainer_class(
        model=policy,
        reward_funcs=reward_model,
        reward_processing_classes=make_tokenizer(world),
        value_model=value_model,
        processing_class=make_tokenizer(world),
        args=PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=world.rows,
            num_minibatches=1,
            num_ppo_epochs=PPO_EPOCHS,
            max_steps=1000,
            max_completion_length=world.max_completion_length,
            sampler=sampler,
            max_prompt_length=world.prompt_lengths[1] if sampler == "vllm" else None,
            temperature=1.0,
            learning_rate=1e-6,
            critic=critic,
            bf16=dtype == "bf16",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"prompt": text} for text in prompts(world)],
    )
    trainer.turns, trainer.figures_of_turn = Turns(), {"own": own}
    return trainer


def main() -> None:
    """Train for as many turns as there are."""
    torch.set_num_threads(int(sys.argv[3]))
    with tempfile.TemporaryDirectory() as folder:
        sampler = sys.argv[5] if len(sys.argv) > 5 else "transformers"
        make_trainer(world_named(sys.argv[1]), sys.argv[2], sys.argv[4], folder, sampler=sampler).train()


if __name__ == "__main__":
    main()
