"""evaluate(): means over all prompts, in every split among processes, without a trace in training."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from datasets import DatasetDict
from transformers import TrainerCallback

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.random_state import kept_random_state
from tieback.pipeline.rollout.responses import equal_share
from tieback.pipeline.trainer.figures import figure_names


def length_reward(prompts: list[Any], **_: Any) -> list[float]:
    return [float(len(prompt[0]["content"])) for prompt in prompts]


def test_metrics_are_means_over_all_evaluation_prompts(tmp_path: Path) -> None:
    completions: list[list[int]] = []

    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        completions.extend(completion_ids)
        return length_reward(prompts)

    dataset = toy.prompts(13)
    trainer = toy.ppo_trainer(tmp_path, reward, eval_dataset=dataset, missing_eos_penalty=0.5)
    metrics = trainer.evaluate()
    assert len(completions) == 13
    expected = sum(length_reward(dataset["prompt"])) / 13
    truncated = sum(ids[-1] not in trainer.sampler.end_ids for ids in completions) / 13
    assert 0 < truncated < 1
    assert metrics["eval_reward/reward"] == pytest.approx(expected)
    assert metrics["eval_reward/mean"] == pytest.approx(expected)
    assert metrics["eval_reward/normalized_mean"] == pytest.approx(expected - 0.5 * truncated)
    assert metrics["eval_completions/mean_length"] == pytest.approx(sum(map(len, completions)) / 13)
    assert metrics["eval_completions/truncated_fraction"] == pytest.approx(truncated)
    assert metrics["eval_kl/ref"] == 0.0
    assert trainer.state.log_history[-1]["eval_reward/mean"] == metrics["eval_reward/mean"]


def test_the_prefix_and_the_data_set_can_be_chosen(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, length_reward, missing_eos_penalty=0.0)
    metrics = trainer.evaluate(toy.prompts(3), metric_key_prefix="test")
    assert metrics["test_reward/mean"] == pytest.approx(sum(length_reward(toy.prompts(3)["prompt"])) / 3)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 13])
def test_processes_share_the_prompts_evenly_and_each_counts_once(processes: int, count: int) -> None:
    shares = [equal_share(count, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    together = [row for share in shares for row in share]
    assert together[:count] == list(range(count))
    assert set(together) == set(range(count))


def test_evaluation_leaves_training_as_it_would_have_been(tmp_path: Path) -> None:
    results = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = toy.ppo_trainer(
            tmp_path,
            eval_dataset=toy.prompts(7),
            normalize_rewards=True,
            kl_target=0.5,
            max_steps=3,
            **settings,
        )
        trainer.train()
        results.append(
            {
                "weights": toy.weights(trainer.model),
                "moments": trainer.reward_moments.state_dict(),
                "kl": trainer.kl_controller.state_dict(),
                "torch": torch.get_rng_state(),
                "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),
                "python": list(random.getstate()[1]),
            }
        )
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward/mean" in entry]
    assert len(evaluations) == 4
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_reward_functions_that_draw_numbers_leave_no_trace_either(tmp_path: Path) -> None:
    def drawing(completions: list[Any], **_: Any) -> list[float]:
        return [random.random() + float(np.random.rand()) for _ in completions]

    trainer = toy.ppo_trainer(tmp_path, drawing, eval_dataset=toy.prompts(7))
    before = random.getstate(), np.random.get_state()[1].tolist()
    trainer.evaluate()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_random_state_of_any_accelerator_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, states = torch.device(kind), {kind: torch.tensor([1])}
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states.update({str(device): state}))
    before = torch.get_rng_state()
    with kept_random_state(device):
        states[kind] = torch.tensor([2])
        torch.rand(3)
    assert states[kind].item() == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_the_same_each_time(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, eval_dataset=toy.prompts(7))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second


def test_under_autocast_policy_and_reference_are_scored_alike_also_before_training(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, eval_dataset=toy.prompts(7), bf16=True)
    assert trainer.evaluate()["eval_kl/ref"] == 0.0


# Several data sets, rows, and what cannot be evaluated.


def mean_length(rows: Any) -> float:
    return sum(length_reward([row["prompt"] for row in rows])) / len(rows)


@pytest.mark.parametrize("form", [dict, DatasetDict])
def test_several_data_sets_are_evaluated_each_under_its_name(tmp_path: Path, form: Any) -> None:
    sets = form({"short": toy.prompts(3), "long": toy.prompts(9).select(range(3, 9))})
    seen: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
            seen.append(metrics)

    trainer = toy.ppo_trainer(tmp_path, length_reward, eval_dataset=sets, callbacks=[Watch()])
    metrics = trainer.evaluate()
    assert set(metrics) - {"epoch"} == {
        f"eval_{name}_{figure}" for name in sets for figure in figure_names(["length_reward"])
    }
    for name, dataset in sets.items():
        assert metrics[f"eval_{name}_reward/mean"] == pytest.approx(mean_length(dataset))
    assert metrics["eval_short_reward/mean"] != metrics["eval_long_reward/mean"]
    # Each is logged, and seen by callbacks, by itself, as with Trainer.
    logged = trainer.state.log_history
    assert [entry for entry in logged if "eval_short_reward/mean" in entry] == [logged[0]]
    assert [entry for entry in logged if "eval_long_reward/mean" in entry] == [logged[1]]
    assert [sum("reward/mean" in name for name in entry) for entry in seen] == [1, 1]
    assert trainer.evaluate(metric_key_prefix="test").keys() >= {"test_short_reward/mean"}


@pytest.mark.slow
def test_the_best_model_is_chosen_by_the_mean_reward_or_by_a_figure_of_one_data_set(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    several = {"a": toy.prompts(4), "b": toy.prompts(6)}
    for given, metric, name in (
        (toy.prompts(6), None, "eval_reward/mean"),
        (several, "b_reward/id_reward", "eval_b_reward/id_reward"),
        (several, "eval_a_reward/std", "eval_a_reward/std"),
    ):
        trainer = toy.ppo_trainer(tmp_path, eval_dataset=given, metric_for_best_model=metric, **settings)
        trainer.train()
        values = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(values) == 3
        assert trainer.state.best_metric == max(values)
    with pytest.raises(
        UsageError, match=r"metric_for_best_model=reward/mean: evaluation gives a_reward/mean, .*b_reward/std"
    ):
        toy.ppo_trainer(tmp_path, eval_dataset=several, **settings)


def test_a_schedule_that_follows_a_metric_waits_for_a_greater_reward(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(
        tmp_path,
        eval_dataset=toy.prompts(4),
        eval_strategy="steps",
        eval_steps=1,
        lr_scheduler_type="reduce_lr_on_plateau",
    )
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"
    assert trainer.lr_scheduler.best == trainer.state.best_metric


NO_EVALUATION: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"eval_strategy": "steps", "eval_steps": 1}, r"eval_strategy=steps needs evaluation data"),
    "at the start": ({"eval_on_start": True}, r"eval_on_start needs evaluation data"),
    "the best is saved": ({"save_strategy": "best"}, r"save_strategy=best .* need evaluations"),
    "a metric that there is not": (
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_dataset": toy.prompts(4),
            "metric_for_best_model": "loss",
        },
        r"metric_for_best_model=loss: evaluation gives reward/mean, ",
    ),
    "no data set of several": ({"eval_dataset": {}}, r"eval_dataset is an empty mapping"),
    "an empty one of several": (
        {"eval_dataset": {"a": toy.prompts(4), "b": toy.prompts(4).select([])}},
        r"eval_dataset\['b'\] is empty",
    ),
    "a stream among several": (
        {"eval_dataset": {"a": toy.prompts(4).to_iterable_dataset()}},
        r"eval_dataset\['a'\] is of type IterableDataset",
    ),
}


@pytest.mark.parametrize("fault", NO_EVALUATION)
def test_an_evaluation_that_cannot_be_is_refused_before_training(tmp_path: Path, fault: str) -> None:
    settings, message = NO_EVALUATION[fault]
    with pytest.raises(UsageError, match=message):
        toy.ppo_trainer(tmp_path, **settings)


def test_evaluate_takes_rows_and_several_data_sets_and_checks_them(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, lambda prompts, **_: [float(len(text)) for text in prompts])
    rows = [{"prompt": "red"}, {"prompt": "green"}]
    assert trainer.evaluate(rows)["eval_reward/mean"] == 4.0
    assert trainer.evaluate({"a": rows})["eval_a_reward/mean"] == 4.0
    with pytest.raises(
        UsageError, match=r"evaluate\(\) needs prompts: give it, or the trainer, an eval_dataset"
    ):
        trainer.evaluate()
    with pytest.raises(UsageError, match=r"eval_dataset\['a'\], row 2: the prompt is empty"):
        trainer.evaluate({"a": [{"prompt": "red"}, {"prompt": " "}]})
    with pytest.raises(UsageError, match=r"eval_dataset has no `prompt` column; its columns are \['text'\]"):
        trainer.evaluate([{"text": "red"}])
    with pytest.raises(UsageError, match="eval_dataset is empty"):
        trainer.evaluate([])


def test_predict_names_what_there_is_instead(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    with pytest.raises(NotImplementedError, match=r"evaluate\(dataset\).*generate\(rows\)"):
        trainer.predict(toy.prompts(4))
