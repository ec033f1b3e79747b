"""Settings of the preflight: all of PPO, and its own."""

from dataclasses import dataclass, field

from tieback.pipeline.settings import ppo


@dataclass
class PreflightArguments:
    """What is asked of the preflight."""

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "File of accelerate_configs/ that the run will be launched with, for the memory of a process; one process where not set. The trial itself is always one process."
        },
    )
    json: str | None = field(
        default=None, metadata={"help": "File that the findings are written to, as a list of objects."}
    )


DATACLASS_TYPES = (*ppo.DATACLASS_TYPES, PreflightArguments)
