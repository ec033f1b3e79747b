"""Passes of pairs of like lengths: what a step learns does not depend on how it was divided."""

import copy
import random

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig

from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline.pair_trainer import LikeLengthSampler, PairTrainer
from tieback.reward_model.encoding import encode_pairs

NUM_PAIRS = 16


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a b c d e f g"], 270)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    rng = random.Random(0)
    rows = [
        {"prompt": "a " * rng.randint(1, 20), "chosen": "b " * rng.randint(1, 20), "rejected": "c"}
        for _ in range(NUM_PAIRS)
    ]
    return encode_pairs(Dataset.from_list(rows), tokenizer, None)[0]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForSequenceClassification(config).double()


class Recorded(PairTrainer):
    """Remembers the shape of each pass."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.shapes = [*getattr(self, "shapes", []), tuple(inputs["input_ids"].shape)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(tmp_path, model, tokenizer, pairs, **settings) -> Recorded:
    args = RewardConfig(
        output_dir=str(tmp_path / "out"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=1,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    trainer = Recorded(copy.deepcopy(model), args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_step_of_passes_of_like_lengths_is_that_of_one_pass_of_all_its_pairs(
    tmp_path, model, tokenizer, pairs, accumulation
):
    whole = train(tmp_path, model, tokenizer, pairs, per_device_train_batch_size=NUM_PAIRS)
    divided = train(
        tmp_path,
        model,
        tokenizer,
        pairs,
        per_device_train_batch_size=NUM_PAIRS // accumulation,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="batch_rebalance",
    )
    lengths = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    longest = sorted(lengths, reverse=True)[:: NUM_PAIRS // accumulation]
    assert divided.shapes == [(2 * NUM_PAIRS // accumulation, length) for length in longest]
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(divided.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-9)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, divided)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_steps_are_drawn_by_chance_anew_in_each_epoch_and_the_same_after_a_restart():
    lengths = random.Random(0).choices(range(5, 60), k=50)
    sampler = LikeLengthSampler(lengths, 8, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({frozenset(order[:8]) for order in orders}) == 3
    later = LikeLengthSampler(lengths, 8, seed=3)
    later.set_epoch(2)
    assert list(later) == orders[2]
    for first in range(
        8, 50, 8
    ):  # the first step begins with the longest row of all: Transformers puts it there
        step = [lengths[row] for row in orders[0][first : first + 8]]
        assert step[1:] == sorted(step[1:], reverse=True)
