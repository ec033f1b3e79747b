"""The half of PPOTrainer that is about Trainer's machinery: the optimiser's groups, and checkpoints that resume exactly."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from tieback.pipeline.rollout.settings import PPO_CONFIG
from tieback.pipeline.trainer.callbacks import InterruptCallback
from tieback.pipeline.trainer.checkpoints import (
    clear_state,
    load_models,
    read_state,
    resolve_checkpoint,
    save_models,
    write_state,
)
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.input_checks import check_batch
from tieback.pipeline.trainer.rewards import RunningMoments
from tieback.ppo_core import FixedKLController


class ActorCriticTrainer(Trainer):
    """A Trainer whose model is an `ActorCritic` and whose gradients are clipped and stepped by `ppo_core.update`.

    Its checkpoints hold policy, critic, optimiser, schedule, random states, KL coefficient and reward statistics.
    """

    args: PPOConfig
    optimizer: Any
    control: Any
    interrupt: InterruptCallback
    kl_controller: FixedKLController
    reward_moments: RunningMoments

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser, with a learning rate of its own for the critic where one is set."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(trained))
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            critic_lr = self.args.critic_learning_rate or self.args.learning_rate
            groups = []
            for prefix, learning_rate in (("policy.", self.args.learning_rate), ("critic.", critic_lr)):
                for decay in (True, False):
                    parameters = [
                        parameter
                        for name, parameter in trained.named_parameters()
                        if parameter.requires_grad
                        and prefix in name[: len("module.") + len(prefix)]
                        and (name in decayed) == decay
                    ]
                    if parameters:
                        weight_decay = self.args.weight_decay if decay else 0.0
                        groups.append(
                            {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}
                        )
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Leave gradients alone: `update` has clipped them, stepped, and set them to None."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Report none: `update` logs the norm that it clipped."""

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> Any:
        """Train; with `resume_from_checkpoint` go on from that folder, or for True from the newest whole one."""
        check_batch(
            len(self.train_dataset), self.args.per_device_train_batch_size, self.accelerator.num_processes
        )
        folder = resolve_checkpoint(self.args.output_dir, resume_from_checkpoint)
        with self.interrupt:
            return super().train(resume_from_checkpoint=folder, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        save_models(self.accelerator.unwrap_model(self.model), folder, state_dict)
        self.processing_class.save_pretrained(folder)
        Path(folder, PPO_CONFIG).write_text(self.args.to_json_string())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            clear_state(folder)
        # Trainer would delete older checkpoints before every process has written its part of this one.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        if not self.args.save_only_model:
            state = {
                "kl": self.kl_controller.state_dict(),
                "reward_moments": self.reward_moments.state_dict(),
            }
            write_state(folder, state)
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_models(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_models(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = read_state(checkpoint)
            self.kl_controller.load_state_dict(state["kl"])
            self.reward_moments.load_state_dict(state["reward_moments"])
