"""Scores of texts: invariances, another vocabulary, and agreement with what RewardTrainer trains on."""

import copy
import json
import logging

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from tieback.data.tokenizer import train_tokenizer
from tieback.reward_model.encoding import encode
from tieback.reward_model.head import new_reward_model, set_reward_bias
from tieback.reward_model.scoring import RewardScorer

TEXTS = [
    "the cat sat on the mat",
    "what is two plus two?",
    "it is four, of course",
    "I do not know at all",
] * 5
PROMPTS = ["What is two plus two?", "Where is the cat?", "Hello"]
COMPLETIONS = [" It is four.", " On the mat, of course, as ever.", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=48,
        )
    ).save_pretrained(folder)
    model = new_reward_model(folder)
    set_reward_bias(model, 0.75)
    return model


def conversations():
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return prompts, [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]


def test_scores_are_the_heads_on_the_last_token_in_the_order_given(model, tokenizer):
    scores = RewardScorer(model, tokenizer, batch_size=2).score(PROMPTS, COMPLETIONS)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        ids = torch.tensor([tokenizer(prompt + completion + "<|end|>")["input_ids"]])
        last = model.model(input_ids=ids).last_hidden_state[0, -1]
        assert score == pytest.approx((last @ model.score.weight[0]).item() + 0.75, abs=1e-5)


def test_scores_depend_on_neither_batch_nor_company(model, tokenizer):
    prompts, completions = conversations()
    together = RewardScorer(model, tokenizer, batch_size=3).score(prompts, completions)
    for batch_size in (1, 2):
        alone = RewardScorer(model, tokenizer, batch_size=batch_size).score(prompts[::-1], completions[::-1])
        assert alone[::-1] == pytest.approx(together, abs=1e-5)


def test_pad_equal_to_eos_changes_no_score(model, tokenizer):
    prompts, completions = conversations()
    before = RewardScorer(model, tokenizer).score(prompts, completions)
    other, other_model = copy.deepcopy(tokenizer), copy.deepcopy(model)
    other.pad_token = other.eos_token
    other_model.config.pad_token_id = other.eos_token_id
    assert RewardScorer(other_model, other).score(prompts, completions) == before


def permuted(tokenizer, model):
    """The same tokenizer with its ids shuffled, and the same model with its embedding rows shuffled alike."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(tokenizer)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(4)).tolist()
    state["model"]["vocab"] = {token: order[index] for token, index in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = order[token["id"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    new_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=tokenizer.chat_template,
    )
    new_model = copy.deepcopy(model)
    with torch.no_grad():
        new_model.model.embed_tokens.weight[torch.tensor(order)] = model.model.embed_tokens.weight.clone()
    return new_tokenizer, new_model


def test_a_permuted_vocabulary_gives_the_same_scores(model, tokenizer):
    new_tokenizer, new_model = permuted(tokenizer, model)
    assert new_tokenizer.eos_token_id != tokenizer.eos_token_id
    assert new_tokenizer("the cat")["input_ids"] != tokenizer("the cat")["input_ids"]
    for prompts, completions in ((PROMPTS, COMPLETIONS), conversations()):
        expected = RewardScorer(model, tokenizer).score(prompts, completions)
        assert RewardScorer(new_model, new_tokenizer).score(prompts, completions) == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.parametrize("conversational", [False, True])
def test_encoding_is_what_reward_trainer_trains_on(model, tokenizer, tmp_path, conversational):
    prompts, chosen = conversations() if conversational else (PROMPTS, COMPLETIONS)
    dataset = Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": chosen[::-1]})
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = RewardTrainer(copy.deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    assert list(trainer.train_dataset["chosen_ids"]) == [
        encode(tokenizer, prompt, completion) for prompt, completion in zip(prompts, chosen, strict=True)
    ]


def test_of_a_text_beyond_the_context_the_end_is_scored_and_one_warning_given(model, tokenizer, caplog):
    scorer = RewardScorer(model, tokenizer)
    ids = encode(tokenizer, "the cat " * 60, "sat")
    assert len(ids) > 48
    with caplog.at_level(logging.WARNING):
        scores = scorer.score_ids([ids, ids])
    assert scores == pytest.approx([scorer.score_ids([ids[-48:]])[0]] * 2, abs=1e-6)
    assert len(caplog.records) == 1


def test_errors_name_what_is_wrong(model, tokenizer):
    scorer = RewardScorer(model, tokenizer)
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        scorer.score(["a", "b"], ["c"])
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        RewardScorer(model, plain).score(*conversations())
