"""One optimiser step of `update`: a minibatch in micro-batches, on any of Accelerate's backends."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tieback.ppo_core.advantages import masked_sum
from tieback.ppo_core.batch import Batch
from tieback.ppo_core.calling import call_as
from tieback.ppo_core.hyperparameters import PPOHyperparameters
from tieback.ppo_core.objective import PolicyOutputs, policy_outputs, ppo_terms
from tieback.ppo_core.stats import Outcome, diagnostics

# Named groups of scalars: sums of the loss's terms, sums of the diagnostics, numbers of non-finite elements of terms.
Sums = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


class ActorCritic(Protocol):
    """All that `update` asks of a policy; usually it is an `nn.Module`, too."""

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the minibatch's actions, values and entropies, each `[b, T]`, in float32.

        With `value_bins` K, logits over the bins `[b, T, K]` in place of the values.
        """
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
        is_module = isinstance(self.policy, nn.Module)
        self.inner = self.accelerator.unwrap_model(self.policy) if is_module else self.policy
        self.distributed = isinstance(self.policy, DistributedDataParallel)
        # Either the policy or the critic has no part in the loss.
        self.one_sided = self.value_only or self.hyper.vf_coef == 0

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
        # DeepSpeed's engine sees to it itself. FSDP would keep whole gradients of all parameters, in low precision.
        sync_each = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        parts: list[Sums] = []
        max_abs_log_ratio = torch.zeros((), device=accelerator.device)
        too_far = False
        self._clear_gradients()
        for index, micro_batch in enumerate(micro_batches):
            last = index == num_micro_batches - 1
            accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or sync_each else accelerator.no_sync(self.policy):
                loss, sums, log_ratio = self._loss(micro_batch.to(accelerator.device))
                parts.append(sums)
                max_abs_log_ratio = torch.maximum(max_abs_log_ratio, log_ratio)
                if last:
                    # All ranks decide alike, before the backward that synchronises and, with DeepSpeed, steps.
                    terms, figures, non_finite = self._totals(parts)
                    _check_finite(non_finite, count)
                    too_far = self._too_far(figures["approx_kl"] / count)
                # Backends average gradients over the ranks, but the loss is a sum over them.
                loss = loss * (accelerator.num_processes / count)
                if deepspeed:
                    with self._engine_steps(everything=too_far):
                        accelerator.backward(loss, scale_wrt_gas=False)
                else:
                    accelerator.backward(loss)
        grad_norm = None
        # The last backward ran in any case: no backend is left between a forward and its backward.
        if not too_far:
            grad_norm = self._clip()
            self.optimizer.step()
        self._clear_gradients()
        return Outcome(terms, figures, count, max_abs_log_ratio, too_far, grad_norm)

    def _loss(self, micro_batch: Batch) -> tuple[Tensor, Sums, Tensor]:
        """Loss summed over unmasked elements, what is summed besides, and the greatest |log ratio|."""
        mask = micro_batch.mask
        outputs = self._evaluate(micro_batch)
        terms = ppo_terms(micro_batch, outputs, self.hyper)
        masks = {name: mask if term.mask is None else term.mask for name, term in terms.items()}
        sums = {name: masked_sum(term.elements, masks[name]) for name, term in terms.items()}
        # A coefficient of 0 leaves the term out: 0 · NaN would be NaN where it is not finite.
        used = {name: term for name, term in terms.items() if term.coefficient != 0}
        weighted = [
            term.coefficient * sums[name]
            for name, term in used.items()
            if term.trains_critic or not self.value_only
        ]
        loss = reduce(torch.add, weighted)
        if self.distributed and self.one_sided:
            # DDP waits for a gradient of every parameter.
            unused = outputs.logprobs if self.value_only else outputs.values
            loss = loss + 0.0 * masked_sum(unused, mask)

        with torch.no_grad():
            figures = diagnostics(micro_batch, outputs, terms, self.hyper)
            figure_sums = {name: masked_sum(figure, mask) for name, figure in figures.items()}
            non_finite = {
                name: masked_sum((~torch.isfinite(term.elements)).float(), masks[name])
                for name, term in used.items()
            }
            log_ratio = torch.where(mask, outputs.logprobs - micro_batch.old_logprobs, 0.0).abs().flatten()
            # The added 0 is for a rank without a single row.
            greatest = torch.cat([log_ratio, log_ratio.new_zeros(1)]).max()
        detached = {name: total.detach() for name, total in sums.items()}
        return loss, (detached, figure_sums, non_finite), greatest

    def _totals(self, parts: Sequence[Sums]) -> list[dict[str, float]]:
        """Each group of the parts' sums, added up over micro-batches and, in one collective, over ranks."""
        stacked = [torch.stack([x for group in part for x in group.values()]) for part in parts]
        totals = iter(self.accelerator.reduce(reduce(torch.add, stacked), "sum").tolist())
        return [{name: next(totals) for name in group} for group in parts[0]]

    def _evaluate(self, micro_batch: Batch) -> PolicyOutputs:
        """What the policy's `evaluate` says of a micro-batch.

        Raises:
            ValueError: an output is of a wrong shape, or was rounded to low precision.
        """
        with self.accelerator.autocast():
            if isinstance(self.policy, nn.Module):
                outputs = call_as(self.inner, self.inner.evaluate, micro_batch, through=self.policy)
            else:
                outputs = self.policy.evaluate(micro_batch)
        bins = self.hyper.value_bins
        for name, output in zip(("log-probabilities", "values", "entropies"), outputs, strict=True):
            by_bin = (bins,) if bins is not None and name == "values" else ()
            if output.shape != (*micro_batch.mask.shape, *by_bin):
                wanted = (
                    f"logits over the {bins} bins of value_bins for each step" if by_bin else "one a step"
                )
                raise ValueError(
                    f"The policy's evaluate returned {name} of shape {list(output.shape)} for a minibatch of shape "
                    f"{list(micro_batch.mask.shape)}: it must return {wanted}."
                )
            if output.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"The policy's evaluate returned {name} in {output.dtype}, whose steps are wider than those that PPO "
                    "takes: compute them in float32. (FSDP rounds what a module returns to its output_dtype.)"
                )
        logprobs, values, entropies = (output.float() for output in outputs)
        return policy_outputs(logprobs, values, entropies, self.hyper)

    def _too_far(self, approx_kl: float) -> bool:
        target = self.hyper.target_kl
        return target is not None and not self.value_only and approx_kl > 1.5 * target

    @contextlib.contextmanager
    def _engine_steps(self, everything: bool) -> Iterator[None]:
        """Let a step that DeepSpeed's engine takes here leave alone what the loss does not reach, or everything.

        The engine steps inside `backward`, and gives the optimiser gradients of 0, on which weight decay and momentum
        would move the weights. An optimiser passes over what has no gradient at all.
        """

        def leave_alone(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is None:
                    continue
                reached = parameter.grad.any().float()  # of this rank's part alone
                if everything or not self.accelerator.reduce(reached, "sum"):
                    parameter.grad = None

        if not (everything or self.one_sided):
            yield
            return
        hook = self.policy.basic_optimizer.register_step_pre_hook(leave_alone)
        try:
            yield
        finally:
            hook.remove()

    def _clip(self) -> float:
        """Clip the gradient and return its norm from before; DeepSpeed's engine has clipped it by itself."""
        if isinstance(self.policy, nn.Module):
            parameters = list(self.policy.parameters())
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.distributed and self.one_sided:
            for parameter in parameters:
                # Weight decay and momentum would move what the loss does not reach.
                if parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None
        norm = self.accelerator.clip_grad_norm_(parameters, self.hyper.max_grad_norm or math.inf)
        if norm is None:
            return math.nan  # DeepSpeed without ZeRO does not tell it
        # A DTensor, told by its method: to import the class takes half a second, which no game has a use for.
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
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


def _check_finite(non_finite: Mapping[str, float], count: int) -> None:
    faults = [
        f"{name.replace('/', ' ')} ({int(bad)} of {count} elements)"
        for name, bad in non_finite.items()
        if bad > 0
    ]
    if faults:
        raise FloatingPointError(
            f"Not finite in this minibatch: {', '.join(faults)}. Look at the policy's outputs: a learning rate "
            "too high and an overflow in low precision are the usual causes."
        )
