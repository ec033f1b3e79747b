"""TRL's `RewardTrainer`, with steps that can be divided into passes of pairs of like lengths."""

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import RewardTrainer


class PairTrainer(RewardTrainer):
    """A `RewardTrainer` whose `train_sampling_strategy` may be batch_rebalance: passes of pairs of like lengths.

    Trainer's own sampler would ask for `input_ids`, which pairs have none of, and make passes of unequal numbers of rows,
    whose means would count alike, and whose figures could not be gathered from several processes. Here the last
    step of an epoch alone may have a pass of fewer pairs, as with random order.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        args = self.args
        if args.train_sampling_strategy != "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        pairs = self.train_dataset if train_dataset is None else train_dataset
        sides = zip(pairs["chosen_ids"][:], pairs["rejected_ids"][:], strict=True)
        return LikeLengthSampler(
            [max(map(len, pair)) for pair in sides],
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
        )


class LikeLengthSampler(Sampler[int]):
    """Each step has the rows that chance gives it; within the step they are sorted, so that its passes have like lengths.

    Args:
        lengths: of each row, in tokens; of a pair that of its longer side.
        step_size: rows of a step, of all passes and processes.
        seed: another order in each epoch follows from it.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch; Accelerate calls it, after a resumption too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.step_size, 1, generator))
