"""Generation that goes on without the rows that have ended.

`generate` computes every row until the longest one ends. Where completions have unlike lengths most of that is for rows
which have ended long ago, so it is called several times, each time with the rows that are left and their key-value cache.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# A call ends when this share of its rows have, and at least so many.
_ENDED_SHARE, _LEAST_ENDED = 0.25, 8
# Layers of a cache whose rows can be chosen from; of the other kinds some have further states, and some a fixed shape.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class _EnoughEnded(StoppingCriteria):
    """Ends a call of `generate` once so many rows have ended.

    Args:
        end_ids: ids that end a row.
        count: of rows.
    """

    def __init__(self, end_ids: Tensor, count: int) -> None:
        self.end_ids = end_ids
        self.count = count
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Say of each of b rows [b] whether to stop: all of them or none. Waits for no device."""
        last = torch.isin(input_ids[:, -1], self.end_ids)
        self.ended = last if self.ended is None else self.ended | last
        return (self.ended.sum() >= self.count).expand(len(last))


def generate_completions(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    length: int,
    end_ids: list[int],
    with_logprobs: bool,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample a completion for each of b rows.

    Args:
        model: with a `generate`; the whole model is here, so that processes need not wait for one another.
        ids: [b, P], padded on the left.
        mask: [b, P], 1 where `ids` are no padding.
        config: of generation. Where it names a kind of cache, all rows are computed to the end.
        length: most tokens of a completion, in the place of the config's.
        end_ids: ids that end a completion.
        with_logprobs: give log-probabilities too.

    Returns:
        Of each row the sampled ids, with padding perhaps after the id that ended them; and their log-probabilities in the
        distribution that they were drawn from, empty where not asked for.
    """
    config = copy.deepcopy(config)
    config.return_dict_in_generate, config.output_scores = True, with_logprobs
    ends = torch.tensor(end_ids, device=ids.device)
    may_shrink = (
        config.use_cache is not False and config.cache_implementation is None and _has_plain_cache(model)
    )
    tokens: list[list[int]] = [[] for _ in ids]
    logprobs: list[list[float]] = [[] for _ in ids]
    cache: dict[str, Any] = {}
    rows, left = list(range(len(ids))), length
    while rows and left:
        config.max_new_tokens = left
        count = max(_LEAST_ENDED, int(_ENDED_SHARE * len(rows))) if may_shrink else len(rows)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_EnoughEnded(ends, count)]),
            synced_gpus=False,
            **cache,
        )
        sampled = output.sequences[:, ids.shape[1] :]
        for row, drawn in zip(rows, sampled.tolist(), strict=True):
            tokens[row] += drawn
        if with_logprobs:
            for row, values in zip(rows, drawn_logprobs(output.scores, sampled).tolist(), strict=True):
                logprobs[row] += values
        left -= sampled.shape[1]
        going = (~torch.isin(sampled, ends).any(dim=1)).nonzero().squeeze(1)
        rows = [rows[place] for place in going.tolist()]
        if rows and left:
            ids = output.sequences[going]
            mask = torch.cat([mask[going], mask.new_ones(len(going), sampled.shape[1])], dim=1)
            cache = _of_rows(output.past_key_values, going)
            may_shrink = bool(cache)  # where it has to be computed anew, once is enough
        del output  # its key-value cache, and the logits
    return tokens, logprobs


def _has_plain_cache(model: Any) -> bool:
    """Whether the rows of a model's key-value cache can be chosen from; one with other states (Mamba's, say) has none such."""
    config = getattr(model, "config", None)
    return config is not None and _is_plain(DynamicCache(config=config.get_text_config(decoder=True)))


def _is_plain(cache: Any) -> bool:
    return type(cache) is DynamicCache and all(type(layer) in _PLAIN_LAYERS for layer in cache.layers)


def _of_rows(cache: Any, rows: Tensor) -> dict[str, Any]:
    """The cache of some rows, as `generate` takes it; nothing where it is not as the model's config lets expect: it is computed anew then."""
    if not _is_plain(cache):
        return {}
    cache.batch_select_indices(rows)
    return {"past_key_values": cache}


def drawn_logprobs(scores: tuple[Tensor, ...], sampled: Tensor) -> Tensor:
    """Log-probabilities [b, T] of sampled ids [b, T] under the `scores` of `generate`, T tensors [b, vocabulary].

    Scores are the logits after temperature and every processor: what was sampled from. One step at a time, so that
    no [b, T, vocabulary] is held.
    """
    steps = [
        step.float().log_softmax(-1).gather(-1, sampled[:, place].unsqueeze(-1))
        for place, step in enumerate(scores)
    ]
    return torch.cat(steps, dim=1)
