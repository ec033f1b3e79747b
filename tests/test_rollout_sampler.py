"""Sampling: where a response ends, and that scoring knows the probabilities that were drawn from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from architectures import ARCHITECTURES, CPU, END, PAD, PROMPTS, VOCABULARY, causal, classifier
from torch import Tensor
from transformers import (
    GenerationConfig,
)

from tieback.pipeline.rollout.sampler import Completion, TransformersSampler, end_token_ids, own_end_ids
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer.actor_critic import ActorCritic


class Scripted:
    """Stands for a policy: `generate` continues each prompt with what it was told to."""

    def __init__(self, continuations: list[list[int]]):
        self.continuations = torch.tensor(continuations)

    def generate(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sequences=torch.cat([input_ids, self.continuations[: len(input_ids)]], dim=1))


def sampler(
    model: Any,
    ends: list[int],
    pad: int = PAD,
    length: int = 4,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> TransformersSampler:
    settings = RolloutSettings(temperature=temperature, max_completion_length=length)
    made = TransformersSampler(settings, ends, pad, CPU, batch_size)
    made.sync(model)
    return made


def sample(made: TransformersSampler, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[bool]]:
    completions = made.sample(prompt_ids)
    return [completion.ids for completion in completions], [
        completion.truncated for completion in completions
    ]


# Where a response ends.


def test_a_response_ends_at_the_first_of_several_end_ids_and_keeps_its_tokens() -> None:
    policy = Scripted([[20, 7, PAD, PAD], [21, 22, END, PAD], [END, PAD, PAD, PAD], [23, 24, 25, 26]])
    completions, truncated = sample(sampler(policy, [END, 7]), [[5]] * 4)
    assert completions == [[20, 7], [21, 22, END], [END], [23, 24, 25, 26]]
    assert truncated == [False, False, False, True]


def test_a_cut_response_is_flagged_and_no_token_of_it_is_overwritten() -> None:
    policy = Scripted([[20, 21, 22, 23], [20, 21, 22, END]])
    completions, truncated = sample(sampler(policy, [END]), [[5]] * 2)
    assert completions == [[20, 21, 22, 23], [20, 21, 22, END]]
    # Both are four tokens wide: only the flag tells them apart.
    assert truncated == [True, False]


def test_a_pad_that_is_also_the_end_hides_no_end() -> None:
    policy = Scripted([[20, END, END, END], [END, END, END, END], [20, 21, 22, END]])
    completions, truncated = sample(sampler(policy, [END], pad=END), [[5]] * 3)
    assert completions == [[20, END], [END], [20, 21, 22, END]]
    assert truncated == [False, False, False]


def test_an_end_inside_the_prompt_ends_nothing() -> None:
    policy = Scripted([[20, 21, 22, 23], [20, END, PAD, PAD]])
    completions, truncated = sample(sampler(policy, [END]), [[5, END, 6, END], [END]])
    assert completions == [[20, 21, 22, 23], [20, END]]
    assert truncated == [True, False]


def test_every_end_id_of_a_real_model_stops_its_row_and_the_others_go_on() -> None:
    ends = list(range(5, VOCABULARY, 9))
    torch.manual_seed(0)
    completions, truncated = sample(sampler(causal("Llama"), ends, length=6, batch_size=50), PROMPTS * 40)
    for completion, cut in zip(completions, truncated, strict=True):
        assert not set(completion[:-1]) & set(ends)
        assert (completion[-1] in ends) == (not cut)
        assert len(completion) == 6 or not cut
    assert {completion[-1] for completion in completions} >= set(ends)
    assert len({len(completion) for completion in completions}) == 6
    assert any(truncated)


def test_ends_are_those_of_tokenizer_model_chat_template_and_stop_tokens() -> None:
    tok = toy.tokenizer()
    end, cat = tok.eos_token_id, tok.convert_tokens_to_ids("Ġcat")
    assert end_token_ids(tok, GenerationConfig(eos_token_id=[end, 9]), None) == [end, 9]
    assert end_token_ids(tok, GenerationConfig(eos_token_id=9), [" cat"]) == [end, 9, cat]
    assert end_token_ids(tok, None, None) == [end]
    # A template that closes a turn with another token than EOS, as those of Qwen and Llama 3 do.
    tok.eos_token = "<|pad|>"
    assert end_token_ids(tok, GenerationConfig(eos_token_id=9), [" cat"]) == [tok.pad_token_id, 9, end, cat]
    assert own_end_ids(tok, None) == [tok.pad_token_id, end]


def test_a_stop_token_that_is_no_single_token_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"stop_tokens: 'red zebra' is \d+ tokens of this tokenizer"):
        end_token_ids(toy.tokenizer(), None, ["red zebra"])


def test_nothing_that_ends_a_response_is_an_error() -> None:
    tok = toy.tokenizer()
    tok.eos_token = tok.chat_template = None
    assert own_end_ids(tok, GenerationConfig()) == []
    with pytest.raises(ValueError, match="no EOS token: name what ends a completion in stop_tokens"):
        end_token_ids(tok, GenerationConfig(), None)


def test_a_stop_token_ends_responses_in_the_trainer_and_spares_them_the_missing_eos_penalty(
    tmp_path: Path,
) -> None:
    tok = toy.tokenizer()
    characters = [chr(code) for code in range(33, 127)]
    trainer = toy.ppo_trainer(
        tmp_path,
        lambda completions, **_: [0.0] * len(completions),
        model=toy.policy(tok),
        tok=tok,
        stop_tokens=characters,
        missing_eos_penalty=1.0,
    )
    assert trainer.sampler.end_ids == [
        tok.eos_token_id,
        *(tok.encode(character)[0] for character in characters),
    ]
    scored = trainer.score(trainer.generate([toy.prompts()[i] for i in range(8)]))
    rollout = scored.rollout
    ended = [ids[-1] in trainer.sampler.end_ids for ids in rollout.completion_ids]
    assert 0 < sum(ended) < 8
    assert rollout.truncated == [not end for end in ended]
    assert scored.scores.tolist() == [0.0 if end else -1.0 for end in ended]


# What is drawn from.


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_gives_the_probabilities_that_left_padded_sampling_drew_from(
    architecture: str, chunk: int
) -> None:
    policy = causal(architecture)
    ends = [END, *range(4, VOCABULARY, 4)]
    made = sampler(policy, ends, length=6, temperature=0.7, batch_size=3)
    completions = made.sample(PROMPTS, seed=0, with_logprobs=True)
    assert len({len(completion.ids) for completion in completions}) > 1
    with torch.no_grad():
        for start in range(0, len(PROMPTS), chunk):
            rows = completions[start : start + chunk]
            packed = pack_sequences(
                PROMPTS[start : start + chunk], [completion.ids for completion in rows], PAD, CPU
            )
            logprobs, _ = completion_logprobs(policy, packed, temperature=0.7)
            for row, completion in enumerate(rows):
                expected = torch.tensor(completion.logprobs)
                assert expected.shape == (len(completion.ids),)
                torch.testing.assert_close(logprobs[row, : len(expected)], expected, rtol=0, atol=1e-4)


def test_the_log_probabilities_are_those_of_a_plain_softmax_and_change_no_sample() -> None:
    policy = causal("Llama")
    made = sampler(policy, [END], length=6, temperature=0.7)
    completions = made.sample(PROMPTS, seed=3, with_logprobs=True)
    assert [Completion(each.ids, each.truncated) for each in completions] == made.sample(PROMPTS, seed=3)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = list(prompt)
        for token, drawn in zip(completion.ids, completion.logprobs or [], strict=True):
            with torch.no_grad():
                logits = policy(torch.tensor([ids])).logits[0, -1].double() / 0.7
            assert drawn == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
            ids.append(token)


def test_a_seed_makes_samples_that_do_not_depend_on_what_was_drawn_before() -> None:
    made = sampler(causal("Llama"), [END], length=6)
    first = made.sample(PROMPTS, seed=5)
    assert made.sample(PROMPTS) != first
    assert made.sample(PROMPTS, seed=5) == first
    assert made.sample(PROMPTS, seed=6) != first


def test_samples_come_from_the_weights_of_the_last_sync() -> None:
    policy = causal("Llama")
    made = sampler(causal("Qwen2"), [END], length=6)
    made.sync(policy)
    assert made.sample(PROMPTS, seed=5) == sampler(policy, [END], length=6).sample(PROMPTS, seed=5)


def test_the_models_own_sampling_settings_do_not_leak_into_generate() -> None:
    policy = causal("Llama")
    own = GenerationConfig(repetition_penalty=5.0, top_p=0.3, top_k=2, min_p=0.2, eos_token_id=END)
    policy.generation_config = own

    def greatest_difference(model: Any) -> float:
        completions = sampler(model, [END]).sample(PROMPTS, seed=0, with_logprobs=True)
        packed = pack_sequences(PROMPTS, [completion.ids for completion in completions], PAD, CPU)
        with torch.no_grad():
            scored = completion_logprobs(policy, packed, temperature=1.0)[0][packed["mask"]]
        drawn = [logprob for completion in completions for logprob in completion.logprobs or []]
        return float((torch.tensor(drawn) - scored).abs().max())

    assert greatest_difference(ActorCritic(policy, classifier("Llama"), 1.0, False)) < 1e-4
    assert policy.generation_config is own
    # Without that care they do leak, or this test would prove nothing.
    assert greatest_difference(policy) > 0.1


def test_the_models_own_settings_come_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = causal("Llama")
    own = policy.generation_config

    def generate(**_: Any) -> None:
        assert policy.generation_config is not own
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        ActorCritic(policy, classifier("Llama"), 1.0, False).generate()
    assert policy.generation_config is own


def test_generation_in_pieces_gives_every_row_its_completion(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def generate(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        seen.append(list(input_ids.shape))
        # Each row answers with its own last prompt token.
        answers = [input_ids[:, -1:], torch.full((len(input_ids), 1), END)]
        return SimpleNamespace(sequences=torch.cat([input_ids, *answers], dim=1))

    completions, _ = sample(sampler(SimpleNamespace(generate=generate), [END], batch_size=2), PROMPTS)
    # Prompts of like lengths together: of 1 and 2 tokens, of 3 and 4, and of 7.
    assert seen == [[2, 2], [2, 4], [1, 7]]
    assert completions == [[prompt[-1], END] for prompt in PROMPTS]
