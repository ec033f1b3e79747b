"""Generation without the rows that have ended: nothing but the work is less."""

import random

import pytest
import toy
from families import family
from torch import nn
from transformers import PreTrainedModel

from tieback.pipeline.rollout import generation
from tieback.pipeline.rollout.sampler import Completion, TransformersSampler
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences

TOK = toy.tokenizer()
# A fifth of the vocabulary ends a completion, so that rows end at all lengths.
ENDS = list(range(4, len(TOK), 5))
LENGTH = 24
_DRAW = random.Random(0)
PROMPTS = [[_DRAW.randrange(len(TOK)) for _ in range(_DRAW.randint(1, 12))] for _ in range(60)]
SHRINKING = ("llama", "gpt2", "gemma3_text", "mistral", "gpt_oss")
# Their states cannot be chosen from by rows: all rows are computed to the end.
OTHERS = ("lfm2", "mamba")


def sampler(model: nn.Module, temperature: float, **arguments: object) -> TransformersSampler:
    settings = RolloutSettings(temperature=temperature, max_completion_length=LENGTH)
    made = TransformersSampler(settings, ENDS, TOK.pad_token_id, model.device, None, arguments)
    made.sync(model)
    return made


def completions_and_work(
    model: PreTrainedModel, temperature: float = 1e-4, prompts: list[list[int]] = PROMPTS, **arguments: object
) -> tuple[list[Completion], int, int]:
    """Completions, how many tokens the model computed for them (a prompt's tokens once more where it is), and in how many calls."""
    computed = []

    def count(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        computed.append(ids.numel())

    calls = []
    generate = model.generate
    model.generate = lambda **kwargs: calls.append(kwargs) or generate(**kwargs)  # type: ignore[method-assign]
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        completions = sampler(model, temperature, **arguments).sample(prompts, seed=0, with_logprobs=True)
    finally:
        hook.remove()
        model.generate = generate  # type: ignore[method-assign]
    return completions, sum(computed), len(calls)


@pytest.mark.parametrize("name", [*SHRINKING, *OTHERS])
def test_completions_are_those_of_one_call_for_all_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name, TOK)
    # At a temperature of nearly 0 what is sampled is the likeliest token, whatever random numbers are drawn.
    shrunk, work, calls = completions_and_work(model)
    monkeypatch.setattr(generation, "_LEAST_ENDED", len(PROMPTS))
    whole, all_work, one_call = completions_and_work(model)
    assert [(each.ids, each.truncated) for each in shrunk] == [(each.ids, each.truncated) for each in whole]
    assert len({len(each.ids) for each in whole}) > 5
    assert any(each.truncated for each in whole)
    assert one_call == 1
    if name in SHRINKING:
        assert calls > 1
        assert work < 0.85 * all_work
    else:
        assert calls == 1


@pytest.mark.parametrize("name", SHRINKING)
def test_log_probabilities_are_those_that_scoring_computes(name: str) -> None:
    model = family(name, TOK)
    completions, _, calls = completions_and_work(model, temperature=1.0)
    assert calls > 1
    packed = pack_sequences(PROMPTS, [each.ids for each in completions], TOK.pad_token_id, model.device)
    scored = completion_logprobs(model, packed, temperature=1.0)[0].tolist()
    for row, completion in zip(scored, completions, strict=True):
        assert completion.logprobs == pytest.approx(row[: len(completion.ids)], abs=1e-4)


def test_a_cache_that_is_not_as_expected_is_computed_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama", TOK)
    expected, _, _ = completions_and_work(model)
    monkeypatch.setattr(generation, "_of_rows", lambda *_: {})
    completions, _, calls = completions_and_work(model)
    assert calls == 2
    assert [each.ids for each in completions] == [each.ids for each in expected]


def test_few_rows_are_computed_to_the_end_in_one_call() -> None:
    model = family("llama", TOK)
    assert completions_and_work(model, prompts=PROMPTS[:8])[2] == 1
    assert completions_and_work(model, prompts=PROMPTS[:20])[2] > 1


@pytest.mark.parametrize("arguments", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_a_cache_that_the_settings_name_keeps_all_its_rows(arguments: dict[str, object]) -> None:
    model = family("llama", TOK)
    named, _, calls = completions_and_work(model, **arguments)
    assert calls == 1
    assert [each.ids for each in named] == [each.ids for each in completions_and_work(model)[0]]
