"""The only optimiser loop: epochs × minibatches × micro-batches over one rollout."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn

from tieback.ppo_core.advantages import explained_variance, masked_sum, whiten
from tieback.ppo_core.batch import Batch, RowLengths, like_length_groups, minibatch_rows
from tieback.ppo_core.hyperparameters import PPOHyperparameters
from tieback.ppo_core.stats import Outcome, PPOStats, summarize
from tieback.ppo_core.step import ActorCritic, MinibatchStep


def update(
    policy: ActorCritic | nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    hyper: PPOHyperparameters,
    accelerator: Accelerator,
    micro_batch_size: int,
    *,
    generator: torch.Generator | None = None,
    value_only: bool = False,
    lengths: RowLengths | None = None,
) -> PPOStats:
    """Improve an actor-critic on one rollout with PPO (Schulman et al. 2017, algorithm 1).

    Each minibatch takes one optimiser step on the sum of `ppo_terms`,

        mean(policy_loss) + vf_coef · mean(value_loss) − ent_coef · mean(entropy)

    where a mean is a sum over unmasked elements divided by their number in the whole minibatch, over all
    micro-batches and ranks. The global batch is what the ranks hold, one after the other; each epoch permutes its
    rows and splits them into `num_minibatches`. So losses, gradients and figures are the same for any micro-batch
    size, padding or number of processes. Advantages are whitened once, over the whole global batch.

    With `target_kl`, the update ends before the step at which the minibatch's approximate KL (k3) to the rollout's
    policy exceeds 1.5 · target_kl, as in Stable-Baselines3; under DeepSpeed, whose engine steps inside its
    backward, right after that step.

    Gradients are None afterwards. Stepping a learning-rate schedule, and switching dropout off, are the caller's.

    Args:
        policy: the actor-critic, as `accelerator.prepare` gave it (plain, DDP, FSDP or a DeepSpeed engine). Its
            `evaluate(minibatch)` (see `ActorCritic`) is called on `accelerator.device` under autocast; where the
            policy is an `nn.Module`, from inside a call of the module, which is what wrappers and hooks wait for.
        optimizer: over the policy's parameters, prepared or not; each parameter group keeps its learning rate.
        batch: this rank's rows of the rollout, possibly none.
        hyper: settings of the objective; gamma and gae_lambda are not read here.
        accelerator: with `gradient_accumulation_steps` 1 and without fp16.
        micro_batch_size: most rows in one forward pass of one rank.
        generator: CPU generator that permutes the rows (that of rank 0 decides); PyTorch's own when None.
        value_only: train the critic alone, on the terms that fit it, as in a warm-up; `target_kl` is not
            looked at. Parameters that the value loss does not reach stay as they are, except under DeepSpeed, which
            gives them zero gradients: set the learning rate of their group to 0 there.
        lengths: of the rows of `batch`, where many end before T: rows of like lengths then share a pass, without the
            padding behind the longest of them. It changes speed and memory, not results.

    Returns:
        What the update did, the same on all ranks.

    Raises:
        ValueError: the settings do not fit together, or `evaluate` returned a wrong shape.
        FloatingPointError: a loss, an input of it or a gradient is not finite; raised on all ranks alike.
    """
    _check_setup(policy, hyper, accelerator, micro_batch_size, value_only)
    # All but the inputs, which may be large, go to the device at once.
    batch = replace(replace(batch, inputs={}).to(accelerator.device), inputs=batch.inputs)
    shard_sizes = accelerator.gather(torch.tensor([len(batch)], device=accelerator.device)).tolist()
    _check_batch(batch, sum(shard_sizes), hyper, accelerator)
    critic_quality = explained_variance(batch.old_values, batch.returns, batch.mask, accelerator).item()
    if hyper.whiten_advantages:
        batch = replace(batch, advantages=whiten(batch.advantages, batch.mask, accelerator=accelerator))

    step = MinibatchStep(policy, optimizer, hyper, accelerator, value_only)
    epochs: list[list[Outcome]] = []
    for _ in range(hyper.num_ppo_epochs):
        epochs.append(_epoch(step, batch, shard_sizes, micro_batch_size, generator, lengths))
        if epochs[-1][-1].too_far:
            break
    max_abs_log_ratio_first = accelerator.reduce(epochs[0][0].max_abs_log_ratio, "max").item()
    return summarize(epochs, critic_quality, max_abs_log_ratio_first)


def _epoch(
    step: MinibatchStep,
    batch: Batch,
    shard_sizes: list[int],
    micro_batch_size: int,
    generator: torch.Generator | None,
    lengths: RowLengths | None,
) -> list[Outcome]:
    """Go once through the global batch, or until the policy is too far from the rollout's."""
    accelerator = step.accelerator
    permutation = torch.randperm(sum(shard_sizes), generator=generator).to(accelerator.device)
    minibatches = minibatch_rows(broadcast(permutation).cpu(), step.hyper.num_minibatches, shard_sizes)
    own_rows = [rows_by_rank[accelerator.process_index] for rows_by_rank in minibatches]
    groups = [_groups(rows, micro_batch_size, lengths) for rows in own_rows]
    counts = accelerator.reduce(torch.stack([batch.mask[rows].sum() for rows in own_rows]), "sum")
    # A rank with fewer passes than another still takes part in as many, forward and backward.
    own_passes = torch.tensor([len(passes) for passes in groups], device=accelerator.device)
    num_passes = accelerator.reduce(own_passes, "max")
    outcomes: list[Outcome] = []
    for passes, num_micro_batches, count in zip(groups, num_passes.tolist(), counts.tolist(), strict=True):
        if count == 0:
            continue
        micro_batches = batch.micro_batches(passes, num_micro_batches)
        trimmed = micro_batches if lengths is None else map(lengths.trim, micro_batches)
        outcomes.append(step(trimmed, num_micro_batches, count))
        if outcomes[-1].too_far:
            break
    return outcomes


def _groups(rows: Tensor, micro_batch_size: int, lengths: RowLengths | None) -> list[Tensor]:
    """Rows of a minibatch that share a pass."""
    if lengths is None:
        return [part for part in rows.split(micro_batch_size) if len(part)]
    positions = [lengths.positions[row] for row in rows.tolist()]
    groups = like_length_groups(positions, micro_batch_size, lengths.max_positions, lengths.pass_cost)
    return [rows[part] for part in groups]


def _check_setup(
    policy: Any, hyper: PPOHyperparameters, accelerator: Accelerator, micro_batch_size: int, value_only: bool
) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, but is {micro_batch_size}.")
    if value_only and hyper.vf_coef == 0:
        raise ValueError("value_only trains the critic alone, but vf_coef is 0: nothing would be learned.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1, but is {accelerator.gradient_accumulation_steps}: update "
            "accumulates over micro-batches itself. Set micro_batch_size instead."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "fp16 is not supported: its loss scaling skips steps, so that epochs and minibatches would no longer "
            "be what was asked for. Use bf16 or fp32."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        clipping = policy.gradient_clipping()
        if clipping != hyper.max_grad_norm:
            raise ValueError(
                f"max_grad_norm is {hyper.max_grad_norm}, but DeepSpeed was set up with gradient_clipping "
                f"{clipping}: set the latter to the same number (or to auto, where a Trainer fills it in)."
            )


def _check_batch(batch: Batch, num_rows: int, hyper: PPOHyperparameters, accelerator: Accelerator) -> None:
    """Check the global batch of `num_rows` rows, with the same verdict on all ranks."""
    if num_rows < hyper.num_minibatches:
        raise ValueError(
            f"{num_rows} rows (of all processes together) cannot be split into num_minibatches = "
            f"{hyper.num_minibatches}."
        )
    names = ("old_logprobs", "old_values", "advantages", "returns")
    bad = [masked_sum((~torch.isfinite(getattr(batch, name))).float(), batch.mask) for name in names]
    count, *bad_counts = accelerator.reduce(torch.stack([batch.mask.sum().float(), *bad]), "sum").tolist()
    if count == 0:
        raise ValueError("Nothing to learn from: every element of the batch is masked, on all processes.")
    faults = [
        f"{name} ({int(bad)} of {int(count)} elements)"
        for name, bad in zip(names, bad_counts, strict=True)
        if bad > 0
    ]
    if faults:
        raise FloatingPointError(f"Not finite in the batch given to update: {', '.join(faults)}.")
