"""A rollout as tensors: one row is one trajectory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Trajectories, or some rows of them.

    B = environments or sequences, T = environment steps or response tokens.

    Args:
        inputs: whatever the actor-critic's `evaluate` needs, each `[B, ...]`.
        old_logprobs: `[B, T]`, log-probabilities of the actions under the policy of the rollout.
        old_values: `[B, T]`, values of the critic of the rollout (without the bootstrap column that `gae` takes).
        advantages: `[B, T]`.
        returns: `[B, T]`, targets of the critic: advantages + old values.
        mask: bool `[B, T]`, True where a step counts.
        ref_logprobs: `[B, T]`, log-probabilities of the actions under the reference policy; None where there is none.
        importance_weights: `[B, T]`, probability of the actions under the policy of the rollout, over that under what
            they were really drawn from, capped; the policy's terms are multiplied by it. None for 1 everywhere.
        imitation_weights: `[B, T]`, weight of −log π of actions that are to be imitated, 0 for all others; it counts under the
            mask and outside of it. None where there are none.

    Raises:
        ValueError: the shapes do not fit together.
    """

    inputs: dict[str, Tensor]
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    imitation_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ValueError(f"Batch: mask must be of dtype bool (True = counts), but is {self.mask.dtype}.")
        for name, column in self._columns().items():
            if column.shape != self.mask.shape:
                raise ValueError(
                    f"Batch: {name} has the shape {list(column.shape)}, but mask {list(self.mask.shape)}."
                )
        for name, value in self.inputs.items():
            if len(value) != len(self):
                raise ValueError(f"Batch: inputs[{name!r}] has {len(value)} rows, but mask {len(self)}.")

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Tensor | slice) -> "Batch":
        """Some of the rows, by a slice, an index tensor or a bool tensor `[B]`."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Batch":
        """The same on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def flatten_time(self) -> "Batch":
        """Each step as a row of its own, `[B·T, 1]`, for policies that see single steps.

        Every input must be `[B, T, ...]`, and becomes `[B·T, ...]`.
        """
        flat = self._map(lambda tensor: tensor.flatten(0, 1))
        columns = {name: column.unsqueeze(1) for name, column in flat._columns().items()}
        return Batch(inputs=flat.inputs, **columns)

    def shortened(self, steps: int, inputs: dict[str, Tensor]) -> "Batch":
        """The first `steps` steps of each row, with the inputs that fit them."""
        return Batch(inputs=inputs, **{name: column[:, :steps] for name, column in self._columns().items()})

    def micro_batches(self, groups: Sequence[Tensor], count: int) -> Iterator["Batch"]:
        """The rows of each of `groups`, then as many batches as make up `count` in which nothing counts.

        Such a batch is one row, wholly masked and not imitated. They keep a rank in step with others that have more rows.
        """
        yield from (self[rows] for rows in groups)
        filler = self[groups[-1][-1:] if groups else slice(1)]
        nothing: dict[str, Any] = {
            name: torch.zeros_like(column)
            for name, column in filler._columns().items()
            if name in ("mask", "imitation_weights")
        }
        for _ in range(count - len(groups)):
            yield replace(filler, **nothing)

    def _columns(self) -> dict[str, Tensor]:
        """The `[B, T]` tensors that are there, by name."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "inputs"}
        return {name: column for name, column in columns.items() if column is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        columns = {name: function(column) for name, column in self._columns().items()}
        return Batch(inputs={name: function(value) for name, value in self.inputs.items()}, **columns)


def minibatch_rows(
    permutation: Tensor, num_minibatches: int, shard_sizes: Sequence[int]
) -> list[list[Tensor]]:
    """Split a global batch, of which each rank holds a contiguous shard, into minibatches.

    A minibatch is a piece of the permuted global batch, so it holds the same rows whatever the number of ranks; a
    rank's share of it may be smaller than another's, or empty.

    Args:
        permutation: `[N]`, of the rows of the global batch.
        num_minibatches: number of minibatches; their sizes differ by one at most.
        shard_sizes: number of rows of each rank, N together.

    Returns:
        For each minibatch and each rank, the rows of the rank's shard.
    """
    offsets = [sum(shard_sizes[:rank]) for rank in range(len(shard_sizes))]
    return [
        [
            rows[(rows >= offset) & (rows < offset + size)] - offset
            for offset, size in zip(offsets, shard_sizes, strict=True)
        ]
        for rows in permutation.tensor_split(num_minibatches)
    ]


@dataclass(frozen=True)
class RowLengths:
    """How far the rows of a batch are filled, so that a pass of the policy computes little padding.

    Args:
        positions: of each of the B rows, that the policy has to compute: prompt and response tokens, say.
        trim: cuts some rows of the batch to what the longest of them fills. It is given inputs on the device where
            they lay in the batch.
        max_positions: most positions in one pass, padding included; a longer row has a pass of its own.
        pass_cost: what a pass costs beside its positions, in positions.
    """

    positions: Sequence[int]
    trim: Callable[[Batch], Batch]
    max_positions: int | None = None
    pass_cost: int = 0


def like_length_groups(
    positions: Sequence[int], max_rows: int, max_positions: int | None, pass_cost: int
) -> list[Tensor]:
    """Put rows into passes, like lengths together, such that the passes cost the least.

    A pass costs its rows times the longest of them, and a constant. The best split of rows that are sorted by length
    is found by dynamic programming.

    Args:
        positions: filled positions of each row.
        max_rows: most rows in a pass.
        max_positions: most positions in a pass of several rows, padding included; None for no such limit.
        pass_cost: the constant.

    Returns:
        For each pass the indices of its rows, the longest row first, and the pass of the longest row first: where
        memory is too small, it shows at once.
    """
    order = sorted(range(len(positions)), key=lambda row: -positions[row])
    cost = [0.0, *[float("inf")] * len(order)]
    first_of = [0] * len(cost)
    for first, row in enumerate(order):
        for end in range(first + 1, min(first + max_rows, len(order)) + 1):
            computed = positions[row] * (end - first)
            if max_positions is not None and computed > max_positions and end > first + 1:
                break
            if cost[first] + pass_cost + computed < cost[end]:
                cost[end], first_of[end] = cost[first] + pass_cost + computed, first
    groups: list[Tensor] = []
    end = len(order)
    while end:
        groups.append(torch.tensor(order[first_of[end] : end]))
        end = first_of[end]
    return groups[::-1]
