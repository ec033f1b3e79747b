"""Scores for texts from a reward model, with the reward model's own tokenizer and chat template."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.data.conversations import TextOrMessages
from tieback.reward_model.adapter import ScalarAdapter
from tieback.reward_model.encoding import cut, encode, longest_text
from tieback.reward_model.head import apply_head, as_reward_model

logger = logging.getLogger(__name__)


class RewardScorer:
    """A reward model as a function of prompts and completions.

    Texts are encoded here, so a policy's tokenizer and vocabulary do not matter. Padding is on the right and its extent
    is known from lengths, never from comparing ids with the pad id.

    Args:
        model: a sequence-classification model with one label, with an adapter perhaps; mended (see `reward_model.head`),
            put into eval mode, and frozen. Or the adapter alone, whose base is somewhere else: `PPOTrainer` puts it there.
        tokenizer: the reward model's own.
        batch_size: texts in a forward pass.
        max_length: tokens kept of a longer text (see `reward_model.encoding.cut`); what the model can read when None.
        name: under which its scores are logged.

    Raises:
        UsageError: the model has several labels, or an adapter of virtual tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | ScalarAdapter,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        max_length: int | None = None,
        name: str = "reward_model",
    ) -> None:
        self.name = name
        self.model: Any = model
        if not isinstance(model, ScalarAdapter):
            self.model = as_reward_model(_classifier(model)).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        # Under which the model computes; its head stays in fp32.
        self.autocast: Callable[[], AbstractContextManager] = nullcontext
        self._warned = False

    def score(self, prompts: Sequence[TextOrMessages], completions: Sequence[TextOrMessages]) -> list[float]:
        """Score each completion of its prompt; fp32, in the order given.

        Args:
            prompts: N plain texts or N conversations.
            completions: N plain texts, or N lists of messages that continue the conversation.

        Raises:
            ValueError: the counts differ.
            UsageError: the texts are conversations and the tokenizer has no chat template.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions to score.")
        return self.score_ids(
            [
                encode(self.tokenizer, prompt, completion)
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[list[int]]) -> list[float]:
        """Score sequences of token ids; the order is restored after batching by length."""
        limit = self.max_length or longest_text(self.model, self.tokenizer)
        sequences = [self._shorten(ids, limit) for ids in sequences]
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, score in zip(chosen, self._score_batch([sequences[i] for i in chosen]), strict=True):
                scores[index] = score
        return scores

    @property
    def reads_prefixes(self) -> bool:
        """Whether it is a causal model of its own, so that its head at a token scores the text up to there."""
        return isinstance(self.model, PreTrainedModel) and hasattr(self.model, "score")

    @torch.no_grad()
    def score_prefixes(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]
    ) -> list[list[float] | None]:
        """Score of each prompt with the first token of its completion, the first two, and so on.

        Args:
            prompt_ids: of N prompts, in this model's own tokens.
            completion_ids: of their completions.

        Returns:
            A number for each token of a completion; None where the text is longer than the model reads.
        """
        limit = self.max_length or longest_text(self.model, self.tokenizer)
        whole = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        order = sorted(range(len(whole)), key=lambda row: len(whole[row]))
        scores: list[list[float] | None] = [None] * len(whole)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            # What is too long goes through the model, too: a sharded one needs as many passes on each process.
            input_ids, attention_mask = self._padded([whole[row][:limit] for row in chosen])
            with self.autocast():
                hidden = self.model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
                values = apply_head(self.model, hidden).tolist()
            for row, of_tokens in zip(chosen, values, strict=True):
                if limit is None or len(whole[row]) <= limit:
                    scores[row] = of_tokens[len(prompt_ids[row]) : len(whole[row])]
        return scores

    def _score_batch(self, sequences: list[list[int]]) -> list[float]:
        input_ids, attention_mask = self._padded(sequences)
        with self.autocast():
            return self.model(input_ids, attention_mask=attention_mask).logits.squeeze(-1).tolist()

    def _padded(self, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask`, padded on the right, on the model's device."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        # Any id serves as padding, since the mask alone says what counts.
        input_ids = torch.zeros_like(attention_mask)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        return input_ids.to(self.model.device), attention_mask.to(self.model.device)

    def _shorten(self, ids: list[int], limit: int | None) -> list[int]:
        if limit is not None and len(ids) > limit and not self._warned:
            logger.warning(
                "A text of %d tokens is longer than the %d that the reward model %s reads; its beginning is cut off.",
                len(ids),
                limit,
                self.name,
            )
            self._warned = True
        return cut(ids, limit, self.tokenizer)


def _classifier(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise UsageError(
                f"The reward model has an adapter of virtual tokens ({model.active_peft_config.peft_type.value}), which "
                "scoring does not put before its texts. Use one of another kind, such as LoRA, or a whole model."
            )
        # The adapter stands in the layers of the model itself; the wrapper hides its backbone and head.
        model = model.get_base_model()
    if model.config.num_labels != 1:
        raise UsageError(
            f"A reward model is a sequence-classification model with one label, its score; {type(model).__name__} has "
            f"{model.config.num_labels}."
        )
    return model
