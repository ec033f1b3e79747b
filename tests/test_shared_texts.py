"""Pairs that share texts: the same loss and gradient as TRL's, with each text read once; and the order of prompts."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from datasets import Dataset
from torch import nn
from trl import RewardConfig, RewardTrainer

from tieback.pipeline import shared_texts
from tieback.pipeline.shared_texts import PromptSampler, SharedTextsTrainer


def ranked(prompt: list[int], responses: list[list[int]]) -> list[dict[str, Any]]:
    """All pairs of some responses, the best first."""
    return [
        {"prompt": str(prompt), "chosen_ids": prompt + better, "rejected_ids": prompt + worse}
        for place, better in enumerate(responses)
        for worse in responses[place + 1 :]
    ]


PAIRS = [
    *ranked([5, 6, 7], [[8, 9], [10], [11, 12, 13], [14]]),
    *ranked([15], [[16, 17, 18, 19], [20]]),
    *ranked([21, 22], [[23], [24, 25], [26, 27]]),
]
NUM_TEXTS = 4 + 2 + 3


def texts_of(batch: dict[str, Any]) -> list[list[int]]:
    """The texts of all passes, without their padding."""
    return [
        ids[mask.bool()].tolist()
        for texts in batch["passes"]
        for ids, mask in zip(texts["input_ids"], texts["attention_mask"], strict=True)
    ]


def make(folder: Path, kind: type[RewardTrainer], model: nn.Module, **settings: Any) -> RewardTrainer:
    args = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=len(PAIRS), per_device_eval_batch_size=4,
        max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        logging_steps=1, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        save_strategy="no", **settings,
    )  # fmt: skip
    rows = Dataset.from_list(PAIRS)
    tok = toy.tokenizer()
    return kind(
        model=copy.deepcopy(model), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tok
    )


@pytest.mark.parametrize("pairs_in_a_pass", [len(PAIRS), 3])
def test_a_text_is_read_once_and_the_step_is_that_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs_in_a_pass: int
) -> None:
    monkeypatch.setattr(shared_texts, "PAIRS_IN_A_PASS", pairs_in_a_pass)
    num_passes = len(PAIRS) // pairs_in_a_pass
    model = toy.reward_model(toy.tokenizer())
    weights, logs, seen, evaluated = [], [], [], []
    for kind in (RewardTrainer, SharedTextsTrainer):
        trainer = make(tmp_path / kind.__name__, kind, model)
        rows: list[int] = []
        trainer.model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs, rows=rows: rows.append(len(args[0] if args else kwargs["input_ids"])),
            with_kwargs=True,
        )
        trainer.train()
        seen.append(rows[:num_passes])
        logs.append(next(entry for entry in trainer.state.log_history if "margin" in entry))
        weights.append(dict(trainer.model.named_parameters()))
        evaluated.append(trainer.evaluate())
    assert seen[0][0] == 2 * len(PAIRS)
    assert len(seen[1]) == num_passes
    assert sum(seen[1]) == NUM_TEXTS
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)
    moved = max((p - q).abs().max() for p, q in zip(weights[1].values(), model.parameters(), strict=True))
    assert moved > 1e-3
    for name in ("loss", "accuracy", "margin", "max_reward"):
        assert logs[1][name] == pytest.approx(logs[0][name], abs=1e-5), name
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert evaluated[1][name] == pytest.approx(evaluated[0][name], abs=1e-5), name


def test_the_pairs_of_a_prompt_share_a_batch(tmp_path: Path) -> None:
    trainer = make(tmp_path, SharedTextsTrainer, toy.reward_model(toy.tokenizer()))
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(len(PAIRS)))
    prompts = [PAIRS[row]["prompt"] for row in order]
    changes = sum(a != b for a, b in itertools.pairwise(prompts))
    assert changes == len(set(prompts)) - 1


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    prompts = [number // 3 for number in range(60)]
    orders = {}
    for seed in (0, 1):
        sampler = PromptSampler(prompts, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
        sampler.set_epoch(0)
        assert list(sampler) == orders[seed, 0]
        assert len(sampler) == 60
    assert len({tuple(order) for order in orders.values()}) == 4


def test_another_order_that_is_asked_for_is_trls(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, SharedTextsTrainer, toy.reward_model(toy.tokenizer()), train_sampling_strategy="sequential"
    )
    assert list(trainer._get_train_sampler()) == list(range(len(PAIRS)))


def collate(folder: Path, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return make(folder, SharedTextsTrainer, toy.reward_model(toy.tokenizer())).data_collator(pairs)


def test_passes_hold_like_lengths_and_no_padding_behind_them(tmp_path: Path) -> None:
    pairs = [{"chosen_ids": [5] * (1 + number), "rejected_ids": [6] * (40 - number)} for number in range(32)]
    batch = collate(tmp_path, pairs)
    widths = [texts["input_ids"].shape[1] for texts in batch["passes"]]
    assert widths == [40, 20]
    assert [max(texts["attention_mask"].sum(1).tolist()) for texts in batch["passes"]] == widths
    lengths = [len(text) for text in texts_of(batch)]
    assert sorted(lengths, reverse=True) == lengths
    everything = texts_of(batch)
    sides = [everything[row] for row in batch["rows"].tolist()]
    assert sides == [pair[f"{side}_ids"] for side in ("chosen", "rejected") for pair in pairs]


def test_no_pass_is_empty_where_hardly_a_text_differs(tmp_path: Path) -> None:
    """Processes would wait for one another if one of them had fewer passes."""
    batch = collate(tmp_path, [{"chosen_ids": [5, 6], "rejected_ids": [7]}] * 64)
    assert [len(texts["input_ids"]) for texts in batch["passes"]] == [1, 1, 1, 1]
    everything = texts_of(batch)
    assert {tuple(everything[row]) for row in batch["rows"][:64].tolist()} == {(5, 6)}
    assert {tuple(everything[row]) for row in batch["rows"][64:].tolist()} == {(7,)}


def test_a_prompt_of_many_rows_is_mixed_with_others() -> None:
    order = list(PromptSampler(["same"] * 3600 + ["other"] * 3600, seed=0))
    assert sorted(order) == list(range(7200))
    places = [row < 3600 for row in order]
    runs = [len(list(group)) for _, group in itertools.groupby(places)]
    assert max(runs) < 36 * 12
