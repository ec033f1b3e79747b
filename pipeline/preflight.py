"""Minutes before hours: what a short trial says of a run of PPO that has not been started.

    python -m tieback.pipeline.preflight --config helpdesk
    python -m tieback.pipeline.preflight --config lora --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl

Takes every setting of ppo.py, and reads what ppo.py reads. In the order of what costs least: the memory, by the estimate of
pipeline/memory.py; the prompts; completions of the model to start from, and what the judges say of them; two iterations at
the full learning rate, in which sampling is held against scoring; and whether the critic can fit a rollout. Writes
nothing. The exit status is 1 where a check failed.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("preflight", "ppo")  # before the imports of a run

import copy
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from transformers import SchedulerType
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import ModelConfig

from tieback.cli.errors import UsageError, run
from tieback.data.sources import load_rows
from tieback.data.worlds import WORLDS
from tieback.pipeline import preflight_checks as checks
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.memory import estimate_of, sizes_of
from tieback.pipeline.ppo import make_trainer, reward_names
from tieback.pipeline.preflight_checks import Finding, Verdict
from tieback.pipeline.rollout.texts import Rollout, encode_prompts
from tieback.pipeline.scorers import Scorer, call_scorers
from tieback.pipeline.settings import evaluate as evaluate_settings
from tieback.pipeline.settings.ppo import PPOArguments
from tieback.pipeline.settings.preflight import DATACLASS_TYPES
from tieback.pipeline.stage import quiet_libraries
from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.passes import row_lengths
from tieback.pipeline.trainer.ratio_checks import SelfCheckError
from tieback.pipeline.trainer.rewards import ScoredRollout
from tieback.ppo_core import explained_variance, update
from tieback.reward_model.scoring import RewardScorer

_ITERATIONS = 2
_CRITIC_EPOCHS = 8
# Completions that each judge scores once more, one at a time.
_ALONE = 8
_WIDTH = 42  # of the names of checks
_COLOURS = {Verdict.PASSED: "green", Verdict.LOOK: "yellow", Verdict.FAILED: "bold red"}


def main() -> None:
    """Check, print each finding as it is made, then all of them."""
    quiet_libraries()
    run_args, ppo_args, args, model_args, own_args = parse_stage(
        "ppo", DATACLASS_TYPES, writes=False, program="preflight"
    )
    if PartialState().num_processes > 1:
        raise UsageError("A preflight is made by one process: start it without a launcher.")
    found: list[Finding] = []
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        trial = _for_a_trial(args, folder)
        for finding in findings(run_args, ppo_args, trial, model_args, own_args.accelerate_config):
            _show(finding, console)
            found.append(finding)
    counts = Counter(finding.verdict for finding in found)
    console.print(
        f"{counts[Verdict.PASSED]} passed, {counts[Verdict.LOOK]} to look at, {counts[Verdict.FAILED]} failed"
    )
    if own_args.json is not None:
        entries = [{f.name: getattr(finding, f.name) for f in fields(Finding)} for finding in found]
        Path(own_args.json).write_text(
            json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    if any(finding.verdict == Verdict.FAILED for finding in found):
        sys.exit(1)


def findings(
    run_args: RunArguments,
    ppo_args: PPOArguments,
    args: PPOConfig,
    model_args: ModelConfig,
    accelerate_config: str | None,
) -> Iterator[Finding]:
    """Each finding, as soon as it is known; none after one that leaves no sense in going on.

    Raises:
        UsageError: as ppo.py would: something is missing, or cannot be used.
    """
    on_gpu = args.device.type == "cuda"
    available = torch.cuda.mem_get_info(args.device)[0] if on_gpu else psutil.virtual_memory().available
    if args.max_prompt_length is not None:  # before anything is loaded
        memory = _memory(run_args, ppo_args, args, model_args, accelerate_config, available)
        yield memory
        if memory.verdict == Verdict.FAILED:
            return
    trainer, num_left_out = make_trainer(run_args, ppo_args, args, model_args)
    if args.max_prompt_length is None:
        prompts = trainer.train_dataset["prompt"]
        prompt_ids = encode_prompts(prompts, trainer.processing_class, args.template_arguments)
        longest = max(map(len, prompt_ids))
        yield _memory(run_args, ppo_args, args, model_args, accelerate_config, available, longest)
    training = [_key(prompt) for prompt in trainer.train_dataset["prompt"]]
    yield checks.prompts_of_training(training, num_left_out)
    held_out = _held_out_prompts(run_args, ppo_args)
    if held_out is not None:
        yield checks.prompts_of_evaluation(training, held_out)
    for name in reward_names(ppo_args, run_args):
        yield from _preferences(name)

    rows = _first_rows(trainer)
    scored = trainer.score(trainer.generate(rows), training=False)
    texts = [_key(completion) for completion in scored.rollout.completions]
    yield checks.completions(
        texts, scored.rollout.truncated, args.max_completion_length, args.missing_eos_penalty
    )
    judgements = list(_judgements(trainer, scored))
    yield from judgements
    if any(finding.verdict == Verdict.FAILED for finding in judgements):
        return

    num_iterations = _num_iterations(args, len(training))
    args.max_steps = _ITERATIONS
    try:
        trainer.train()
    except SelfCheckError as error:
        yield Finding("sampling against scoring", Verdict.FAILED, str(error), "PPO's ratio would be wrong.")
        return
    yield Finding(
        "sampling against scoring", Verdict.PASSED, "the ratio is 1 before the first step, to rounding"
    )
    *_, last = (entry for entry in trainer.state.log_history if "policy/loss" in entry)
    yield checks.size_of_steps(last["policy/approx_kl"], last["policy/clip_fraction"])
    yield _critic(trainer, rows)
    seconds = sum(value for name, value in last.items() if name.startswith("time/"))
    yield checks.time_needed(seconds, num_iterations)


def _for_a_trial(args: PPOConfig, folder: str) -> PPOConfig:
    """The settings, without what a run of two iterations would write, wait for, or never get to."""
    args = copy.copy(args)
    args.output_dir = folder
    args.report_to = []
    args.save_strategy = SaveStrategy.NO
    args.eval_strategy = IntervalStrategy.NO
    args.load_best_model_at_end = False
    args.push_to_hub = False
    args.disable_tqdm = True
    args.log_completions = False
    args.logging_steps = 1
    args.lr_scheduler_type = SchedulerType.CONSTANT
    args.warmup_steps = 0
    args.critic_warmup_iterations = 0
    args.check_sampling = True
    return args


def _num_iterations(args: PPOConfig, num_prompts: int) -> int:
    """Iterations that the run will take."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * (num_prompts // args.train_batch_size))


def _memory(
    run_args: RunArguments,
    ppo_args: PPOArguments,
    args: PPOConfig,
    model_args: ModelConfig,
    accelerate_config: str | None,
    available: int,
    prompt_length: int | None = None,
) -> Finding:
    on_cpu = args.device.type == "cpu"
    sizes = sizes_of(args, prompt_length, on_cpu)
    try:
        estimate = estimate_of(run_args, ppo_args, args, model_args, sizes, accelerate_config)
    except UsageError as error:
        return Finding("memory", Verdict.LOOK, f"not known beforehand: {error}")
    return checks.memory_needed(estimate.peak, available, on_cpu)


def _key(text: Any) -> str:
    return text if isinstance(text, str) else json.dumps(text)


def _held_out_prompts(run_args: RunArguments, ppo_args: PPOArguments) -> list[str] | None:
    """The prompts that evaluate draws from, as its settings beside those of PPO say; None where there are none."""
    assert run_args.config_path is not None
    recipe = run_args.config_path.with_name("evaluate.yaml")
    if not recipe.is_file():
        return None
    _, evaluate = parse_stage(
        "evaluate", evaluate_settings.DATACLASS_TYPES, ["--config", str(recipe)], writes=False
    )
    # A source that the command line names is that of every stage.
    name = str(evaluate.dataset_name or ppo_args.dataset_name)
    rows = load_rows(
        name,
        "prompts",
        split=evaluate.dataset_test_split,
        config=evaluate.dataset_config,
        max_rows=evaluate.num_prompts if name in WORLDS else None,
        seed=evaluate.seed,
    )
    return [_key(prompt) for prompt in rows.dataset["prompt"]]


def _preferences(name: str) -> Iterator[Finding]:
    """What the reward stage found on its held-out pairs, of a reward model that has its figures beside it."""
    path = Path(name) / "metrics.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {"accuracy/held_out", "num_pairs/held_out"} <= figures.keys():
        yield checks.preference_of(name, figures["accuracy/held_out"], figures["num_pairs/held_out"])


def _first_rows(trainer: PPOTrainer) -> list[dict[str, Any]]:
    rows = trainer.train_dataset.select(range(min(trainer.args.train_batch_size, len(trainer.train_dataset))))
    return [row for row in rows for _ in range(trainer.args.num_generations)]


def _judgements(trainer: PPOTrainer, scored: ScoredRollout) -> Iterator[Finding]:
    rollout = scored.rollout
    lengths = [len(ids) for ids in rollout.completion_ids]
    for name, scorer, column in zip(trainer.reward_names, trainer.scorers, scored.rewards.T, strict=True):
        scores = column.tolist()
        yield checks.spread_of_scores(name, scores, lengths)
        few = range(min(_ALONE, len(rollout)))
        alone = [_score_alone(scorer, rollout, row) for row in few]
        spread = float(column[~column.isnan()].std(correction=0))
        yield checks.same_in_any_company(
            name, [scores[row] for row in few], alone, spread, isinstance(scorer, RewardScorer)
        )


def _score_alone(scorer: Scorer, rollout: Rollout, row: int) -> float:
    columns = {name: values[row : row + 1] for name, values in rollout.columns.items()}
    own = {f.name: getattr(rollout, f.name) for f in fields(Rollout) if f.name != "columns"}
    others = {name: values and values[row : row + 1] for name, values in own.items()}
    (((score,), _),) = call_scorers([scorer], Rollout(columns=columns, **others))
    return score


def _critic(trainer: PPOTrainer, rows: list[dict[str, Any]]) -> Finding:
    """Train the critic alone on one rollout: values that cannot follow its returns will follow none."""
    args, accelerator = trainer.args, trainer.accelerator
    scored = trainer.score(trainer.generate(rows), training=False)
    batch = trainer.to_batch(scored)
    hyper = copy.copy(args)
    hyper.num_ppo_epochs, hyper.value_clip_range, hyper.target_kl = _CRITIC_EPOCHS, None, None
    lengths = row_lengths(batch.inputs, args.micro_batch_size, accelerator.device)
    update(
        trainer.model_wrapped,
        trainer.optimizer,
        batch,
        hyper,
        accelerator,
        args.micro_batch_size or len(batch),
        value_only=True,
        lengths=lengths,
    )
    after = trainer.to_batch(scored).old_values
    before, fitted = (
        explained_variance(values, batch.returns, batch.mask).item() for values in (batch.old_values, after)
    )
    return checks.fit_of_critic(before, fitted, _CRITIC_EPOCHS)


def _show(finding: Finding, console: Console) -> None:
    text = f"{finding.check:<{_WIDTH}} {finding.found}"
    colour = _COLOURS[finding.verdict]
    console.print(f"[{colour}]{finding.verdict:<7}[/] {escape(text)}", highlight=False)
    if finding.advice:
        console.print(f"{'':<{8 + _WIDTH}} {escape(finding.advice)}", highlight=False)


if __name__ == "__main__":
    run(main)
