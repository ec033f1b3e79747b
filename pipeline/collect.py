"""Collect responses: K samples a prompt from the newest policy (at first the SFT model), ranked by simulated annotators or left for people.

Sampling is from the model's own distribution (no top-k, no top-p) at a temperature. It can be interrupted at any
moment, kill -9 included: the same command goes on where it stopped, and ends with the file of an uninterrupted run.

    accelerate launch pipeline/collect.py
    accelerate launch pipeline/collect.py --config pipeline/recipes/hh/collect.yaml --dataset_name pairs.jsonl.gz

Writes `<run_dir>/collect/responses.jsonl`, metrics.json and, with `annotator: simulated`, `preferences.jsonl`: all pairs
of every ranking, with the `prompt_id` that keeps those of one prompt together.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("collect")  # before the imports of a run

import time
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from tieback.cli.errors import UsageError, run
from tieback.data.conversations import last_text
from tieback.data.rankings import ranking_to_pairs
from tieback.data.worlds import WORLDS, World, world_of
from tieback.pipeline import response_files
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.digests import rows_digest, weights_digest
from tieback.pipeline.finished import PLACES, is_finished
from tieback.pipeline.model_loading import context_length, load_policy, load_tokenizer
from tieback.pipeline.prompts import load_prompts
from tieback.pipeline.rollout.responses import own_share
from tieback.pipeline.rollout.sampler import Sampler, make_sampler
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.texts import encode_prompts, make_rollout
from tieback.pipeline.settings.collect import DATACLASS_TYPES, CollectArguments
from tieback.pipeline.stage import finish_stage, quiet_libraries


def main() -> None:
    """Run the stage."""
    quiet_libraries()
    run, args = parse_stage("collect", DATACLASS_TYPES)
    started = time.perf_counter()
    state, folder = PartialState(), Path(args.output_dir)
    ranked = folder / "preferences.jsonl"
    if args.annotator == "none" and ranked.exists() and not run.overwrite:
        raise UsageError(
            f"{ranked} holds rankings of an earlier run, which the reward model would learn from: replace them with "
            "--overwrite to have people rank, or name another --run_dir."
        )
    args.seed += run.round - 1  # other prompts, or at least other responses, than the rounds before
    path = args.model_name_or_path or str(newest_policy(run))
    tokenizer = load_tokenizer(path)
    model = load_policy(path, tokenizer, ModelConfig(dtype=args.dtype)).to(state.device).eval()
    sampler = make_sampler(args, tokenizer, model.generation_config, model.device)
    sampler.sync(model)
    prompts, counts = load_prompts(
        "collect",
        args.dataset_name,
        tokenizer,
        context_length(model),
        args,
        split=args.dataset_train_split,
        config=args.dataset_config,
        max_rows=args.max_rows,
        seed=args.seed,
    )
    annotators = annotators_of(args.annotator, args.num_annotators, prompts, args.dataset_name)
    prompts = with_prompt_ids(prompts, args.dataset_name)
    settings = sampling_settings(args, path) | {"prompts": rows_digest(prompts)}
    # Responses that nobody has ranked yet may be, by the annotator of this start.
    ranks_anew = annotators is not None and not ranked.exists()
    written = run.recipe | settings
    if not ranks_anew and is_finished(folder, written, run.overwrite, free=PLACES):
        return
    batches = in_groups(range(len(prompts)), args.batch_size)
    batch_ids = [[prompts[row]["prompt_id"] for row in rows] for rows in batches]

    done: list[Any] = [None]
    if state.is_main_process:
        if run.overwrite:
            response_files.clear_folder(folder)
        response_files.claim_folder(folder, settings)
        done = [response_files.compact(folder, batch_ids)]
    broadcast_object_list(done)
    own = own_share([index for index in range(len(batches)) if index not in done[0]])
    with tqdm(
        total=sum(len(batches[index]) for index in own),
        desc="collect",
        unit="prompt",
        disable=not state.is_main_process,
    ) as progress:
        for index in own:
            rows = respond(sampler, tokenizer, prompts.select(batches[index]), args, index)
            response_files.append(folder, state.process_index, rows)
            progress.update(len(rows))
    state.wait_for_everyone()

    if state.is_main_process:
        response_files.compact(folder, batch_ids)
        rows = response_files.read_rows(folder)
        metrics = response_figures(rows)
        if annotators is not None:
            metrics |= rank_responses(rows, annotators, args.num_annotators, folder, args.seed)
        metrics |= {f"num_prompts/{reason}": count for reason, count in counts.items()}
        metrics["collect/seconds"] = time.perf_counter() - started
        finish_stage("collect", folder, metrics, written)
    state.wait_for_everyone()


def newest_policy(run: RunArguments) -> Path:
    """Folder of the policy that the round before made; of the SFT model in the first round.

    Raises:
        UsageError: it is not there.
    """
    if run.round == 1:
        return run.require("sft", "metrics.json").parent
    return run.require("ppo", "metrics.json", run.round - 1).parent


def annotators_of(annotator: str, num_annotators: int, prompts: Dataset, name: str | None) -> World | None:
    """World whose simulated annotators rank the responses to these prompts; None where nobody ranks them here.

    Raises:
        UsageError: `annotator` is "simulated", and no world can judge the prompts, or has so many annotators.
    """
    if annotator == "none":
        return None
    world = world_of(prompts.column_names)
    if world is None:
        known = ", ".join(f"{other}: {' and '.join(sorted(w.JUDGED_COLUMNS))}" for other, w in WORLDS.items())
        raise UsageError(
            f"annotator: simulated judges the prompts of a built-in world by columns of theirs ({known}), which {name} "
            "does not have. Set annotator: none, and let people rank the responses."
        )
    if num_annotators > world.NUM_ANNOTATORS:
        raise UsageError(
            f"num_annotators: {name} has {world.NUM_ANNOTATORS} simulated annotators, so not {num_annotators} to a prompt."
        )
    return world


def with_prompt_ids(prompts: Dataset, name: str | None) -> Dataset:
    """Prompts with a `prompt_id` each: their own, or their number.

    Raises:
        UsageError: two have the same.
    """
    if "prompt_id" not in prompts.column_names:
        return prompts.add_column("prompt_id", [f"{row:06d}" for row in range(len(prompts))])
    if len(set(prompts["prompt_id"])) < len(prompts):
        raise UsageError(f"{name}: two prompts have the same prompt_id. Make them unique.")
    return prompts


def sampling_settings(args: CollectArguments, path: str) -> dict[str, Any]:
    """Everything that the responses depend on."""
    rollout = {item.name: getattr(args, item.name) for item in fields(RolloutSettings)}
    names = (
        *("dataset_name", "dataset_config", "dataset_train_split", "max_rows"),
        *("num_responses", "batch_size", "seed", "dtype"),
    )
    own = {name: getattr(args, name) for name in names}
    return own | rollout | {"model": weights_digest(path)}


def respond(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    args: CollectArguments,
    batch_index: int,
) -> list[dict[str, Any]]:
    """Sample the responses to one batch of prompts, with random numbers of its own.

    Returns:
        A row of `responses.jsonl` for each prompt.
    """
    repeated = [row for row in prompts for _ in range(args.num_responses)]
    prompt_ids = encode_prompts([row["prompt"] for row in repeated], tokenizer, args.template_arguments)
    completions = sampler.sample(prompt_ids, seed=args.seed * 1_000_003 + batch_index)
    rollout = make_rollout(repeated, prompt_ids, completions, tokenizer)
    texts = [last_text(completion) for completion in rollout.completions]
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
            in_groups(rollout.truncated, args.num_responses),
            strict=True,
        )
    ]


def in_groups(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive groups of `size` items, the last one maybe shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def response_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Figures over the rows of `responses.jsonl`."""
    responses = [response for row in rows for response in row["responses"]]
    return {
        "num_prompts": len(rows),
        "num_responses": len(responses),
        "truncated_fraction": fmean(cut for row in rows for cut in row["truncated"]),
        "response_length/mean": fmean(map(len, responses)),
    }


def rank_responses(
    rows: list[dict[str, Any]], annotators: World, num_annotators: int, folder: Path, seed: int
) -> dict[str, float]:
    """Have simulated annotators rank the responses, write `preferences.jsonl`, and return figures over the pairs."""
    golds = [annotators.gold_totals(row) for row in rows]
    pairs, agreements = [], []
    for row, totals in zip(rows, golds, strict=True):
        for ranks, annotator in annotators.annotate(totals, seed, row["prompt_id"], num_annotators):
            pairs += ranking_to_pairs({**row, "ranks": ranks, "annotator": annotator})
            agreements += agreement_with_gold(ranks, totals)
    response_files.write_rows(folder / "preferences.jsonl", pairs)
    figures: dict[str, float] = {
        "num_pairs": len(pairs),
        "gold_score/mean": fmean(total for totals in golds for total in totals),
    }
    if agreements:
        figures["agreement/gold"] = fmean(agreements)
    return figures


def agreement_with_gold(ranks: list[int], gold: list[float]) -> list[bool]:
    """Whether the ranking orders each pair as the gold judge does, over pairs that the judge does not tie."""
    return [
        (ranks[i] < ranks[j]) == (gold[i] > gold[j])
        for i, j in combinations(range(len(ranks)), 2)
        if gold[i] != gold[j]
    ]


if __name__ == "__main__":
    run(main)
