"""The reward model: from ranked pairs it learns to score responses as they were ranked.

Trains TRL's `RewardTrainer` (Bradley–Terry: loss = −log σ(score(chosen) − score(rejected))) on the pairs that collect
or people made, or on any preference data. The model starts from `<run_dir>/sft` with a new head; LoRA and QLoRA go
through TRL's `ModelConfig`; the adapter of an SFT stage is where that of the reward model starts. Then the head's bias is set such that demonstrations
score 0 on average, and pairs of prompts that were held out say what the model is worth.

    accelerate launch pipeline/reward.py
    accelerate launch pipeline/reward.py --config pipeline/recipes/hh/reward.yaml --dataset_name pairs.jsonl.gz

Writes the model, its tokenizer, `calibration.png` (and .json) and metrics.json into `<run_dir>/reward`.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("reward")  # before the imports of a run

import json
import random
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from tieback.cli.errors import UsageError, run
from tieback.data.sources import load_rows
from tieback.pipeline.arguments import parse_stage
from tieback.pipeline.digests import rows_digest, tokenizer_digest, weights_digest
from tieback.pipeline.finished import is_finished
from tieback.pipeline.hub import claim_repository, publish
from tieback.pipeline.interruption import train_interruptibly
from tieback.pipeline.model_card import write_card
from tieback.pipeline.model_loading import (
    check_adapter_settings,
    check_chat_template,
    load_tokenizer,
    load_whole,
    model_kwargs,
    new_adapter,
)
from tieback.pipeline.pair_trainer import PairTrainer
from tieback.pipeline.preference_pairs import collected_pairs, pairs_to_learn_from
from tieback.pipeline.progress import FirstStep, show_figures
from tieback.pipeline.pypi_models import folder_of
from tieback.pipeline.resumable_trainer import resumable
from tieback.pipeline.resume import checkpoint_to_resume, launch_settings, settings_check
from tieback.pipeline.rollout.responses import gather_in_order, own_share
from tieback.pipeline.rollout.token_scores import base_model
from tieback.pipeline.settings.reward import DATACLASS_TYPES, RewardArguments
from tieback.pipeline.stage import finish_stage, quiet_libraries
from tieback.reward_model.adapter import base_of
from tieback.reward_model.encoding import encode, encode_pairs, longest_text
from tieback.reward_model.head import (
    is_classifier,
    load_reward_model,
    new_adapted_reward_model,
    new_reward_model,
    reward_bias,
    set_reward_bias,
)
from tieback.reward_model.report import (
    expected_calibration_error,
    margin_by_annotator,
    pair_accuracy,
    write_calibration,
)
from tieback.reward_model.scoring import RewardScorer


def main() -> None:
    """Run the stage."""
    quiet_libraries()
    run, pair_args, data_args, resume_args, args, model_args = parse_stage("reward", DATACLASS_TYPES)
    started = time.perf_counter()
    if args.train_sampling_strategy == "group_by_length":
        raise UsageError(
            "train_sampling_strategy=group_by_length is not for pairs: it would give a step pairs of one length. Choose "
            "batch_rebalance, which divides the pairs of a step into passes of like lengths, or random."
        )
    repository = claim_repository(args, run.recipe)
    sources = [pair_args.dataset_name] if pair_args.dataset_name else collected_pairs(run)
    start = folder_of(model_args.model_name_or_path or str(run.require("sft", "metrics.json").parent))
    tokenizer = load_tokenizer(start, model_args.model_revision)
    rows, agreements = pairs_to_learn_from(sources, pair_args, args.seed)
    check_chat_template(tokenizer, rows.dataset[0], args.chat_template_path)
    set_seed(args.seed)
    model_args.lora_task_type = "SEQ_CLS"  # trains the head beside the adapter
    model, peft_config = start_model(start, model_args, run.recipe)
    limits = [
        length
        for length in (args.max_length, longest_text(base_model(model), tokenizer))
        if length is not None
    ]
    pairs, num_identical = encode_pairs(rows.dataset, tokenizer, min(limits, default=None))
    train, held_out = split_by_prompt(pairs, data_args.held_out_fraction, args.seed)

    trainer = resumable(PairTrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    show_figures(trainer, {"loss": "loss", "accuracy": "accuracy", "margin": "margin"})
    first_step = FirstStep()
    trainer.add_callback(first_step)
    settings = run.recipe | launch_settings(trainer)
    settings |= {
        "model": weights_digest(start),
        "processing_class": tokenizer_digest(tokenizer),
        "train_dataset": rows_digest(rows.dataset),
    }
    if is_finished(args.output_dir, settings, run.overwrite, args.resume_from_checkpoint):
        publish(repository, args.output_dir)
        return
    check = settings_check(settings, resume_args.resume_with_changes)
    resume = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, settings, check)
    train_interruptibly(trainer, resume)
    save(trainer, tokenizer, data_args.merge_adapter)
    steps, history = trainer.state.global_step, trainer.state.log_history
    del trainer, model

    state = PartialState()
    scorer = RewardScorer(load_reward_model(args.output_dir).to(state.device), tokenizer)
    demonstrations = encode_demonstrations(data_args, train, tokenizer, args.seed)
    center(scorer.model, score_on_all_processes(scorer, demonstrations))
    margins = held_out_margins(scorer, held_out)
    if state.is_main_process:
        scorer.model.config.save_pretrained(args.output_dir)
        write_calibration(margins, args.output_dir)
    metrics = report(held_out, margins)
    metrics |= {f"{name}/train": entry for name, entry in last_logged(history, "loss", "accuracy").items()}
    metrics |= {"num_pairs/train": len(train), "num_pairs/held_out": len(held_out)}
    dropped = {"identical": 0, **rows.dropped, "identical_after_truncation": num_identical}
    metrics |= {f"num_pairs/dropped_{reason}": count for reason, count in dropped.items()}
    metrics |= {f"agreement/{annotator}": share for annotator, (share, _) in agreements.items()}
    metrics |= {"train/steps": steps, "train/seconds": time.perf_counter() - started, **first_step.figures()}
    write_card("reward", Path(args.output_dir), metrics, settings, start)
    finish_stage("reward", args.output_dir, metrics, settings)
    publish(repository, args.output_dir)
    state.wait_for_everyone()


def start_model(
    path: str, model_args: ModelConfig, named: Collection[str]
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """A reward model goes on being trained; of a language model a new one is made. And the new adapter, if any.

    With use_peft the reward model of an SFT adapter starts as that adapter, on the same base.

    Raises:
        UsageError: it can be neither (a classifier with two labels, say), is not there, or a named setting of LoRA differs
            from the adapter's.
    """
    kwargs = model_kwargs(model_args)
    try:
        if model_args.use_peft and base_of(path) is not None:
            model = new_adapted_reward_model(path, **kwargs)
            check_adapter_settings(path, model.peft_config["default"], model_args, named)
            return model, None
        model = (
            load_reward_model(path, **kwargs)
            if is_classifier(path, **kwargs)
            else new_reward_model(path, **kwargs)
        )
    except OSError as error:
        raise UsageError(str(error)) from error
    return model, new_adapter(model_args, model)


def split_by_prompt(pairs: Dataset, held_out_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and held-out pairs, all those of one prompt on the same side.

    Raises:
        UsageError: one side would be empty.
    """
    keys = [json.dumps(prompt) for prompt in pairs["prompt"]]
    prompts = sorted(set(keys))
    count = round(held_out_fraction * len(prompts))
    if not 1 <= count < len(prompts):
        raise UsageError(
            f"held_out_fraction {held_out_fraction} of {len(prompts)} different prompts leaves one side empty."
        )
    held_out = set(random.Random(seed).sample(prompts, count))
    return (
        pairs.select([row for row, key in enumerate(keys) if key not in held_out]),
        pairs.select([row for row, key in enumerate(keys) if key in held_out]),
    )


def save(trainer: PairTrainer, tokenizer: PreTrainedTokenizerBase, merge: bool) -> None:
    """Write the model into `output_dir`; of LoRA the adapter with its head, or the model with both merged in."""
    output_dir, state = Path(trainer.args.output_dir), PartialState()
    adapted = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    trainer.save_model(str(output_dir))
    trainer.save_state()
    load_whole()
    if adapted and state.is_main_process:
        tokenizer.save_pretrained(output_dir)
        model = load_reward_model(output_dir)
        model.config.pad_token_id = tokenizer.pad_token_id
        if merge:
            for file in output_dir.glob("adapter_*"):
                file.unlink()
            model.save_pretrained(output_dir)
        else:
            model.config.save_pretrained(output_dir)
    state.wait_for_everyone()


def encode_demonstrations(
    data_args: RewardArguments, train: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[list[int]]:
    """Token ids of what is to score 0 on average (see `RewardArguments.demonstrations_name`)."""
    if data_args.demonstrations_name is None:
        return train.shuffle(seed=seed)["chosen_ids"][: data_args.num_demonstrations]
    rows = load_rows(
        data_args.demonstrations_name, "demonstrations", max_rows=data_args.num_demonstrations, seed=seed
    ).dataset
    return [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]


def center(model: PreTrainedModel, scores: Sequence[float]) -> None:
    """Move the bias such that the mean of `scores` would have been 0."""
    set_reward_bias(model, reward_bias(model) - fmean(scores))


def score_on_all_processes(scorer: RewardScorer, sequences: Sequence[list[int]]) -> list[float]:
    """Score sequences, each process its share; every process gets all the scores, in order."""
    own = own_share(range(len(sequences)))
    return gather_in_order(own, scorer.score_ids([sequences[index] for index in own]))


def held_out_margins(scorer: RewardScorer, held_out: Dataset) -> list[float]:
    """score(chosen) − score(rejected) of each pair."""
    scores = score_on_all_processes(scorer, [*held_out["chosen_ids"], *held_out["rejected_ids"]])
    return [
        chosen - rejected
        for chosen, rejected in zip(scores[: len(held_out)], scores[len(held_out) :], strict=True)
    ]


def report(held_out: Dataset, margins: list[float]) -> dict[str, float]:
    """What the model is worth on held-out pairs, and what always choosing the longer (in tokens) would be."""
    metrics = {
        "accuracy/held_out": pair_accuracy(margins),
        "accuracy/length_only": pair_accuracy(
            [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in held_out]
        ),
        "calibration/ece": expected_calibration_error(margins),
        "margin/mean": fmean(margins),
    }
    if "annotator" in held_out.column_names:
        names = [name or "unknown" for name in held_out["annotator"]]
        metrics |= {f"margin/{name}": value for name, value in margin_by_annotator(margins, names).items()}
    return metrics


def last_logged(history: list[dict[str, Any]], *names: str) -> dict[str, float]:
    """Last value of each name in the Trainer's log."""
    return {
        name: next(entry[name] for entry in reversed(history) if name in entry)
        for name in names
        if any(name in entry for entry in history)
    }


if __name__ == "__main__":
    run(main)
