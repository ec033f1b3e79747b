"""Passes of the models over a rollout: rows of like lengths together, without the padding behind them."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from tieback.pipeline.rollout.token_scores import trim
from tieback.ppo_core import Batch, RowLengths
from tieback.ppo_core.batch import like_length_groups

# Tokens, padding included, in a pass of the models where micro_batch_size is not set. A CPU is the faster for fewer, whose
# activations stay in its caches.
TOKENS_AT_A_TIME = 8192
TOKENS_AT_A_TIME_ON_CPU = 1024
# What a pass costs beside its tokens, in tokens: on a CPU about what a model of 7M parameters took, on a GPU a guess.
_PASS_COST, _PASS_COST_ON_CPU = 256, 100


def row_lengths(inputs: dict[str, Tensor], micro_batch_size: int | None, device: torch.device) -> RowLengths:
    """Tokens of each row, and how many a pass may take: any number where `micro_batch_size` bounds its rows."""
    on_cpu = device.type == "cpu"
    most = TOKENS_AT_A_TIME_ON_CPU if on_cpu else TOKENS_AT_A_TIME
    return RowLengths(
        positions=(inputs["prompt_lengths"] + inputs["completion_lengths"]).tolist(),
        trim=_trim_batch,
        max_positions=most if micro_batch_size is None else None,
        pass_cost=_PASS_COST_ON_CPU if on_cpu else _PASS_COST,
    )


def in_passes(
    score: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    micro_batch_size: int | None,
    accelerator: Accelerator,
) -> tuple[Tensor, ...]:
    """What `score` says of each row of `inputs`, in passes; as many on each process, as sharded models need.

    Args:
        score: takes some rows, trimmed and on the device; returns tensors [b, T'] or [b, T' + 1], where T' is the
            length of the longest completion among them.
        inputs: of B rows (see `pack_sequences`), on the CPU.
        micro_batch_size: most rows in a pass; None for as many as make up TOKENS_AT_A_TIME (or that for a CPU).
        accelerator: of the training.

    Returns:
        Each tensor as [B, T] or [B, T + 1], with 0 where a row's pass did not reach.
    """
    lengths = row_lengths(inputs, micro_batch_size, accelerator.device)
    rows, longest = inputs["completion_ids"].shape
    groups = like_length_groups(
        lengths.positions, micro_batch_size or rows, lengths.max_positions, lengths.pass_cost
    )
    own = torch.tensor(len(groups), device=accelerator.device)
    fillers = int(accelerator.reduce(own, "max")) - len(groups)
    results: tuple[Tensor, ...] = ()
    for group in [*groups, *[groups[-1][-1:]] * fillers]:
        part = trim({name: tensor[group] for name, tensor in inputs.items()})
        width = part["completion_ids"].shape[1]
        found = score({name: tensor.to(accelerator.device) for name, tensor in part.items()})
        if not results:
            results = tuple(x.new_zeros(rows, longest + x.shape[1] - width) for x in found)
        for result, tensor in zip(results, found, strict=True):
            result[group.to(result.device), : tensor.shape[1]] = tensor
    return results


def _trim_batch(batch: Batch) -> Batch:
    inputs = trim(batch.inputs)
    return batch.shortened(inputs["completion_ids"].shape[1], inputs)
