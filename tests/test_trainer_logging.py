"""What a person sees of a run: figures over the iterations, one for each reward function, the bar's line, and a table."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tieback.pipeline.trainer.callbacks import PPOProgressCallback


def test_a_line_gives_the_means_of_the_iterations_since_the_one_before(tmp_path: Path) -> None:
    logs = []
    for steps in (1, 2):
        trainer = toy.ppo_trainer(tmp_path, max_steps=4, logging_steps=steps)
        trainer.train()
        logs.append(toy.iteration_logs(trainer))
    each, pairs = logs
    assert (len(each), len(pairs)) == (4, 2)
    for number, entry in enumerate(pairs):
        first, second = each[2 * number : 2 * number + 2]
        for name in set(entry) - {"learning_rate", "epoch", "step"}:
            assert entry[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6), name


def test_the_figures_of_an_iteration_are_those_of_the_glossary(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path)
    trainer.train()
    assert set(toy.iteration_logs(trainer)[0]) == {
        *("reward/mean", "reward/std", "reward/normalized_mean", "reward/id_reward", "kl/ref", "kl_coef"),
        *("completions/mean_length", "completions/truncated_fraction"),
        *("policy/loss", "policy/approx_kl", "policy/clip_fraction", "policy/entropy", "policy/ratio"),
        *("value/loss", "value/clip_fraction", "value/explained_variance", "grad_norm", "optimizer_steps"),
        *("learning_rate", "epoch", "step"),
    }


def test_what_an_iteration_took_is_logged(tmp_path: Path) -> None:
    waited = 0.3

    def slow_judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        time.sleep(waited)
        return toy.id_reward(completion_ids)

    started = time.perf_counter()
    trainer = toy.ppo_trainer(tmp_path, slow_judge, max_steps=2)
    trainer.train()
    elapsed = time.perf_counter() - started
    logs = [entry for entry in trainer.state.log_history if "policy/loss" in entry]
    phases = ("generate", "score", "logprobs", "update")
    assert all(entry[f"time/{phase}"] > 0 for entry in logs for phase in phases)
    assert all(waited <= entry["time/score"] < waited + 0.5 * elapsed for entry in logs)
    seconds = [sum(entry[f"time/{phase}"] for phase in phases) for entry in logs]
    assert sum(seconds) < elapsed
    for entry, total in zip(logs, seconds, strict=True):
        tokens = 8 * entry["completions/mean_length"]
        assert entry["tokens_per_second"] == pytest.approx(tokens / total, rel=1e-4)
    # At least the libraries; at most what this machine has.
    assert 100 < logs[0]["memory/peak"] <= logs[1]["memory/peak"] < psutil.virtual_memory().total / 2**20


def test_reward_functions_of_the_same_name_are_logged_apart(tmp_path: Path) -> None:
    def constant(value: float, name: str) -> Any:
        def reward(completions: list[Any], **_: Any) -> list[float]:
            return [value] * len(completions)

        reward.__name__ = name
        return reward

    functions = [
        constant(1.0, "score"),
        constant(2.0, "score"),
        constant(3.0, "mean"),
        constant(4.0, "score"),
    ]
    trainer = toy.ppo_trainer(tmp_path, functions, max_steps=1, missing_eos_penalty=0.0)
    trainer.train()
    log = toy.iteration_logs(trainer)[0]
    names = ("score", "score_2", "mean_2", "score_3", "mean")
    assert [log[f"reward/{name}"] for name in names] == [1.0, 2.0, 3.0, 4.0, 10.0]


def test_the_bar_writes_one_line_of_what_matters() -> None:
    written: list[str] = []
    callback = PPOProgressCallback()
    callback.training_bar = SimpleNamespace(write=written.append)
    state: Any = SimpleNamespace(global_step=7)
    anything: Any = None
    callback.on_log(anything, state, anything, {"reward/mean": 0.12345, "kl/ref": 3.0, "grad_norm": 9.0})
    callback.on_log(anything, state, anything, {"eval_reward/mean": 0.5, "eval_kl/ref": 2.0})
    callback.on_log(anything, state, anything, {"eval_long_reward/mean": 0.25, "eval_long_kl/ref": 1.0})
    callback.on_log(anything, state, anything, {"train_runtime": 1.0})
    assert [line.strip() for line in written] == [
        "iteration 7  reward 0.123  kl 3",
        "evaluation  reward 0.5  kl 2",
        "evaluation long  reward 0.25  kl 1",
    ]


def test_the_table_of_completions_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = iter(range(100))
    trainer = toy.ppo_trainer(tmp_path, log_completions=True, num_completions_to_print=2, max_steps=1)
    trainer.processing_class.decode = lambda *_, **__: f"answer{next(words)}"
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("answer") == 2
    assert "id_reward" in printed
    # The score of all rewards together is no advantage, which TRL's table would call it.
    assert "weighted" in printed
    assert "Advantage" not in printed


def test_tensorboard_shows_the_latest_completions_and_renders_none_of_them(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\n# no heading"
    trainer = toy.ppo_trainer(tmp_path, report_to="tensorboard", num_completions_to_print=2, max_steps=2)
    trainer.processing_class.decode = lambda *_, **__: hostile
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    shown = events.Tensors("completions/text_summary")
    assert [event.step for event in shown] == [1, 2]
    text = shown[-1].tensor_proto.string_val[0].decode()
    assert text.count("**reward ") == 2
    assert "<script>" not in text
    # Four spaces make a line literal in Markdown.
    assert text.count("    &lt;script&gt;alert(1)&lt;/script&gt;\n    # no heading") == 2
