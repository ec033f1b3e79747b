"""A rollout as tensors: one row is one trajectory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

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

    def micro_batches(self, rows: Tensor, size: int, count: int) -> Iterator["Batch"]:
        """`rows` in `count` pieces of at most `size`.

        Pieces beyond the last of `rows` hold nothing that counts: a row that is wholly masked. They keep a rank in
        step with others that have more rows.
        """
        for start in range(0, count * size, size):
            piece = rows[start : start + size]
            if len(piece):
                yield self[piece]
            else:
                filler = self[:1]
                yield replace(filler, mask=torch.zeros_like(filler.mask))

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
