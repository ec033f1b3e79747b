"""Training a reward model on several pairs of one prompt: they share a batch, and a text that they share is read once.

Four ranked responses are six pairs, in which each response stands three times. InstructGPT puts all pairs of a prompt into
one batch likewise (Ouyang et al. 2022, section 3.5): a third of the computation, and less overfitting.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl import RewardTrainer

# A batch of more pairs is read in several passes, like lengths together, for less padding. Their number follows from that
# of the pairs alone, so that it is the same on all processes.
PAIRS_IN_A_PASS = 16
# Most rows that PromptSampler keeps together: all pairs of nine responses, the most that InstructGPT had ranked.
_TOGETHER = 36


class SharedTextsCollator:
    """TRL's batch with each text once.

    In the place of `input_ids` stand `passes`, a list of `input_ids` and `attention_mask` [b', L'], the longest texts first;
    `rows` [2b] says where in them the chosen and then the rejected text of each pair is.

    Args:
        pad: the collator of TRL's `RewardTrainer`.
    """

    def __init__(self, pad: Any) -> None:
        self._pad = pad

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad some pairs of token ids."""
        batch = self._pad(examples)
        texts = [tuple(example[f"{side}_ids"]) for side in ("chosen", "rejected") for example in examples]
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        different = sorted(first, key=len, reverse=True)
        place = {text: number for number, text in enumerate(different)}
        count = max(len(examples) // PAIRS_IN_A_PASS, 1)
        # No pass may be empty, however few of the texts differ.
        kept = torch.tensor([first[text] for text in (different * count)[: max(len(different), count)]])
        # First of all, since Trainer takes the length of what comes first for the size of the batch.
        shared: dict[str, Any] = {"rows": torch.tensor([place[text] for text in texts])}
        shared["passes"] = [
            {name: batch[name][part, : self._width(texts, part)] for name in ("input_ids", "attention_mask")}
            for part in kept.tensor_split(count)
        ]
        shared["attention_mask"] = batch.pop("attention_mask")[kept]  # TRL counts tokens by it
        del batch["input_ids"]
        return shared | batch

    def _width(self, texts: Sequence[tuple[int, ...]], rows: Tensor) -> int:
        multiple = self._pad.pad_to_multiple_of or 1
        return math.ceil(max(len(texts[row]) for row in rows.tolist()) / multiple) * multiple


class PromptSampler(Sampler[int]):
    """The rows of one prompt after those of another, the prompts in an order of each epoch's own.

    Of a prompt with more than 36 rows, as many stay together.

    Args:
        prompts: of each row.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Any], seed: int) -> None:
        rows: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows[json.dumps(prompt)].append(row)
        self._groups = [
            group[start : start + _TOGETHER]
            for group in rows.values()
            for start in range(0, len(group), _TOGETHER)
        ]
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch; Accelerate calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self._epoch)
        for group in torch.randperm(len(self._groups), generator=generator).tolist():
            yield from self._groups[group]


class SharedTextsTrainer(RewardTrainer):
    """TRL's `RewardTrainer` with both."""

    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = SharedTextsCollator(self.data_collator)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, of scores that stand once for each side of a pair."""
        rows, passes = inputs.pop("rows"), inputs.pop("passes")

        def for_each_side(use_cache: bool, **_: Any) -> Any:
            outputs = [model(**texts, use_cache=use_cache) for texts in passes]
            outputs[0].logits = torch.cat([output.logits for output in outputs])[rows]
            return outputs[0]

        return super().compute_loss(for_each_side, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PromptSampler(self.train_dataset["prompt"], seed)
