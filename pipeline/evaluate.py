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

import json
import platform
from dataclasses import dataclass, field
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
from tieback.data.sources import HELPDESK, load_rows
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.model_loading import context_length, load_policy, load_tokenizer
from tieback.pipeline.ppo import load_reward
from tieback.pipeline.prompt_lengths import fit_prompts
from tieback.pipeline.report.gather import STAGES, write_facts, write_report
from tieback.pipeline.report.pairs import SYSTEMS, Pair, evaluation_figures, make_pairs
from tieback.pipeline.report.responses import reward_scores, sample_responses
from tieback.pipeline.sample_statistics import best_of_n, best_of_n_kl
from tieback.pipeline.stage import begin_stage, finish_stage
from tieback.pipeline.trainer.rewards import (
    RewardError,
    RewardFunction,
    call_reward_function,
    combine_rewards,
)
from tieback.pipeline.trainer.rollout import (
    Rollout,
    decode_completions,
    encode_prompts,
    end_token_ids,
    sampling_config,
)
from tieback.reward_model.scoring import RewardScorer

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
Judges = list[RewardFunction | RewardScorer]


@dataclass
class EvaluateArguments:
    """What is compared, on which prompts, and who judges.

    Args:
        dataset_name: "helpdesk", a local file, or a hub data set; preference data and demonstrations give their prompts.
        dataset_config: configuration of a hub data set.
        dataset_test_split: the part that no other stage has read. A file has no split of its own for that: leave its
            end to this stage ("train[90%:]") and its beginning to the others ("train[:90%]").
        num_prompts: prompts at most, drawn with the seed where there are more.
        max_prompt_length: longer prompts (in tokens) are left out and counted; refused where not set.
        sft_model_path: instead of `<run_dir>/sft`.
        ppo_model_path: instead of `<run_dir>/ppo`.
        reward_model_path: instead of `<run_dir>/reward`; "none" to go without a reward model.
        gold_funcs: functions (`module:function`) or reward models (folder or hub name) whose sum is the gold score.
        temperature: of sampling; the KL is that of the distributions at this temperature.
        max_completion_length: most tokens in a response.
        stop_tokens: tokens that end a response besides the EOS ids of model, tokenizer and chat template.
        batch_size: prompts of a process in one forward pass.
        dtype: of the policies' weights.
        num_resamples: resamples of the bootstrap.
        num_examples: pairs drawn at random for the page.
        best_of: responses of SFT to each prompt from which the best by the reward model is chosen, for the frontier that
            the page compares PPO with; 0 for none.
        pong_dir: a Pong run whose diagnostics the page shows beside this run's, where it exists.
        seed: of the choice of prompts, the sampling and the bootstrap.
        output_dir: instead of `<run_dir>/evaluate`.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "helpdesk, a local file, or a hub data set."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "The part that no other stage has read."}
    )
    num_prompts: int = field(default=300, metadata={"help": "Prompts at most."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out prompts of more tokens."}
    )
    sft_model_path: str | None = field(default=None, metadata={"help": "Instead of <run_dir>/sft."})
    ppo_model_path: str | None = field(default=None, metadata={"help": "Instead of <run_dir>/ppo."})
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Instead of <run_dir>/reward; none for none."}
    )
    gold_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Functions (module:function) or reward models whose sum is the gold score."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the KL."})
    max_completion_length: int = field(default=128, metadata={"help": "Most tokens in a response."})
    stop_tokens: list[str] | None = field(
        default=None, metadata={"help": "Further tokens that end a response."}
    )
    batch_size: int = field(default=64, metadata={"help": "Prompts of a process in one forward pass."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto."})
    num_resamples: int = field(
        default=10_000, metadata={"help": "Resamples of the bootstrap; 2,000 or more."}
    )
    num_examples: int = field(default=12, metadata={"help": "Pairs drawn at random for the page."})
    best_of: int = field(
        default=0, metadata={"help": "Responses of SFT a prompt for the best-of-n frontier; 0 for none."}
    )
    pong_dir: str = field(default="runs/pong", metadata={"help": "A Pong run to show beside this one."})
    seed: int = field(default=0, metadata={"help": "Of prompts, sampling and bootstrap."})
    output_dir: str | None = field(default=None, metadata={"help": "Instead of <run_dir>/evaluate."})

    def __post_init__(self) -> None:
        least = {
            "num_prompts": 1,
            "max_completion_length": 1,
            "batch_size": 1,
            "num_examples": 0,
            "best_of": 0,
            "num_resamples": 2000,
        }
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise UsageError(f"{name} must be at least {limit}, not {getattr(self, name)}.")
        if self.temperature <= 0:
            raise UsageError(
                f"temperature must be above 0, not {self.temperature}: greedy decoding has no KL."
            )


def main() -> None:
    """Run the stage."""
    begin_stage()
    run, args = parse_stage("evaluate", (RunArguments, EvaluateArguments))
    accelerator = Accelerator()
    folders = model_folders(run, args)
    tokenizer = shared_tokenizer(folders)
    policies = {
        name: load_policy(folders[name], tokenizer, ModelConfig(dtype=args.dtype))
        .to(accelerator.device)
        .eval()
        for name in SYSTEMS
    }
    dataset, num_left_out = load_prompts(args, tokenizer, policies)
    gold = [
        load_judge(name, args.batch_size, accelerator.device, "gold_funcs") for name in args.gold_funcs or []
    ]
    reward_model = load_reward_model(folders, args.batch_size, accelerator.device)
    try_judges(gold, dataset, tokenizer)

    rollouts: dict[str, Rollout] = {}
    log_ratios: list[float] = []
    choices: Rollout | None = None
    scores: dict[str, dict[str, list[float]]] = {}
    with accelerator.autocast():
        for name, policy in policies.items():
            end_ids = end_token_ids(tokenizer, policy.generation_config, args.stop_tokens)
            config = sampling_config(
                args.temperature, args.max_completion_length, end_ids, tokenizer.pad_token_id
            )
            reference = policies["sft"] if name == "ppo" else None
            rollouts[name], log_ratios = sample_responses(
                policy, dataset, tokenizer, config, args.batch_size, args.seed, name, reference
            )
            if name == "sft" and args.best_of and reward_model is not None:
                repeated = dataset.select([row for row in range(len(dataset)) for _ in range(args.best_of)])
                choices, _ = sample_responses(
                    policy, repeated, tokenizer, config, args.batch_size, args.seed, "best of n"
                )
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
            "num_prompts/left_out": num_left_out
        }
        write_samples(Path(args.output_dir), pairs)
        frontier = best_of_n_frontier(scores, args.best_of) if choices is not None else []
        write_facts(Path(args.output_dir), report_facts(run, args, folders, judge, frontier))
        finish_stage("evaluate", args.output_dir, metrics, run.recipe)
        accelerator.print(f"The page to read: {write_report(Path(args.output_dir))}")
    # A process that leaves while another still works takes the connection down with it.
    accelerator.wait_for_everyone()
    accelerator.end_training()


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
    return {stage: path or str(run.require(stage, "metrics.json").parent) for stage, path in named.items()}


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


def load_prompts(
    args: EvaluateArguments, tokenizer: PreTrainedTokenizerBase, policies: dict[str, PreTrainedModel]
) -> tuple[Dataset, int]:
    """Held-out prompts that fit both policies, and how many were left out for their length.

    Raises:
        UsageError: no data set is named, or prompts are too long.
    """
    if args.dataset_name is None:
        raise UsageError(
            "Name the prompts with --dataset_name (or `make evaluate DATA=...`): a file, or a hub data set."
        )
    dataset = load_rows(
        args.dataset_name,
        "prompts",
        split=args.dataset_test_split,
        config=args.dataset_config,
        # The built-in world makes as many as are asked for; of a source with an order of its own, some are drawn below.
        max_rows=args.num_prompts if args.dataset_name == HELPDESK else None,
        seed=args.seed,
    ).dataset
    contexts = [length for policy in policies.values() if (length := context_length(policy)) is not None]
    dataset, num_left_out = fit_prompts(
        dataset, tokenizer, min(contexts, default=None), args.max_completion_length, args.max_prompt_length
    )
    if len(dataset) > args.num_prompts:
        dataset = dataset.shuffle(seed=args.seed).select(range(args.num_prompts))
    return dataset, num_left_out


def load_judge(
    name: str, batch_size: int, device: torch.device, setting: str
) -> RewardFunction | RewardScorer:
    """Import the function `module:function`, or load the reward model in a folder or of the hub on `device`."""
    judge = load_reward(name, batch_size, setting)
    if isinstance(judge, RewardScorer):
        judge.model.to(device)
    return judge


def load_reward_model(folders: dict[str, str], batch_size: int, device: torch.device) -> RewardScorer | None:
    """Load the reward model, unless it is left out.

    Raises:
        UsageError: `reward_model_path` names a function.
    """
    if "reward" not in folders:
        return None
    judge = load_judge(folders["reward"], batch_size, device, "reward_model_path")
    if not isinstance(judge, RewardScorer):
        raise UsageError(
            f"reward_model_path: {folders['reward']} is a function; name functions in gold_funcs."
        )
    return judge


def try_judges(gold: Judges, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Call each gold judge on the first prompt with an empty response: a fault shows before compute is spent.

    Raises:
        UsageError: it raises, or returns something that is no score.
    """
    row, end = dataset[0], [tokenizer.eos_token_id]
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    (completion,) = decode_completions([row["prompt"]], [[]], tokenizer)
    trial = Rollout(
        [row["prompt"]], columns, encode_prompts([row["prompt"]], tokenizer), [end], [False], [completion]
    )
    try:
        for judge in gold:
            call_reward_function(judge, trial)
    except RewardError as error:
        raise UsageError(f"gold_funcs: {error}") from error


def gold_scores(gold: Judges, rollout: Rollout) -> list[float]:
    """Sum of the gold judges' scores of each response.

    Raises:
        UsageError: a judge raises, returns the wrong number of scores, or none judges some response.
    """
    try:
        scores = torch.tensor([call_reward_function(judge, rollout) for judge in gold], dtype=torch.float64)
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
