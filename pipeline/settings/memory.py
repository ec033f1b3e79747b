"""Settings of the estimate of memory: all of PPO, and its own."""

from dataclasses import dataclass, field

from tieback.pipeline.settings import ppo


@dataclass
class MemoryArguments:
    """What is asked of the estimate."""

    prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt; max_prompt_length where not set."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "File of accelerate_configs/ that the run is launched with; one process if not given."
        },
    )
    json: str | None = field(
        default=None, metadata={"help": "File that the figures are written to, in bytes."}
    )

    def __post_init__(self) -> None:
        if self.prompt_length is not None and self.prompt_length < 1:
            raise ValueError(f"prompt_length must be at least 1, got {self.prompt_length}.")


DATACLASS_TYPES = (*ppo.DATACLASS_TYPES, MemoryArguments)
