"""Training a reward model on several pairs of one prompt: they share a batch, and a text that they share is read once.

Four ranked responses are six pairs, in which each response stands three times. InstructGPT puts all pairs of a prompt into
one batch likewise (Ouyang et al. 2022, section 3.5): a third of the passes, and the less overfitting.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference


class SharedTextsCollator(DataCollatorForPreference):
    """TRL's batch without the rows that stand in it twice; `rows` [2b] says which of the others each side has."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad, and keep each text once."""
        batch = super().torch_call(examples)
        texts = [tuple(example[f"{side}_ids"]) for side in ("chosen", "rejected") for example in examples]
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        first = [texts.index(text) for text in place]
        # First of all, since Trainer takes the length of what comes first for the size of the batch.
        return (
            {"rows": torch.tensor([place[text] for text in texts])}
            | batch
            | {name: batch[name][first] for name in ("input_ids", "attention_mask")}
        )


class PromptSampler(Sampler[int]):
    """The rows of one prompt after those of another, the prompts in an order of each epoch's own.

    Args:
        prompts: of each row.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Any], seed: int) -> None:
        rows: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows[json.dumps(prompt)].append(row)
        self._groups, self._seed, self._epoch = list(rows.values()), seed, 0

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
        own = self.data_collator
        self.data_collator = SharedTextsCollator(own.pad_token_id, own.pad_to_multiple_of)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, of scores that stand once for each side of a pair."""
        rows: Tensor = inputs.pop("rows")

        def for_each_side(**texts: Any) -> Any:
            outputs = model(**texts)
            outputs.logits = outputs.logits[rows]
            return outputs

        return super().compute_loss(for_each_side, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        return PromptSampler(self.train_dataset["prompt"], self.args.data_seed or self.args.seed)
