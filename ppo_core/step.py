"""One optimiser step of `update`: a minibatch in micro-batches, on any of Accelerate's backends."""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tieback.ppo_core.advantages import masked_sum
from tieback.ppo_core.batch import Batch
from tieback.ppo_core.objective import PPOHyperparameters, policy_loss, value_loss
from tieback.ppo_core.stats import FIGURES, Outcome, element_sums


class ActorCritic(Protocol):
    """All that `update` asks of a policy; usually it is an `nn.Module`, too."""

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the minibatch's actions, values and entropies, each `[b, T]`."""
        ...


@dataclass
class MinibatchStep:
    """How to take a step: the part of `update`'s arguments that stays the same from step to step."""

    policy: Any
    optimizer: Any
    hyper: PPOHyperparameters
    accelerator: Accelerator
    value_only: bool

    def __post_init__(self) -> None:
        wrapped = isinstance(self.policy, nn.Module)
        self.inner = self.accelerator.unwrap_model(self.policy) if wrapped else self.policy

    def __call__(self, micro_batches: Iterable[Batch], num_micro_batches: int, count: int) -> Outcome:
        """Accumulate the gradient of a minibatch and step.

        Args:
            micro_batches: this rank's share.
            num_micro_batches: their number, the same on all ranks.
            count: number of unmasked elements in the minibatch, of all ranks together.

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
        """
        accelerator = self.accelerator
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        sums = torch.zeros(len(FIGURES) + 3, device=accelerator.device)
        max_abs_log_ratio = torch.zeros((), device=accelerator.device)
        too_far = False
        self._clear_gradients()
        for index, micro_batch in enumerate(micro_batches):
            last = index == num_micro_batches - 1
            accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or deepspeed else accelerator.no_sync(self.policy):
                loss, part, log_ratio = self._loss(micro_batch.to(accelerator.device))
                sums += part
                max_abs_log_ratio = torch.maximum(max_abs_log_ratio, log_ratio)
                if last:
                    # All ranks decide alike, before the backward that synchronises and, with DeepSpeed, steps.
                    totals = accelerator.reduce(sums, "sum").tolist()
                    self._check_losses(totals[len(FIGURES) :], count)
                    too_far = self._too_far(totals[FIGURES.index("approx_kl")] / count)
                # Backends average gradients over the ranks, but the loss is a sum over them.
                loss = loss * (accelerator.num_processes / count)
                if deepspeed:
                    accelerator.backward(loss, scale_wrt_gas=False)
                else:
                    accelerator.backward(loss)
        grad_norm = None
        # The last backward ran in any case: DDP and FSDP are not left between a forward and its backward.
        if deepspeed or not too_far:
            grad_norm = self._clip()
            self.optimizer.step()
        self._clear_gradients()
        return Outcome(totals[: len(FIGURES)], count, max_abs_log_ratio, too_far, grad_norm)

    def _loss(self, micro_batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss summed over unmasked elements; sums of `FIGURES` and of non-finite losses; greatest |log ratio|."""
        hyper, mask = self.hyper, micro_batch.mask
        logprobs, values, entropies = self._evaluate(micro_batch)
        policy_losses = policy_loss(
            logprobs,
            micro_batch.old_logprobs,
            micro_batch.advantages,
            hyper.clip_range,
            hyper.clip_range_high,
            hyper.dual_clip,
        )
        value_losses = value_loss(values, micro_batch.old_values, micro_batch.returns, hyper.value_clip_range)
        loss = hyper.vf_coef * masked_sum(value_losses, mask)
        if not self.value_only:
            loss = loss + masked_sum(policy_losses, mask)
            if hyper.ent_coef > 0:  # else 0 · NaN where an unused entropy is not finite
                loss = loss - hyper.ent_coef * masked_sum(entropies, mask)
        elif isinstance(self.policy, DistributedDataParallel):
            loss = loss + 0.0 * masked_sum(logprobs, mask)  # DDP waits for a gradient of every parameter

        with torch.no_grad():
            figures = element_sums(
                micro_batch, logprobs, values, entropies, policy_losses, value_losses, hyper
            )
            bad = [
                masked_sum((~torch.isfinite(x)).float(), mask)
                for x in (policy_losses, value_losses, entropies)
            ]
            log_ratio = torch.where(mask, logprobs - micro_batch.old_logprobs, 0.0).abs().flatten()
            # The added 0 is for a rank without a single row.
            greatest = torch.cat([log_ratio, log_ratio.new_zeros(1)]).max()
        return loss, torch.cat([figures, torch.stack(bad)]), greatest

    def _evaluate(self, micro_batch: Batch) -> tuple[Tensor, ...]:
        """Call the policy's `evaluate`; through its wrapper's `forward` where it has one."""
        with self.accelerator.autocast():
            if self.inner is self.policy and not self.accelerator.is_fsdp2:
                outputs = self.policy.evaluate(micro_batch)
            else:
                outputs = _through_forward(self.policy, self.inner, micro_batch)
        for name, output in zip(("log-probabilities", "values", "entropies"), outputs, strict=True):
            if output.shape != micro_batch.mask.shape:
                raise ValueError(
                    f"The policy's evaluate returned {name} of shape {list(output.shape)} for a minibatch of shape "
                    f"{list(micro_batch.mask.shape)}: it must return one a step."
                )
        return tuple(output.float() for output in outputs)

    def _too_far(self, approx_kl: float) -> bool:
        target = self.hyper.target_kl
        return target is not None and not self.value_only and approx_kl > 1.5 * target

    def _check_losses(self, bad_counts: list[float], count: int) -> None:
        names = ["policy loss", "value loss"]
        if self.hyper.ent_coef > 0:
            names.append("entropy")
        faults = [
            f"{name} ({int(bad)} of {count} elements)"
            for name, bad in zip(names, bad_counts, strict=False)
            if bad > 0
        ]
        if faults:
            raise FloatingPointError(
                f"Not finite in this minibatch: {', '.join(faults)}. Look at the policy's outputs: a learning rate "
                "too high and an overflow in low precision are the usual causes."
            )

    def _clip(self) -> float:
        """Clip the gradient and return its norm from before; DeepSpeed's engine has clipped it by itself."""
        if isinstance(self.policy, nn.Module):
            parameters = list(self.policy.parameters())
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.value_only and isinstance(self.policy, DistributedDataParallel):
            for parameter in parameters:
                # Weight decay and momentum would move what the value loss does not reach.
                if parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None
        norm = self.accelerator.clip_grad_norm_(parameters, self.hyper.max_grad_norm or math.inf)
        if norm is None:
            return math.nan  # DeepSpeed without ZeRO does not tell it
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"The gradient's norm is {grad_norm}, though every loss of this minibatch is finite: look for an "
                "infinite slope or an overflow in the policy's backward pass."
            )
        return grad_norm

    def _clear_gradients(self) -> None:
        # Without it, a prepared optimiser ignores the call.
        self.accelerator.gradient_state._set_sync_gradients(True)
        self.optimizer.zero_grad(set_to_none=True)


def _through_forward(wrapper: nn.Module, inner: Any, micro_batch: Batch) -> Any:
    """Call `inner.evaluate` inside `wrapper.forward`, whose hooks gather parameters and synchronise gradients.

    For one call `inner.forward` stands for `inner.evaluate`; inside it, `inner.forward` is itself again.
    """
    own_forward = inner.__dict__.get("forward")  # Accelerate's mixed precision sets one on the instance

    def restore() -> None:
        if own_forward is not None:
            inner.forward = own_forward
        else:
            inner.__dict__.pop("forward", None)

    def evaluate(minibatch: Batch) -> Any:
        restore()
        return inner.evaluate(minibatch)

    inner.forward = evaluate
    try:
        return wrapper(micro_batch)
    finally:
        restore()
