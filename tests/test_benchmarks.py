"""The benchmarks: turns, figures, and that the models and lengths are what the tables say."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import ablations, memory_estimate, overoptimization, pages, side_by_side
from benchmarks.pong_learning import Run, figures_of, mean_curve
from benchmarks.side_by_side import ours, peer, take_turns, tell
from tieback.pipeline.ppo import PPOArguments
from tieback.pipeline.report.judging import Evaluation
from tieback.pipeline.trainer import PPOConfig

ROOT = Path(__file__).parents[1]
WORKERS = ROOT / "benchmarks" / "workers"

# Writes its name into a file in each turn, and says a number that it counts up; in the turn `breaks` it raises.
COUNTING = f"""
import sys
sys.path.insert(0, {str(WORKERS)!r})
from protocol import Turns

name, file, breaks = sys.argv[1:]
turns = Turns()
count = 0
while True:
    turns.wait()
    count += 1
    print("not a reply")
    if count == int(breaks):
        raise ValueError("out of luck")
    with open(file, "a") as log:
        log.write(name)
    turns.done(count=count)
"""


def counting(tmp_path: Path, name: str, breaks: int = 0) -> list[str]:
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    return [sys.executable, str(script), name, str(tmp_path / "order"), str(breaks)]


def test_workers_take_turns_and_the_warm_up_does_not_count(tmp_path: Path) -> None:
    found = take_turns({name: counting(tmp_path, name) for name in "ab"}, rounds=3, warm_up=2)
    assert (tmp_path / "order").read_text() == "ab" * 5
    assert {name: figures["count"] for name, figures in found.items()} == {"a": 4, "b": 4}  # of 3, 4 and 5
    assert all(0 < figures["cpu"] < 5 and figures["memory"] > 1 for figures in found.values())


def test_a_worker_that_fails_is_named_with_its_own_words(tmp_path: Path) -> None:
    workers = {"good": counting(tmp_path, "a"), "bad": counting(tmp_path, "b", breaks=2)}
    with pytest.raises(RuntimeError, match=r"(?s)worker bad ended.*ValueError: out of luck"):
        take_turns(workers, rounds=3)


def test_peers_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "PEERS", tmp_path / "python")
    with pytest.raises(SystemExit, match=r"python is missing: run `make bench-setup` first"):
        peer("trl_ppo.py")


def test_the_file_holds_flat_figures_and_the_machine(tmp_path: Path) -> None:
    tell({"ratio/sb3": 2.5}, 1, str(tmp_path / "figures.json"))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found.pop("machine")
    assert found == {"ratio/sb3": 2.5}


def in_workers(code: str) -> Any:
    """What `code`, run where the workers' modules are, prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=WORKERS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_case_of_varied_lengths_has_the_lengths_that_it_says() -> None:
    """EOS with a chance of 1/16 at each token, whatever came before; and a token of text is a token of the model."""
    found = in_workers("""
import json, torch
from llm_world import WORLDS, make_policy, make_tokenizer, prompts, EOS
world = WORLDS["varied"]
policy, tokenizer = make_policy(world), make_tokenizer(world)
ids = torch.randint(2, world.vocab_size, (8, 20))
with torch.no_grad():
    chances = policy(ids).logits.softmax(-1)[..., EOS]
texts = prompts(world)
lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
same = all(tokenizer(tokenizer.decode(tokenizer(t)["input_ids"]))["input_ids"] == tokenizer(t)["input_ids"] for t in texts)
equal = make_policy(WORLDS["equal"])
with torch.no_grad():
    never = equal(ids).logits.softmax(-1)[..., EOS]
print(json.dumps([chances.mean().item(), chances.std().item(), min(lengths), max(lengths), same, never.max().item()]))
""")
    mean, spread, shortest, longest, same, never = found
    assert mean == pytest.approx(1 / 16, rel=0.1)
    assert spread < 0.05 * mean
    assert (shortest, longest) == (8, 64)
    assert same
    assert never < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tieback_ppo.py", ["varied", "fp32", 1, "shared"]),
        ("tieback_ppo.py", ['{"rows": 32, "num_layers": 2}', "fp32", 1, "separate"]),
        ("floor_ppo.py", ["varied", "fp32", 1]),
        ("tieback_pong.py", ["fp32", 1]),
        ("floor_pong.py", ["fp32", 1]),
    ],
)
def test_our_workers_do_an_iteration(script: str, arguments: list[Any]) -> None:
    found = take_turns({"ours": ours(script, *arguments)}, rounds=1, warm_up=0)["ours"]
    assert found["cpu"] > 0.1
    phases = [value for name, value in found.items() if name.startswith("time/")]
    assert not phases or 0.9 < sum(phases) / found["wall"] < 1.01
    if "own" in found:
        assert found["memory"] > found["own"] > 100


@pytest.mark.slow
def test_a_skewed_batch_is_computed_with_little_padding() -> None:
    found = take_turns({"ours": ours("skewed_tokens.py", torch.get_num_threads())}, rounds=1, warm_up=0)[
        "ours"
    ]
    assert 1 < found["skewed_tokens"] < 1.3


def test_when_pong_was_learnt_and_the_mean_of_several_runs() -> None:
    quick = Run([(99_000, 60.0, -20.0), (201_000, 120.0, 18.0), (299_000, 180.0, 19.0)], {})
    slow = Run([(100_000, 90.0, -21.0), (200_000, 180.0, 17.9), (300_000, 270.0, 17.0)], {})
    assert figures_of(quick) == {"steps/to_18": 201_000, "minutes/to_18": 2.0}
    assert figures_of(slow) == {}
    ended = {
        "train/seconds": 600.0,
        "eval/mean_return": 20.5,
        "eval/min_return": 20.0,
        "eval/std_return": 0.5,
        "eval/episodes": 30.0,
    }
    assert figures_of(Run(slow.curve, ended)) == {
        "minutes/whole": 10.0,
        "eval/mean_return": 20.5,
        "eval/min_return": 20.0,
        "eval/std_return": 0.5,
    }
    found = mean_curve([quick.curve, slow.curve])
    assert {name: found[f"return/{name}"] for name in ("100k_mean", "200k_low", "300k_high")} == {
        "100k_mean": -20.5,
        "200k_low": 17.9,
        "300k_high": 19.0,
    }
    assert "return/400k_mean" not in found
    assert mean_curve([[(51_000, 60.0, -20.0)]]) == {}


@pytest.mark.parametrize(("name", "millions"), [("9m", 9), ("38m", 38), ("135m", 135)])
def test_the_models_of_the_memory_table_are_as_large_as_they_are_called(name: str, millions: int) -> None:
    with torch.device("meta"):
        config = LlamaConfig(
            **memory_estimate.SIZES[name], vocab_size=memory_estimate.VOCABULARY, tie_word_embeddings=True
        )
        assert round(LlamaForCausalLM(config).num_parameters() / 1e6) == millions


def test_what_is_measured_of_a_program_is_not_what_its_parent_holds() -> None:
    own = psutil.Process().memory_info().rss / 2**20  # with torch in it
    assert memory_estimate.run([sys.executable, "-c", "pass"], os.environ).peak_mib < 50 < own
    with pytest.raises(RuntimeError, match="no such thing"):
        memory_estimate.run([sys.executable, "-c", "raise SystemExit('no such thing')"], os.environ)


@pytest.mark.slow
def test_what_is_alive_in_a_run_is_what_was_estimated(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    memory_estimate.main(memory_estimate.parse(["--sizes", "9m", "--json", str(written)]))
    figures = json.loads(written.read_text())
    for kind in ("whole", "lora"):
        assert 0.75 < figures[f"ratio/given_back_9m_{kind}"] < 1.33
        assert figures[f"kept_mib/9m_{kind}"] > 0.95 * figures[f"given_back_mib/9m_{kind}"]


def test_over_optimisation_is_told_by_where_the_judge_was_highest_and_where_each_run_ended(
    tmp_path: Path,
) -> None:
    plain = [Evaluation(5, 1.0, 0.2, 0.7), Evaluation(10, 4.0, 0.6, 0.9), Evaluation(15, 9.0, 1.1, 0.5)]
    found = {"plain": plain, "guarded": [*plain[:2], Evaluation(15, 6.0, 0.8, 0.8)]}
    assert overoptimization.figures_of(found) == {
        "training/judge_best": 0.9,
        "training/iteration_of_best": 10,
        "training/judge_at_the_end": 0.5,
        "training/reward_at_best": 0.6,
        "training/reward_at_the_end": 1.1,
        "training/kl_at_the_end": 9.0,
        "training/iterations_guarded": 15,
        "training/judge_kept": 0.9,
    }
    overoptimization.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def ablated(judge: float) -> ablations.Training:
    return ablations.Training([Evaluation(10, 1.0, 0.1, 0.5), Evaluation(20, 2.0, 0.2, judge)], judge / 2)


def test_ablations_are_told_by_their_last_evaluations_over_the_seeds(tmp_path: Path) -> None:
    found = {name: [ablated(0.8), ablated(0.6), ablated(0.7)] for name in ablations.variants()}
    figures = ablations.figures_of(found)
    assert figures["base/judge"] == pytest.approx(0.7)
    assert (figures["base/judge_lowest"], figures["base/judge_highest"]) == (0.6, 0.8)
    assert figures["λ: 1/explained_variance"] == pytest.approx(0.35)
    args = ablations.parse(["--iterations", "20"])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    for _ in range(2):  # it can be written again
        pages.replace_table(page, ablations.table(found, args))
    text = page.read_text()
    assert "old" not in text
    assert "| base | 0.70 (0.60 to 0.80) | 0.20 | 2.00 | 0.35 |" in text
    assert text.startswith("before\n<!-- table -->\n20 iterations, seeds 0, 1, 2;")
    assert text.endswith("|\n<!-- end of table -->\nafter\n")
    page.write_text("no marks")
    with pytest.raises(SystemExit, match=r"page\.md: one line `<!-- table -->`"):
        pages.replace_table(page, "")
    ablations.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_each_ablation_changes_settings_that_there_are_and_away_from_the_base() -> None:
    recipe = yaml.safe_load((ROOT / "pipeline" / "recipes" / "helpdesk" / "ppo.yaml").read_text())
    defaults = {field.name: field.default for kind in (PPOConfig, PPOArguments) for field in fields(kind)}
    base_settings = ablations.variants()[ablations.BASE]
    base = defaults | recipe
    assert all(yaml.safe_load(value) != base[setting] for setting, value in base_settings.items())
    base |= {setting: yaml.safe_load(value) for setting, value in base_settings.items()}
    for subject, names in ablations.SUBJECTS.items():
        for name, settings in names.items():
            assert set(settings) <= set(defaults)
            assert all(yaml.safe_load(value) != base[setting] for setting, value in settings.items())
            assert ablations.variants()[f"{subject}: {name}"] == base_settings | settings
