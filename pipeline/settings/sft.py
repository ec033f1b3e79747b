"""Settings of SFT."""

import json
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, SFTConfig

from tieback.cli.errors import UsageError
from tieback.pipeline.arguments import RunArguments
from tieback.pipeline.resume import ResumeSettings


@dataclass
class SFTArguments:
    """Demonstrations to learn from, and the model where none is named."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the demonstrations: helpdesk (the built-in world), a local file (JSON, JSONL, CSV, Parquet), or a hub data set."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Most demonstrations that are read; of helpdesk, how many are made."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in a prompt: rows with a longer one are left out and counted. Where not set, a prompt that does not fit into max_length is an error."
        },
    )
    eval_fraction: float = field(
        default=0.05, metadata={"help": "Share of the demonstrations held out for loss/eval; 0 for none."}
    )
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of a new LlamaConfig, as JSON; used where no model_name_or_path is named."},
    )
    tokenizer_vocab_size: int = field(
        default=1024, metadata={"help": "Size of the vocabulary of a new model's tokenizer, in tokens."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except json.JSONDecodeError as error:
                raise UsageError(f"model_config is not valid JSON: {error}") from error


DATACLASS_TYPES = (RunArguments, SFTArguments, ResumeSettings, SFTConfig, ModelConfig)
