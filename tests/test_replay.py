"""Saved rollouts: what was logged comes out of the files alone, what was changed in them is found, and the page does no harm."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tieback.cli.errors import UsageError
from tieback.pipeline import replay
from tieback.pipeline.report.tokens import completion_html, scale_of
from tieback.pipeline.rollout_files import RolloutFacts, read_rollout, saved_iterations, write_rollout


def by_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[float(i % 3) for i in ids] for ids in completion_ids]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k2, a λ of the critic's own, several completions": {
        "kl_estimator": "k2", "critic_gae_lambda": 1.0, "num_generations": 2, "gamma": 0.9,
    },
    "k3, λ by length, masked": {"kl_estimator": "k3", "gae_lambda_alpha": 0.6, "truncation": "mask"},
    "rewards by token": {"reward_funcs": [toy.id_reward, by_token], "normalize_rewards": True, "reward_clip": 0.5},
    "an environment between turns": {
        "rollout_func": toy.two_turns, "max_completion_length": 14, "reward_funcs": [toy.id_reward, by_token],
        "importance_sampling": "token", "gae_lambda_alpha": 0.6,
    },
    "bootstrap": {"truncation": "bootstrap", "kl_target": 0.1},
    "weights by sequence": {"importance_sampling": "sequence", "importance_sampling_cap": 1.0},
    "what the sampler tells": {"importance_sampling": "token", "normalize_rewards": True, "temperature": 0.8},
}  # fmt: skip


def train(folder: Path, **settings: Any) -> Path:
    """Five iterations, of which the second and the fourth log; the folder of the rollouts."""
    rollouts = folder / "rollouts"
    defaults = {
        "reward_funcs": [toy.id_reward, toy.id_reward],
        "max_steps": 5,
        "logging_steps": 2,
        "kl_coef": 0.3,
    }
    trainer = toy.ppo_trainer(folder / "run", rollout_dir=str(rollouts), **(defaults | settings))
    trainer.train()
    trainer.save_state()
    return rollouts


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["replay", *map(str, flags)])
        try:
            replay.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "what the sampler tells")) for name in VARIANTS],
)
def test_every_figure_of_the_rollout_comes_out_of_the_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = train(tmp_path, **VARIANTS[name])
    assert saved_iterations(rollouts) == [1, 2, 3, 4, 5]
    capsys.readouterr()
    status, out, err = run(capsys, rollouts, "--log", tmp_path / "run")
    assert (status, err) == (0, "")
    entries = [
        entry
        for entry in json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        if "policy/loss" in entry
    ]
    logged = {
        figure
        for figure in entries[0]
        if figure.startswith(("reward/", "kl/", "kl_coef", "completions/", "rollout/"))
    }
    logged |= {"value/explained_variance"}
    assert f"{len(logged) * len(entries)} figures of" in out
    assert "0 of them differ" in out
    assert (rollouts / "iteration-000005.html").is_file()


def change(path: Path, name: str, by: float) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = tensors[name] + by
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("tensor", "iteration", "found"),
    [
        ("advantages", 5, "iteration 5: advantages or returns are off by 0.01"),
        ("returns", 2, "iteration 2: advantages or returns are off by 0.01"),
        # Logged with the third, in one line.
        ("raw_scores", 4, "iteration 4: reward/mean was logged as"),
        ("ref_logprobs", 3, "iteration 4: kl/ref was logged as"),
    ],
)
def test_what_does_not_agree_is_found(
    tensor: str, iteration: int, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = train(tmp_path)
    change(rollouts / f"iteration-{iteration:06d}" / "process-0.safetensors", tensor, 0.01)
    capsys.readouterr()
    status, _, err = run(capsys, rollouts, "--log", tmp_path / "run")
    assert status == 1
    assert found in err


def test_nothing_that_is_learnt_depends_on_it(tmp_path: Path) -> None:
    results = []
    for settings in ({"rollout_dir": str(tmp_path / "rollouts")}, {}):
        trainer = toy.ppo_trainer(tmp_path / "run", **settings)
        trainer.train()
        results.append(toy.weights(trainer.model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


HOSTILE = "<script>alert(1)</script>\"'&<!--"
FACTS = RolloutFacts(3, 0.1, "k1", 1.0, 0.95, None, None, "penalty", 1, None, 2.0, ["rule"])


def tensors(lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    over_tokens = {name: torch.where(mask, float(i), 0.0) for i, name in enumerate(("logprobs", "ref_logprobs", "values", "token_scores", "advantages", "returns"))}  # fmt: skip
    rows = {"raw_scores": torch.tensor([float(length) for length in lengths])}
    return {
        **over_tokens, **rows, "mask": mask, "completion_ids": mask.long(), "truncated": torch.zeros(len(lengths)).bool(),
        "function_rewards": torch.ones(len(lengths), 1),
    }  # fmt: skip


def rows(lengths: list[int], text: str = "word") -> list[dict[str, Any]]:
    return [{"prompt": text, "completion": text * n, "tokens": [text] * n} for n in lengths]


def test_the_parts_of_all_processes_are_one_rollout_padded_to_the_longest(tmp_path: Path) -> None:
    for process, lengths in enumerate(([2, 4], [7])):
        write_rollout(tmp_path, process, FACTS, tensors(lengths), rows(lengths))
    saved = read_rollout(tmp_path, 3)
    assert saved.facts == FACTS
    assert saved.tensors["mask"].sum(1).tolist() == [2, 4, 7]
    assert saved.tensors["values"].shape == (3, 7)
    assert [len(row["tokens"]) for row in saved.rows] == [2, 4, 7]
    # Written once more, as by a run that goes on from a checkpoint before it.
    write_rollout(tmp_path, 1, FACTS, tensors([5]), rows([5]))
    assert read_rollout(tmp_path, 3).tensors["mask"].sum(1).tolist() == [2, 4, 5]


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_stays_text_and_every_token_has_its_number(tmp_path: Path) -> None:
    write_rollout(tmp_path, 0, FACTS, tensors([2, 3]), rows([2, 3], HOSTILE))
    page = Tags(replay.page(read_rollout(tmp_path, 3), [1]))
    assert "script" not in page.tags
    assert HOSTILE in page.text
    # Four completions (the highest, the lowest, the farthest, and row 1) in five figures each, and their prompts.
    assert page.tags.count("section") == 4
    assert page.tags.count("span") == 5 * (3 + 2 + 2 + 3) + 4


def test_colours_follow_sign_and_size() -> None:
    row = {"prompt": "x", "tokens": ["a", "b", "c", "d"], "facts": ""}
    html = completion_html(row, {"advantage": [2.0, -1.0, 0.0, float("nan")]}, "t", {"advantage": 2.0})
    spans = [part.split("</span>")[0] for part in html.split("<span class='token'")[1:]]
    assert "--ppo) 70%" in spans[0]
    assert "--sft) 35%" in spans[1]
    assert " 0%" in spans[2]
    assert "var(--line)" in spans[3]
    assert scale_of([1.0] * 95 + [100.0] * 5) == 1.0
    assert scale_of([]) == scale_of([0.0]) == 1.0


def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="has no rollouts: set rollout_dir"):
        run(capsys, tmp_path)
    write_rollout(tmp_path, 0, FACTS, tensors([2]), rows([2]))
    with pytest.raises(UsageError, match="has no iteration 7; there are 3 to 3"):
        run(capsys, tmp_path, "--iteration", 7)
    with pytest.raises(UsageError, match="--rows 4: the iteration has 1 completions"):
        run(capsys, tmp_path, "--rows", 4)
    with pytest.raises(UsageError, match=r"has no trainer_state\.json"):
        run(capsys, tmp_path, "--log", tmp_path)
    (tmp_path / "iteration-000003" / "process-0.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"process-0\.safetensors cannot be read"):
        run(capsys, tmp_path)
