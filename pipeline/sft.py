"""Supervised fine-tuning: a language model learns the demonstrations.

Trains TRL's `SFTTrainer` with the loss on completions only (on the assistant's turns, where rows are whole
conversations). The model is one by name or folder (`model_name_or_path`), with LoRA or QLoRA through TRL's
`ModelConfig`, or a new small Llama (`model_config`) with a tokenizer trained on the demonstrations.

    accelerate launch pipeline/sft.py
    accelerate launch pipeline/sft.py --config pipeline/recipes/hh/sft.yaml --dataset_name pairs.jsonl.gz

Writes the model (safetensors; the adapter alone for LoRA), its tokenizer and metrics.json into `<run_dir>/sft`.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("sft")  # before the imports of a run

import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTTrainer

from tieback.cli.errors import UsageError, run
from tieback.data.sources import Rows, load_rows
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline.arguments import parse_stage
from tieback.pipeline.digests import rows_digest, tokenizer_digest, weights_digest
from tieback.pipeline.finished import is_finished
from tieback.pipeline.hub import claim_repository, publish
from tieback.pipeline.interruption import train_interruptibly
from tieback.pipeline.model_card import write_card
from tieback.pipeline.model_loading import (
    check_chat_template,
    context_length,
    load_policy,
    load_tokenizer,
    new_adapter,
    new_policy,
)
from tieback.pipeline.progress import FirstStep, show_figures
from tieback.pipeline.prompts import fit_prompts
from tieback.pipeline.pypi_models import folder_of
from tieback.pipeline.resumable_trainer import resumable
from tieback.pipeline.resume import checkpoint_to_resume, launch_settings, settings_check
from tieback.pipeline.settings.sft import DATACLASS_TYPES, SFTArguments
from tieback.pipeline.stage import finish_stage, quiet_libraries


def main() -> None:
    """Run the stage."""
    quiet_libraries()
    run, data_args, resume_args, args, model_args = parse_stage("sft", DATACLASS_TYPES)
    started = time.perf_counter()
    repository = claim_repository(args, run.recipe)
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = folder_of(model_args.model_name_or_path)
    rows = load_demonstrations(data_args, args.seed)
    dataset = rows.dataset
    tokenizer = prepare_tokenizer(data_args, model_args, dataset)
    check_chat_template(tokenizer, dataset[0], args.chat_template_path)
    model = prepare_model(data_args, model_args, tokenizer, args.seed)
    dataset, args.assistant_only_loss = completions_only(dataset, tokenizer)
    limits = [length for length in (args.max_length, context_length(model)) if length is not None]
    args.max_length = min(limits, default=None)
    num_left_out = 0
    if "prompt" in dataset.column_names:
        dataset, num_left_out = fit_prompts(
            dataset, tokenizer, args.max_length, 1, data_args.max_prompt_length, {}
        )
    train, held_out = split_rows(dataset, data_args.eval_fraction, args.seed)

    trainer = resumable(SFTTrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=new_adapter(model_args, model),
    )
    show_figures(trainer, {"loss": "loss", "mean_token_accuracy": "token accuracy"})
    first_step = FirstStep()
    trainer.add_callback(first_step)
    stop_ids = model.generation_config.eos_token_id
    path = model_args.model_name_or_path
    settings = run.recipe | launch_settings(trainer)
    settings |= {
        "model": None if path is None else weights_digest(path),
        "processing_class": tokenizer_digest(tokenizer),
        "train_dataset": rows_digest(rows.dataset),
    }
    if is_finished(args.output_dir, settings, run.overwrite, args.resume_from_checkpoint):
        publish(repository, args.output_dir)
        return
    check = settings_check(settings, resume_args.resume_with_changes)
    resume = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, settings, check)
    result = train_interruptibly(trainer, resume)
    evaluation = trainer.evaluate() if held_out is not None else {}
    model.generation_config.eos_token_id = stop_ids  # the Trainer may have put the tokenizer's EOS alone
    trainer.save_model()
    trainer.save_state()

    metrics: dict[str, float] = {"loss/train": last_loss(trainer.state.log_history, result.training_loss)}
    if held_out is not None:
        metrics |= {
            "loss/eval": evaluation["eval_loss"],
            "accuracy/token": evaluation["eval_mean_token_accuracy"],
        }
        metrics["num_demonstrations/eval"] = len(held_out)
    metrics |= {
        "num_demonstrations/train": len(train),
        "num_demonstrations/left_out": num_left_out,
        **{f"num_demonstrations/dropped_{reason}": count for reason, count in rows.dropped.items()},
        "num_parameters": trainer.model.num_parameters(),
        "train/steps": trainer.state.global_step,
        "train/seconds": time.perf_counter() - started,
        **first_step.figures(),
    }
    write_card("sft", Path(args.output_dir), metrics, settings, path)
    finish_stage("sft", args.output_dir, metrics, settings)
    publish(repository, args.output_dir)
    PartialState().wait_for_everyone()


def load_demonstrations(data_args: SFTArguments, seed: int) -> Rows:
    """Rows to learn from, and what was dropped of the source.

    Raises:
        UsageError: no data set is named.
    """
    if data_args.dataset_name is None:
        raise UsageError(
            "Name the demonstrations with --dataset_name (or `make sft DATA=...`): a file, or a hub data set."
        )
    return load_rows(
        data_args.dataset_name,
        "demonstrations",
        split=data_args.dataset_train_split,
        config=data_args.dataset_config,
        max_rows=data_args.max_rows,
        seed=seed,
    )


def prepare_tokenizer(
    data_args: SFTArguments, model_args: ModelConfig, dataset: Dataset
) -> PreTrainedTokenizerBase:
    """The named model's tokenizer, or one trained on the demonstrations by the main process."""
    if model_args.model_name_or_path is not None:
        return load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    trained: list[PreTrainedTokenizerBase | None] = [None]
    if PartialState().is_main_process:
        texts = (text for row in dataset for text in row_texts(row))
        trained = [train_tokenizer(texts, data_args.tokenizer_vocab_size)]
    # Not by way of a folder: a finished run of other data may lie in that of the stage.
    (tokenizer,) = broadcast_object_list(trained)
    return tokenizer


def prepare_model(
    data_args: SFTArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The named model, or a new one.

    Raises:
        UsageError: neither is given, or an adapter is asked for on a new model.
    """
    if model_args.model_name_or_path is not None:
        return load_policy(model_args.model_name_or_path, tokenizer, model_args)
    if not isinstance(data_args.model_config, dict):
        raise UsageError("Name a model with model_name_or_path, or describe a new one with model_config.")
    if model_args.use_peft:
        raise UsageError(
            "use_peft trains an adapter on a model that exists: name one with model_name_or_path."
        )
    return new_policy(data_args.model_config, tokenizer, seed)


def completions_only(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, bool]:
    """Rows as `SFTTrainer` needs them for a loss on completions, and whether it is to use `assistant_only_loss`.

    Prompt–completion rows are left alone. Conversations keep every turn where the chat template marks the assistant's
    ({% generation %}); otherwise the last turn becomes the completion.
    """
    if "messages" not in dataset.column_names:
        return dataset, False
    if "generation %}" in (tokenizer.chat_template or ""):
        return dataset, True
    return dataset.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=["messages"],
    ), False


def split_rows(dataset: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Train and held-out rows.

    Raises:
        UsageError: the share leaves one of them empty.
    """
    if eval_fraction == 0:
        return dataset, None
    if not 1 <= round(len(dataset) * eval_fraction) < len(dataset):
        raise UsageError(
            f"eval_fraction {eval_fraction} of {len(dataset)} demonstrations leaves one side empty."
        )
    parts = dataset.train_test_split(test_size=round(len(dataset) * eval_fraction), seed=seed)
    return parts["train"], parts["test"]


def row_texts(row: dict[str, Any]) -> list[str]:
    """Every text of a row, for the tokenizer to train on."""
    values = [row[name] for name in ("text", "messages", "prompt", "completion") if row.get(name) is not None]
    return [
        text
        for value in values
        for text in ([value] if isinstance(value, str) else [m["content"] for m in value])
    ]


def last_loss(log_history: list[dict[str, Any]], default: float) -> float:
    """Last training loss that was logged."""
    return next((entry["loss"] for entry in reversed(log_history) if "loss" in entry), default)


if __name__ == "__main__":
    run(main)
