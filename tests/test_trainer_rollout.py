"""Rollouts: where a response ends, what is masked, and that scoring knows the probabilities that sampling drew from."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tieback.pipeline.trainer.actor_critic import ActorCritic, completion_logprobs, completion_values
from tieback.pipeline.trainer.rollout import (
    decode_completions,
    encode_prompts,
    end_token_ids,
    left_pad,
    pack_sequences,
    sample,
    sampling_config,
)

CPU = torch.device("cpu")
VOCABULARY, END, PAD = 60, 1, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "num_labels": 1,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "GPT-2": GPT2Config(**SIZES),
    "GPT-NeoX": GPTNeoXConfig(**SIZES, intermediate_size=64),
    "Qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21]]
COMPLETIONS = [[22, 23, 24, 25, END], [26, END], [27, 28], [END], [29, 30, 31, 32, 33]]


def causal(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()


def classifier(architecture: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(ARCHITECTURES[architecture]).eval()


class Scripted:
    """Stands for a policy: `generate` continues each prompt with what it was told to."""

    def __init__(self, continuations: list[list[int]]):
        self.continuations = torch.tensor(continuations)

    def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, self.continuations[: len(input_ids)]], dim=1)


def config(ends: list[int], pad: int = PAD, length: int = 4) -> GenerationConfig:
    return sampling_config(1.0, length, ends, pad)


# Where a response ends.


def test_a_response_ends_at_the_first_of_several_end_ids_and_keeps_its_tokens() -> None:
    policy = Scripted([[20, 7, PAD, PAD], [21, 22, END, PAD], [END, PAD, PAD, PAD], [23, 24, 25, 26]])
    completions, truncated = sample(policy, [[5]] * 4, config([END, 7]), 4, CPU)
    assert completions == [[20, 7], [21, 22, END], [END], [23, 24, 25, 26]]
    assert truncated == [False, False, False, True]


def test_a_cut_response_is_flagged_and_no_token_of_it_is_overwritten() -> None:
    policy = Scripted([[20, 21, 22, 23], [20, 21, 22, END]])
    completions, truncated = sample(policy, [[5]] * 2, config([END]), 2, CPU)
    assert completions == [[20, 21, 22, 23], [20, 21, 22, END]]
    # Both are four tokens wide: only the flag tells them apart.
    assert truncated == [True, False]


def test_a_pad_that_is_also_the_end_hides_no_end() -> None:
    policy = Scripted([[20, END, END, END], [END, END, END, END], [20, 21, 22, END]])
    completions, truncated = sample(policy, [[5]] * 3, config([END], pad=END), 3, CPU)
    assert completions == [[20, END], [END], [20, 21, 22, END]]
    assert truncated == [False, False, False]


def test_an_end_inside_the_prompt_ends_nothing() -> None:
    policy = Scripted([[20, 21, 22, 23], [20, END, PAD, PAD]])
    completions, truncated = sample(policy, [[5, END, 6, END], [END]], config([END]), 2, CPU)
    assert completions == [[20, 21, 22, 23], [20, END]]
    assert truncated == [True, False]


def test_every_end_id_of_a_real_model_stops_its_row_and_the_others_go_on() -> None:
    ends = list(range(5, VOCABULARY, 9))
    torch.manual_seed(0)
    completions, truncated = sample(causal("Llama"), PROMPTS * 40, config(ends, length=6), 50, CPU)
    for completion, cut in zip(completions, truncated, strict=True):
        assert not set(completion[:-1]) & set(ends)
        assert (completion[-1] in ends) == (not cut)
        assert len(completion) == 6 or not cut
    assert {completion[-1] for completion in completions} >= set(ends)
    assert len({len(completion) for completion in completions}) == 6
    assert any(truncated)


def test_ends_are_those_of_the_tokenizer_the_generation_config_and_the_stop_tokens() -> None:
    tok = toy.tokenizer()
    end, cat = tok.eos_token_id, tok.convert_tokens_to_ids("Ġcat")
    assert end_token_ids(tok, GenerationConfig(eos_token_id=[end, 9]), None) == [end, 9]
    assert end_token_ids(tok, GenerationConfig(eos_token_id=9), [" cat"]) == [end, 9, cat]
    assert end_token_ids(tok, None, None) == [end]


def test_a_stop_token_that_is_no_single_token_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"stop_tokens: 'red zebra' is \d+ tokens of this tokenizer"):
        end_token_ids(toy.tokenizer(), None, ["red zebra"])


def test_nothing_that_ends_a_response_is_an_error() -> None:
    tok = toy.tokenizer()
    tok.eos_token = None
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
    assert trainer.end_ids == [tok.eos_token_id, *(tok.encode(character)[0] for character in characters)]
    scored = trainer.score(trainer.generate([toy.prompts()[i] for i in range(8)]))
    rollout = scored.rollout
    ended = [ids[-1] in trainer.end_ids for ids in rollout.completion_ids]
    assert 0 < sum(ended) < 8
    assert rollout.truncated == [not end for end in ended]
    assert scored.scores.tolist() == [0.0 if end else -1.0 for end in ended]


# Prompts and texts.


def test_a_conversation_becomes_the_template_with_the_assistants_turn_begun() -> None:
    tok = toy.tokenizer()
    (ids,) = encode_prompts([[{"role": "user", "content": "red cat"}]], tok)
    assert tok.decode(ids) == "<|user|>red cat<|end|><|assistant|>"
    assert encode_prompts(["red cat"], tok) == [tok.encode("red cat")]


def test_completions_have_the_shape_of_their_prompt_and_no_special_token() -> None:
    tok = toy.tokenizer()
    ids = [*tok.encode(" blue"), tok.eos_token_id]
    prompts: list[Any] = ["red", [{"role": "user", "content": "red"}]]
    assert decode_completions(prompts, [ids, ids], tok) == [
        " blue",
        [{"role": "assistant", "content": " blue"}],
    ]


# Masks and scoring.


def test_masks_come_from_lengths() -> None:
    for pad in (PAD, END, 22):
        packed = pack_sequences(PROMPTS, COMPLETIONS, pad, CPU)
        assert packed["mask"].tolist() == [[column < len(ids) for column in range(5)] for ids in COMPLETIONS]
        assert packed["prompt_lengths"].tolist() == [3, 1, 7, 2, 4]
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            width = len(prompt + completion)
            assert packed["input_ids"][row].tolist() == [*prompt, *completion, *[pad] * (9 - width)]


def test_training_is_the_same_whether_pad_is_the_end_token_or_another(tmp_path: Path) -> None:
    results = []
    for pad in ("<|pad|>", "<|end|>"):
        tok = copy.deepcopy(toy.tokenizer())
        tok.pad_token = pad
        trainer = toy.ppo_trainer(tmp_path, tok=tok, model=toy.brief_policy(toy.tokenizer()))
        trainer.train()
        assert 0 < sum(trainer._last_rollout.rollout.truncated) < 8
        results.append((toy.weights(trainer.model), trainer._last_rollout.rollout.completion_ids))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_rows_score_as_the_bare_rows_do(architecture: str) -> None:
    policy, critic = causal(architecture), classifier(architecture)
    packed = pack_sequences(PROMPTS, COMPLETIONS, PAD, CPU)
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(policy, packed, temperature=0.7)
        values = completion_values(critic, packed)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            ids = torch.tensor([prompt + completion])
            log_softmax = (policy(ids).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = log_softmax[range(len(completion)), completion]
            torch.testing.assert_close(logprobs[row, : len(completion)], expected, rtol=0, atol=1e-5)
            expected = -(log_softmax.exp() * log_softmax).sum(-1)
            torch.testing.assert_close(entropy[row, : len(completion)], expected, rtol=0, atol=1e-5)
            expected = critic.score(critic.base_model(ids).last_hidden_state)[0, len(prompt) - 1 :, 0]
            torch.testing.assert_close(values[row, : len(completion) + 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_gives_the_probabilities_that_left_padded_sampling_drew_from(
    architecture: str, chunk: int
) -> None:
    policy = causal(architecture)
    settings = sampling_config(0.7, 6, [END, *range(4, VOCABULARY, 4)], PAD)
    settings.return_dict_in_generate = settings.output_scores = True
    ids, attention_mask = left_pad(PROMPTS, PAD, CPU)
    torch.manual_seed(0)
    output = policy.generate(input_ids=ids, attention_mask=attention_mask, generation_config=settings)
    completions, _ = sample(Scripted(output.sequences[:, ids.shape[1] :].tolist()), PROMPTS, settings, 5, CPU)
    assert len({len(completion) for completion in completions}) > 1

    drawn = torch.stack(output.scores, dim=1).log_softmax(-1)
    with torch.no_grad():
        for start in range(0, len(PROMPTS), chunk):
            rows = slice(start, start + chunk)
            packed = pack_sequences(PROMPTS[rows], completions[rows], PAD, CPU)
            logprobs, _ = completion_logprobs(policy, packed, temperature=0.7)
            for row, completion in enumerate(completions[rows]):
                expected = drawn[start + row, range(len(completion)), completion]
                torch.testing.assert_close(logprobs[row, : len(completion)], expected, rtol=0, atol=1e-4)


def test_the_models_own_sampling_settings_do_not_leak_into_generate() -> None:
    policy = causal("Llama")
    own = GenerationConfig(repetition_penalty=5.0, top_p=0.3, top_k=2, min_p=0.2, eos_token_id=END)
    policy.generation_config = own
    actor_critic = ActorCritic(policy, classifier("Llama"), 1.0, False)
    settings = sampling_config(1.0, 4, [END], PAD)
    settings.return_dict_in_generate = settings.output_scores = True
    ids, attention_mask = left_pad(PROMPTS, PAD, CPU)

    def drawn_from(model: Any) -> tuple[list[list[int]], Tensor]:
        torch.manual_seed(0)
        output = model.generate(input_ids=ids, attention_mask=attention_mask, generation_config=settings)
        completions, _ = sample(
            Scripted(output.sequences[:, ids.shape[1] :].tolist()), PROMPTS, settings, 5, CPU
        )
        logprobs = torch.stack(output.scores, dim=1).log_softmax(-1)
        return completions, torch.cat(
            [logprobs[row, range(len(done)), done] for row, done in enumerate(completions)]
        )

    def scored(completions: list[list[int]]) -> Tensor:
        packed = pack_sequences(PROMPTS, completions, PAD, CPU)
        with torch.no_grad():
            return completion_logprobs(policy, packed, temperature=1.0)[0][packed["mask"]]

    completions, logprobs = drawn_from(actor_critic)
    torch.testing.assert_close(logprobs, scored(completions), rtol=0, atol=1e-4)
    assert policy.generation_config is own
    # Without that care they do leak, or this test would prove nothing.
    completions, logprobs = drawn_from(policy)
    assert (logprobs - scored(completions)).abs().max() > 0.1


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
    seen: list[int] = []

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        seen.append(len(input_ids))
        # Each row answers with its own last prompt token.
        return torch.cat([input_ids, input_ids[:, -1:], torch.full((len(input_ids), 1), END)], dim=1)

    completions, _ = sample(SimpleNamespace(generate=generate), PROMPTS, config([END]), 2, CPU)
    assert seen == [2, 2, 1]
    assert completions == [[prompt[-1], END] for prompt in PROMPTS]
