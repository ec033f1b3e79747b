"""A reference of the KL penalty that does not stay where the training began: reset to the policy now and then, or following it.

Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment" (TR-DPO); the settings have the names of TRL's `GRPOConfig`.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.adapters import adapter_parameters
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.sharded_tensors import gathered, split_like

REFERENCE_FILE = "reference.safetensors"


class MovingReference:
    """Moves the reference: π_ref ← α·π + (1 − α)·π_ref, weight by weight, after every `ref_model_sync_steps` iterations.

    Args:
        trained: whose policy is followed.
        reference: model of its own, or None where it is an adapter of the policy, or its base.
        accelerator: of the training.
        args: settings.

    Raises:
        UsageError: weights would not move as asked: those of two adapters, or of a reference that is kept in bf16.
    """

    def __init__(
        self, trained: ActorCritic, reference: nn.Module | None, accelerator: Accelerator, args: PPOConfig
    ) -> None:
        self.trained, self.reference = trained, reference
        self.every, self.alpha = args.ref_model_sync_steps, args.ref_model_mixup_alpha
        self._has_moved = self.every is not None
        if self.every is None or self.alpha == 1:
            return
        if reference is None:
            raise UsageError(
                f"ref_model_mixup_alpha={self.alpha}: the reference is an adapter, and a mean of the matrices of two adapters is no mean of "
                "what they do. Set it to 1, so that the reference is reset to the policy."
            )
        if (
            accelerator.distributed_type == DistributedType.DEEPSPEED
            and accelerator.mixed_precision == "bf16"
        ):
            raise UsageError(
                f"ref_model_mixup_alpha={self.alpha}: DeepSpeed keeps the reference in bf16, where a small share of a change rounds to nothing. "
                "Set it to 1, compute in fp32, or use FSDP 2 or DDP."
            )

    @torch.no_grad()
    def follow(self, iteration: int) -> None:
        """Move the reference, where it is time; all processes must call.

        Args:
            iteration: that has ended, counted from 1.
        """
        if self.every is None or iteration % self.every:
            return
        for source, target in zip(self._followed(), self._weights().values(), strict=True):
            with gathered([source, target], modifier_rank=0):
                own = source if isinstance(target, DTensor) else _whole(source)
                if self.alpha == 1:
                    target.copy_(own)
                else:
                    target.mul_(1 - self.alpha).add_(own, alpha=self.alpha)

    def save(self, folder: str | Path, should_save: bool) -> None:
        """Write a reference that has moved into a checkpoint; all processes must call.

        Args:
            folder: the checkpoint.
            should_save: whether this process writes.
        """
        if not self._has_moved:
            return
        whole: dict[str, Tensor] = {}
        for name, weight in self._weights().items():
            with gathered([weight]):
                tensor = _whole(weight)
                if should_save:
                    whole[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if should_save:
            save_file(whole, Path(folder, REFERENCE_FILE))

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take up the reference of a checkpoint; where it holds none, the reference is what the run began with.

        Raises:
            UsageError: it has moved away from the policy's base, and there is no adapter to take it up.
        """
        path = Path(folder, REFERENCE_FILE)
        if not path.is_file():
            return
        if self.reference is None and self.trained.reference_adapter is None:
            raise UsageError(
                f"{folder}: the reference has moved, and is an adapter of its own, which is made where ref_model_sync_steps is set alone. "
                "Set it to more iterations than max_steps: the reference then stays where it is."
            )
        self._has_moved = True
        saved = load_file(path)
        for name, weight in self._weights().items():
            with gathered([weight], modifier_rank=0):
                weight.copy_(split_like(saved[name], weight))

    def _followed(self) -> list[nn.Parameter]:
        policy = self.trained.policy
        if self.reference is None:
            return list(adapter_parameters(policy, "default").values())
        return list(policy.parameters())

    def _weights(self) -> dict[str, nn.Parameter]:
        if self.reference is None:
            assert self.trained.reference_adapter is not None
            return adapter_parameters(self.trained.policy, self.trained.reference_adapter)
        return dict(self.reference.named_parameters())


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
