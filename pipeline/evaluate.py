"""Evaluation: the PPO policy against the SFT model that it started from, on prompts that no stage has seen.

Samples one response of each to each prompt, scores both with a gold judge (`gold_funcs`: functions with TRL's
reward-function signature, or other reward models) and with the reward model, and reports the paired win rate with a
bootstrap interval, the KL between the two, lengths and diversity. The gold judge decides the win rate; where there is
none, the reward model does.

    accelerate launch pipeline/evaluate.py
    accelerate launch pipeline/evaluate.py --config pipeline/recipes/hh/evaluate.yaml --dataset_name pairs.jsonl.gz

Reads `<run_dir>/sft`, `<run_dir>/ppo` and `<run_dir>/reward`; writes metrics.json, samples.jsonl (every pair) and
report.html (self-contained) into `<run_dir>/evaluate`. It trains nothing, and every process holds all models whole.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("evaluate")  # before the imports of a run

import json
import platform
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from tieback.cli.errors import UsageError, run
from tieback.data.worlds import WORLDS
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.digests import rows_digest, weights_digest
from tieback.pipeline.finished import PLACES, is_finished
from tieback.pipeline.model_loading import context_length, load_policy, load_tokenizer, load_whole
from tieback.pipeline.prompts import load_prompts
from tieback.pipeline.pypi_models import folder_of
from tieback.pipeline.report.gather import STAGES, write_facts, write_report
from tieback.pipeline.report.pairs import SYSTEMS, Pair, evaluation_figures, make_pairs
from tieback.pipeline.rollout.responses import reward_scores, sample_responses
from tieback.pipeline.rollout.sampler import Completion, make_sampler
from tieback.pipeline.rollout.settings import RolloutSettings, settings_of_policy
from tieback.pipeline.rollout.texts import Rollout, encode_prompts, make_rollout
from tieback.pipeline.sample_statistics import best_of_n, best_of_n_kl
from tieback.pipeline.scorers import (
    RewardError,
    Scorer,
    call_scorers,
    check_call,
    combine_rewards,
    load_reward_scorer,
    load_scorer,
)
from tieback.pipeline.settings.evaluate import DATACLASS_TYPES, EvaluateArguments
from tieback.pipeline.stage import finish_stage, quiet_libraries

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")


def main() -> None:
    """Run the stage."""
    started = time.perf_counter()
    quiet_libraries()
    run, args = parse_stage("evaluate", DATACLASS_TYPES)
    accelerator = Accelerator()
    load_whole()
    output_dir = Path(args.output_dir)
    folders = model_folders(run, args)
    args = with_settings_of_policy(args, folders["ppo"], run.recipe)
    args.gold_funcs = [run.within(name) for name in args.gold_funcs or []]
    tokenizer = shared_tokenizer(folders)
    policies = {
        name: load_policy(folders[name], tokenizer, ModelConfig(dtype=args.dtype))
        .to(accelerator.device)
        .eval()
        for name in SYSTEMS
    }
    dataset, num_left_out = held_out_prompts(args, tokenizer, policies)
    rollout_settings = {item.name: getattr(args, item.name) for item in fields(RolloutSettings)}
    digests = {stage: weights_digest(path) for stage, path in folders.items()}
    settings = run.recipe | rollout_settings | {"models": digests, "prompts": rows_digest(dataset)}
    if is_finished(output_dir, settings, run.overwrite, free=PLACES):
        if accelerator.is_main_process:  # with what people have judged since
            print(f"The page to read: {write_report(output_dir)}")
        return
    device = accelerator.device
    gold = [load_scorer(name, args.batch_size, "gold_funcs", device) for name in args.gold_funcs]
    reward_model = None
    if "reward" in folders:
        reward_model = load_reward_scorer(folders["reward"], args.batch_size, "reward_model_path", device)
        check_call([reward_model], "the prompts", dataset)
    try_judges(gold, dataset, tokenizer, args)

    rollouts: dict[str, Rollout] = {}
    log_ratios: list[float] = []
    choices: Rollout | None = None
    scores: dict[str, dict[str, list[float]]] = {}
    # Both until the end: an engine of vLLM that goes takes the process group with it.
    samplers = {
        name: make_sampler(args, tokenizer, policy.generation_config, device)
        for name, policy in policies.items()
    }
    with accelerator.autocast():
        for name, policy in policies.items():
            sampler = samplers[name]
            how = (tokenizer, args, args.batch_size, args.seed)
            reference = policies["sft"] if name == "ppo" else None
            rollouts[name], log_ratios = sample_responses(policy, sampler, dataset, *how, name, reference)
            if name == "sft" and args.best_of and reward_model is not None:
                repeated = dataset.select([row for row in range(len(dataset)) for _ in range(args.best_of)])
                choices, _ = sample_responses(policy, sampler, repeated, *how, "best of n")
        if reward_model is not None:
            to_score = rollouts | ({"choices": choices} if choices is not None else {})
            scores["reward_score"] = {
                name: reward_scores(reward_model, rollout) for name, rollout in to_score.items()
            }
    if accelerator.is_main_process:
        if gold:
            scores["gold_score"] = {name: gold_scores(gold, rollouts[name]) for name in SYSTEMS}
            if choices is not None:
                scores["gold_score"]["choices"] = gold_scores(gold, choices)
        judge = "gold_score" if gold else "reward_score"
        pairs = make_pairs(rollouts, scores, log_ratios, judge)
        metrics = evaluation_figures(pairs, judge, args.num_resamples, args.seed) | {
            "num_prompts/left_out": num_left_out,
            "evaluate/seconds": time.perf_counter() - started,
        }
        write_samples(output_dir, pairs)
        frontier = best_of_n_frontier(scores, args.best_of) if choices is not None else []
        write_facts(output_dir, report_facts(run, args, folders, judge, frontier))
        finish_stage("evaluate", output_dir, metrics, settings)
        accelerator.print(f"The page to read: {write_report(output_dir)}")
    accelerator.wait_for_everyone()


def model_folders(run: RunArguments, args: EvaluateArguments) -> dict[str, str]:
    """Folder (or hub name) of `sft`, `ppo` and, unless it is to be left out, `reward`.

    Raises:
        UsageError: a stage has not come to its end, or neither a gold judge nor a reward model is named.
    """
    named = {"sft": args.sft_model_path, "ppo": args.ppo_model_path, "reward": args.reward_model_path}
    if named["reward"] == "none":
        del named["reward"]
        if not args.gold_funcs:
            raise UsageError("Nothing would judge the responses: name gold_funcs, or a reward_model_path.")
    return {
        stage: folder_of(path) if path else str(run.require(stage, "metrics.json").parent)
        for stage, path in named.items()
    }


def shared_tokenizer(folders: dict[str, str]) -> PreTrainedTokenizerBase:
    """Load the SFT model's tokenizer, which serves both policies.

    Raises:
        UsageError: the PPO model has another vocabulary, so that no KL between the two exists.
    """
    tokenizer, other = load_tokenizer(folders["sft"]), load_tokenizer(folders["ppo"])
    if tokenizer.get_vocab() != other.get_vocab():
        raise UsageError(
            f"{folders['ppo']} has another vocabulary than {folders['sft']}: it was not trained from that model, and no "
            "KL between the two exists. Name the model that it was trained from with sft_model_path."
        )
    return tokenizer


def with_settings_of_policy(
    args: EvaluateArguments, folder: str, recipe: dict[str, Any]
) -> EvaluateArguments:
    """Arguments with the rollout settings that the policy in `folder` was trained with, unless the recipe names them.

    Args:
        args: as they were parsed.
        folder: of the PPO policy.
        recipe: what the recipe and the command line set.
    """
    trained_with = settings_of_policy(folder)
    return replace(args, **{name: value for name, value in trained_with.items() if name not in recipe})


def held_out_prompts(
    args: EvaluateArguments, tokenizer: PreTrainedTokenizerBase, policies: dict[str, PreTrainedModel]
) -> tuple[Dataset, int]:
    """Held-out prompts that fit both policies, and how many were left out for their length."""
    contexts = [length for policy in policies.values() if (length := context_length(policy)) is not None]
    prompts, counts = load_prompts(
        "evaluate",
        args.dataset_name,
        tokenizer,
        min(contexts, default=None),
        args,
        split=args.dataset_test_split,
        config=args.dataset_config,
        # The built-in world makes as many as are asked for; of a source with an order of its own, some are drawn below.
        max_rows=args.num_prompts if args.dataset_name in WORLDS else None,
        seed=args.seed,
    )
    if len(prompts) > args.num_prompts:
        prompts = prompts.shuffle(seed=args.seed).select(range(args.num_prompts))
    return prompts, counts["left_out"]


def try_judges(
    gold: list[Scorer], dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings
) -> None:
    """Call each gold judge on the first prompt with an empty response: a fault shows before compute is spent.

    Raises:
        UsageError: it raises, or returns something that is no score.
    """
    row = dataset[0]
    prompt_ids = encode_prompts([row["prompt"]], tokenizer, settings.template_arguments)
    empty = Completion([tokenizer.pad_token_id], truncated=False)
    trial = make_rollout([row], prompt_ids, [empty], tokenizer)
    try:
        call_scorers(gold, trial)
    except RewardError as error:
        raise UsageError(f"gold_funcs: {error}") from error


def gold_scores(gold: list[Scorer], rollout: Rollout) -> list[float]:
    """Sum of the gold judges' scores of each response.

    Raises:
        UsageError: a judge raises, returns the wrong number of scores, or none judges some response.
    """
    try:
        totals = [rewards.totals for rewards in call_scorers(gold, rollout)]
        scores = torch.tensor(totals, dtype=torch.float64)
        return combine_rewards(scores.T, [1.0] * len(gold), rollout).tolist()
    except RewardError as error:
        raise UsageError(f"gold_funcs: {error}") from error


def best_of_n_frontier(scores: dict[str, dict[str, list[float]]], best_of: int) -> list[dict[str, float]]:
    """What choosing the best of n responses of SFT by the reward model gives, for n = 1, 2, 4, … up to `best_of`.

    Args:
        scores: of the responses to choose from, under `choices`, `best_of` to each prompt.
        best_of: the largest n.

    Returns:
        `n`, `kl` (to SFT, in nats) and the mean `reward_score` and, where there is a gold judge, `gold_score`, for each n.
    """
    by_name = {name: np.reshape(values["choices"], (-1, best_of)) for name, values in scores.items()}
    return [
        {"n": n, "kl": best_of_n_kl(n)}
        | {name: best_of_n(by_name["reward_score"], values, n) for name, values in by_name.items()}
        for n in (2**power for power in range(best_of.bit_length()))
    ]


def report_facts(
    run: RunArguments,
    args: EvaluateArguments,
    folders: dict[str, str],
    judge: str,
    frontier: list[dict[str, float]],
) -> dict[str, Any]:
    """What the page says and the other files do not hold: see `pipeline.report.gather`."""
    names = ", ".join(args.gold_funcs or [])
    return {
        "judge": judge,
        "judge_name": f"the gold judge, {names}" if names else "the reward model, as no gold judge is named",
        "prompts_name": f"{Path(args.dataset_name or '').name}, split {args.dataset_test_split}",
        "stages": {stage: folders.get(stage, str(run.stage_dir(stage))) for stage in STAGES},
        "rounds": [str(run.stage_dir("evaluate", round)) for round in range(1, run.round)],
        "compare": str(run.stage_dir("compare") / "preferences.judgements.jsonl"),
        "pong": args.pong_dir,
        "frontier": frontier,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "num_examples": args.num_examples,
        "num_resamples": args.num_resamples,
        "seed": args.seed,
    }


def write_samples(output_dir: Path, pairs: list[Pair]) -> None:
    """Write samples.jsonl."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(pair, ensure_ascii=False, default=str) + "\n" for pair in pairs)
    (output_dir / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    run(main)
