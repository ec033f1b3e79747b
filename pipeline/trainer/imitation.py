"""What the policy imitates beside PPO: texts of a data set (PPO-ptx), and completions of its own that scored well.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback" (InstructGPT), eq. 2; Yue et al. 2025,
"VAPO" (positive-example language-model loss).
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.data.files import Record
from tieback.data.formats import convert
from tieback.pipeline.rollout.texts import encode_prompts
from tieback.pipeline.rollout.token_scores import pack_sequences
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.rewards import ScoredRollout
from tieback.ppo_core import Batch


class Text(NamedTuple):
    """A text to imitate: `completion_ids`, behind `prompt_ids`, which is context alone; neither is empty."""

    prompt_ids: list[int]
    completion_ids: list[int]


class PTXTexts:
    """The texts of `ptx_dataset`, tokenized.

    Args:
        dataset: demonstrations, as SFT takes them; None for none.
        tokenizer: the policy's.
        args: settings.

    Raises:
        UsageError: there are texts and no coefficient, or a coefficient and no texts; none can be used; or a row is
            malformed.
    """

    def __init__(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> None:
        if (dataset is not None) != (args.ptx_coef > 0):
            raise UsageError(
                f"ptx_coef is {args.ptx_coef}, the weight of the texts of ptx_dataset, "
                f"which {'has no effect then' if args.ptx_coef == 0 else 'is missing'}: give both, or neither."
            )
        self.args = args
        self.texts: list[Text] = []
        if dataset is None:
            return
        records = (Record(f"ptx_dataset, row {place}", row) for place, row in enumerate(dataset))
        rows, _ = convert(records, "demonstrations", "ptx_dataset")
        encoded = (encode_text(row, tokenizer, args) for row in rows)
        self.texts = [text for text in encoded if text is not None]
        if not self.texts:
            raise UsageError(
                f"ptx_dataset: no text has anything to imitate in its first ptx_max_length={args.ptx_max_length} tokens."
            )

    def draw(self, iteration: int, accelerator: Accelerator) -> list[Text]:
        """This process's texts of an iteration, with replacement: those of all processes together depend on `seed` alone."""
        own = self.args.ptx_batch_size or self.args.per_device_train_batch_size
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_037 + iteration)
        drawn = torch.randint(len(self.texts), (own * accelerator.num_processes,), generator=generator)
        first = own * accelerator.process_index
        return [self.texts[place] for place in drawn[first : first + own].tolist()]


def encode_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Text | None:
    """A demonstration as tokens; None where nothing of it is left to imitate.

    Of a conversation the last message is imitated, of `text` all but the first token. Plain texts end with EOS.

    Args:
        row: `prompt` and `completion`, or `messages`, or `text`.
        tokenizer: the policy's.
        args: settings.

    Raises:
        UsageError: the chat template writes a conversation in another way once it has been answered.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "text" in row:
        ids = list(tokenizer(row["text"])["input_ids"])
        ids += eos if ids[-1:] != eos else []
        before, whole = ids[:1], ids
    else:
        messages = row.get("messages")
        prompt, completion = (
            (messages[:-1], messages[-1:]) if messages else (row["prompt"], row["completion"])
        )
        (before,) = encode_prompts([prompt], tokenizer, args.template_arguments)
        if isinstance(prompt, str):
            whole = list(tokenizer(prompt + completion)["input_ids"])
            if whole[: len(before)] != before:
                # The prompt's last token would join with the completion's first; sampling never sees that.
                whole = before + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
            whole += eos if whole[-1:] != eos else []
        else:
            whole = tokenizer.apply_chat_template(
                prompt + completion, tokenize=True, return_dict=True, **args.template_arguments
            )["input_ids"]
            if whole[: len(before)] != before:
                raise UsageError(
                    "ptx_dataset: the chat template writes a prompt in another way once it has been answered, so that the answer "
                    "does not stand behind what is sampled from. Set chat_template_kwargs such that both agree, or give plain texts."
                )
    whole = whole[: args.ptx_max_length]
    return Text(before, whole[len(before) :]) if 0 < len(before) < len(whole) else None


def with_imitation(
    batch: Batch,
    scored: ScoredRollout,
    texts: Sequence[Text],
    pad_id: int,
    accelerator: Accelerator,
    args: PPOConfig,
) -> Batch:
    """The batch with what is to be imitated: the texts as further rows, and weights of them and of good completions.

    The loss is a sum over elements, divided by the number of unmasked ones; so weights are each coefficient times that
    number over the number of imitated tokens, both of all processes. All processes must call.

    Args:
        batch: of the completions.
        scored: the completions.
        texts: to imitate; none where ptx_coef is 0.
        pad_id: any id.
        accelerator: of the training.
        args: settings.
    """
    positive = torch.zeros_like(batch.mask)
    if args.positive_score is not None:
        positive = batch.mask & (scored.raw_scores >= args.positive_score).unsqueeze(1)
    own_counts = [int(batch.mask.sum()), int(positive.sum()), sum(len(text.completion_ids) for text in texts)]
    counts = accelerator.reduce(torch.tensor(own_counts, device=accelerator.device), "sum").tolist()
    unmasked, positives, of_texts = (max(count, 1) for count in counts)
    weights = positive * (args.positive_nll_coef * unmasked / positives)
    batch = replace(batch, imitation_weights=weights)
    if not texts:
        return batch
    inputs = pack_sequences(
        [text.prompt_ids for text in texts],
        [text.completion_ids for text in texts],
        pad_id,
        torch.device("cpu"),
    )
    imitated = inputs.pop("mask").to(batch.mask.device)
    nothing = torch.zeros_like(imitated, dtype=batch.old_logprobs.dtype)
    columns: dict[str, Any] = {f.name: nothing for f in fields(Batch) if getattr(batch, f.name) is not None}
    columns |= {
        "inputs": inputs,
        "mask": torch.zeros_like(imitated),
        "imitation_weights": imitated * (args.ptx_coef * unmasked / of_texts),
    }
    # Spread evenly among the completions, so that the rows of all processes stand in one order, however many processes hold them.
    places = [(torch.arange(count) + 0.5) / count for count in (len(batch), len(texts))]
    return _stacked(batch, Batch(**columns))[torch.cat(places).argsort(stable=True)]


def _stacked(above: Batch, below: Batch) -> Batch:
    """The rows of both, those of the narrower one padded."""

    def joined(first: Tensor, second: Tensor) -> Tensor:
        if first.dim() == 1:
            return torch.cat([first, second])
        width = max(first.shape[1], second.shape[1])
        return torch.cat([pad(part, (0, width - part.shape[1])) for part in (first, second)])

    columns = {f.name: getattr(above, f.name) for f in fields(Batch) if f.name != "inputs"}
    return Batch(
        inputs={name: joined(value, below.inputs[name]) for name, value in above.inputs.items()},
        **{name: joined(value, getattr(below, name)) for name, value in columns.items() if value is not None},
    )
