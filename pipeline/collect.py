"""Collect responses: K samples a prompt from the newest policy (at first the SFT model), ranked by the simulated annotator or left for people.

Sampling is from the model's own distribution (no top-k, no top-p) at a temperature. It can be interrupted at any
moment, kill -9 included: the same command goes on where it stopped, and ends with the file of an uninterrupted run.

    accelerate launch pipeline/collect.py
    accelerate launch pipeline/collect.py --config pipeline/recipes/hh/collect.yaml --dataset_name pairs.jsonl.gz

Writes `<run_dir>/collect/responses.jsonl`, metrics.json and, with `annotator: simulated`, `preferences.jsonl`: all pairs
of every ranking, with the `prompt_id` that keeps those of one prompt together.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from tieback.cli.errors import UsageError, run
from tieback.data.conversations import last_text
from tieback.data.helpdesk import annotate, gold_reward
from tieback.data.rankings import ranking_to_pairs
from tieback.data.sources import load_rows
from tieback.pipeline import response_files
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.model_loading import (
    check_chat_template,
    context_length,
    load_policy,
    load_tokenizer,
    stop_token_ids,
)
from tieback.pipeline.prompt_lengths import fit_prompts
from tieback.pipeline.stage import begin_stage, finish_stage
from tieback.pipeline.trainer.rollout import decode_completions, encode_prompts, sample, sampling_config


@dataclass
class CollectArguments:
    """What is asked, of which model, and who ranks the answers.

    Args:
        output_dir: folder of the responses; `<run_dir>/collect` when None.
        model_name_or_path: the model that answers; when None `<run_dir>/sft`, after round 1 the PPO model of the last.
        dtype: of its weights.
        dataset_name: "helpdesk", a local file, or a hub data set; its prompts are used.
        dataset_config: configuration of a hub data set.
        dataset_train_split: its split.
        max_rows: prompts at most.
        max_prompt_length: prompts of more tokens are left out, and counted; None refuses those that do not fit.
        num_responses: K, responses a prompt.
        max_new_tokens: length of a response at most; one cut off there is marked as truncated.
        temperature: of sampling.
        batch_size: prompts in a batch, which has K times as many sequences.
        annotator: "simulated" ranks help-desk responses by the gold judge with a person's errors; "none" does not.
        seed: of the prompts' choice, of sampling and of the annotator.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the responses; <run_dir>/collect."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Who answers; <run_dir>/sft, later the round before's PPO."}
    )
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "helpdesk, a local file, or a hub data set."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    max_rows: int | None = field(default=None, metadata={"help": "Prompts at most."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out prompts of more tokens."}
    )
    num_responses: int = field(default=4, metadata={"help": "Responses a prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of a response at most."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    batch_size: int = field(default=64, metadata={"help": "Prompts in a batch."})
    annotator: str = field(default="none", metadata={"help": "Who ranks.", "choices": ["simulated", "none"]})
    seed: int = field(default=0, metadata={"help": "Of prompts, sampling and annotator."})

    def __post_init__(self) -> None:
        if self.num_responses < 1 or self.batch_size < 1 or self.max_new_tokens < 1 or self.temperature <= 0:
            raise UsageError("num_responses, batch_size, max_new_tokens and temperature must be positive.")
        if self.annotator == "simulated" and self.num_responses < 2:
            raise UsageError("A ranking needs num_responses of 2 or more.")


def main() -> None:
    """Run the stage."""
    begin_stage("collect")
    run, args = parse_stage("collect", (RunArguments, CollectArguments))
    started = time.perf_counter()
    state, folder = PartialState(), Path(args.output_dir)
    ranked = folder / "preferences.jsonl"
    if args.annotator == "none" and ranked.exists():
        raise UsageError(
            f"{ranked} holds rankings of an earlier run, which the reward model would learn from: remove it to have "
            "people rank, or name another --run_dir."
        )
    args.seed += run.round - 1  # other prompts, or at least other responses, than the rounds before
    path = args.model_name_or_path or str(newest_policy(run))
    tokenizer = load_tokenizer(path)
    model = load_policy(path, tokenizer, ModelConfig(dtype=args.dtype)).to(state.device).eval()
    prompts, left_out = load_prompts(args, tokenizer, model)
    batches = in_groups(range(len(prompts)), args.batch_size)
    batch_ids = [[prompts[row]["prompt_id"] for row in rows] for rows in batches]

    done: list[Any] = [None]
    if state.is_main_process:
        response_files.claim_folder(folder, sampling_settings(args, path))
        done = [response_files.compact(folder, batch_ids)]
    broadcast_object_list(done)
    left = [index for index in range(len(batches)) if index not in done[0]]
    mine = left[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(len(batches[index]) for index in mine),
        desc="collect",
        unit="prompt",
        disable=not state.is_main_process,
    ) as progress:
        for index in mine:
            rows = respond(model, tokenizer, prompts.select(batches[index]), args, index)
            response_files.append(folder, state.process_index, rows)
            progress.update(len(rows))
    state.wait_for_everyone()

    if state.is_main_process:
        response_files.compact(folder, batch_ids)
        metrics = summarize(response_files.read_rows(folder), folder, args)
        metrics |= {f"num_prompts/{reason}": count for reason, count in left_out.items()}
        metrics["collect/seconds"] = time.perf_counter() - started
        finish_stage("collect", folder, metrics, run.recipe)
    state.wait_for_everyone()


def newest_policy(run: RunArguments) -> Path:
    """Folder of the policy that the round before made; of the SFT model in the first round.

    Raises:
        UsageError: it is not there.
    """
    if run.round == 1:
        return run.require("sft", "metrics.json").parent
    return run.require("ppo", "metrics.json", run.round - 1).parent


def load_prompts(
    args: CollectArguments, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Dataset, dict[str, int]]:
    """Prompts that fit the model, each with a `prompt_id`, and how many were left out for which reason.

    Raises:
        UsageError: no data set is named, the annotator cannot judge it, or prompts are too long.
    """
    if args.dataset_name is None:
        raise UsageError(
            "Name the prompts with --dataset_name (or `make collect DATA=...`): a file, or a hub data set."
        )
    rows = load_rows(
        args.dataset_name,
        "prompts",
        split=args.dataset_train_split,
        config=args.dataset_config,
        max_rows=args.max_rows,
        seed=args.seed,
    )
    prompts = rows.dataset
    check_chat_template(tokenizer, prompts[0], None)
    if args.annotator == "simulated" and not {"family", "answer"} <= set(prompts.column_names):
        raise UsageError(
            f"annotator: simulated judges the help desk's questions by their columns family and answer, which "
            f"{args.dataset_name} does not have. Set annotator: none, and let people rank the responses."
        )
    prompts, num_left_out = fit_prompts(
        prompts, tokenizer, context_length(model), args.max_new_tokens, args.max_prompt_length
    )
    if "prompt_id" not in prompts.column_names:
        prompts = prompts.add_column("prompt_id", [f"{row:06d}" for row in range(len(prompts))])
    elif len(set(prompts["prompt_id"])) < len(prompts):
        raise UsageError(f"{args.dataset_name}: two prompts have the same prompt_id. Make them unique.")
    return prompts, {
        "left_out": num_left_out,
        **{f"dropped_{name}": count for name, count in rows.dropped.items()},
    }


def sampling_settings(args: CollectArguments, path: str) -> dict[str, Any]:
    """Everything that the responses depend on."""
    names = (
        *("dataset_name", "dataset_config", "dataset_train_split", "max_rows", "max_prompt_length"),
        *("num_responses", "max_new_tokens", "temperature", "batch_size", "seed", "dtype"),
    )
    return {name: getattr(args, name) for name in names} | {"model": response_files.weights_digest(path)}


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    args: CollectArguments,
    batch_index: int,
) -> list[dict[str, Any]]:
    """Sample the responses to one batch of prompts, with random numbers of its own.

    Returns:
        A row of `responses.jsonl` for each prompt.
    """
    torch.manual_seed(args.seed * 1_000_003 + batch_index)
    repeated = [prompt for prompt in prompts["prompt"] for _ in range(args.num_responses)]
    config = sampling_config(
        args.temperature, args.max_new_tokens, stop_token_ids(model, tokenizer), tokenizer.pad_token_id
    )
    completion_ids, truncated = sample(
        model, encode_prompts(repeated, tokenizer), config, len(repeated), model.device
    )
    texts = [last_text(completion) for completion in decode_completions(repeated, completion_ids, tokenizer)]
    return [
        {
            **{
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "responses": responses,
                "truncated": cut,
            },
            **{name: value for name, value in row.items() if name not in ("prompt_id", "prompt")},
        }
        for row, responses, cut in zip(
            prompts,
            in_groups(texts, args.num_responses),
            in_groups(truncated, args.num_responses),
            strict=True,
        )
    ]


def in_groups(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive groups of `size` items, the last one maybe shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def summarize(rows: list[dict[str, Any]], folder: Path, args: CollectArguments) -> dict[str, float]:
    """Count what was collected and, with the simulated annotator, rank it and write `preferences.jsonl`."""
    responses = [response for row in rows for response in row["responses"]]
    metrics: dict[str, float] = {
        "num_prompts": len(rows),
        "num_responses": len(responses),
        "truncated_fraction": fmean(cut for row in rows for cut in row["truncated"]),
        "response_length/mean": fmean(map(len, responses)),
    }
    if args.annotator == "none":
        return metrics
    golds = [gold_totals(row) for row in rows]
    pairs, agreements = [], []
    for row, totals in zip(rows, golds, strict=True):
        ranks, annotator = annotate(totals, args.seed, row["prompt_id"])
        pairs += ranking_to_pairs({**row, "ranks": ranks, "annotator": annotator})
        agreements += agreement_with_gold(ranks, totals)
    response_files.write_rows(folder / "preferences.jsonl", pairs)
    metrics |= {
        "num_pairs": len(pairs),
        "gold_score/mean": fmean(total for totals in golds for total in totals),
    }
    if agreements:
        metrics["agreement/gold"] = fmean(agreements)
    return metrics


def gold_totals(row: dict[str, Any]) -> list[float]:
    """Gold score of each response to a help-desk question."""
    count = len(row["responses"])
    columns = {"family": [row["family"]] * count, "answer": [row["answer"]] * count}
    return gold_reward([row["prompt"]] * count, row["responses"], **columns)


def agreement_with_gold(ranks: list[int], gold: list[float]) -> list[bool]:
    """Whether the ranking orders each pair as the gold judge does, over pairs that the judge does not tie."""
    return [
        (ranks[i] < ranks[j]) == (gold[i] > gold[j])
        for i, j in combinations(range(len(ranks)), 2)
        if gold[i] != gold[j]
    ]


if __name__ == "__main__":
    run(main)
