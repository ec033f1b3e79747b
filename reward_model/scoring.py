"""Scores for texts from a reward model, with the reward model's own tokenizer and chat template."""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tieback.data.conversations import TextOrMessages
from tieback.reward_model.encoding import encode
from tieback.reward_model.head import as_reward_model

logger = logging.getLogger(__name__)


class RewardScorer:
    """A reward model as a function of prompts and completions.

    Texts are encoded here, so a policy's tokenizer and vocabulary do not matter. Padding is on the right and its extent
    is known from lengths, never from comparing ids with the pad id.

    Args:
        model: a sequence-classification model with one label; mended (see `reward_model.head`), and put into eval mode.
        tokenizer: the reward model's own.
        batch_size: texts in a forward pass.
        max_length: tokens kept of a longer text, from its end (which holds the response); the model's context when None.
        name: under which its scores are logged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        max_length: int | None = None,
        name: str = "reward_model",
    ) -> None:
        self.name = name
        self.model = as_reward_model(model).eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or getattr(model.config, "max_position_embeddings", None)
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
        sequences = [self._shorten(ids) for ids in sequences]
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, score in zip(chosen, self._score_batch([sequences[i] for i in chosen]), strict=True):
                scores[index] = score
        return scores

    def _score_batch(self, sequences: list[list[int]]) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in sequences])
        attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        # Any id serves as padding, since the mask alone says what counts.
        input_ids = torch.zeros_like(attention_mask)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        input_ids, attention_mask = input_ids.to(self.model.device), attention_mask.to(self.model.device)
        return self.model(input_ids, attention_mask=attention_mask).logits.squeeze(-1).tolist()

    def _shorten(self, ids: list[int]) -> list[int]:
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        if not self._warned:
            logger.warning(
                "A text of %d tokens is longer than the reward model's %d; its beginning is cut off.",
                len(ids),
                self.max_length,
            )
            self._warned = True
        return ids[-self.max_length :]
