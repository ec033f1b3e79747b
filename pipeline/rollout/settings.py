"""Settings of prompts and sampling that ppo, collect and evaluate share."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

# Where `PPOTrainer` writes its settings, beside the policy.
PPO_CONFIG = "ppo_config.json"
# Of the machine, and not of the policy.
_OF_THE_MACHINE = ("sampler", "vllm_gpu_memory_utilization")


@dataclass
class RolloutSettings:
    """Settings of prompts and sampling; inherited by `PPOConfig` and by the arguments of collect and evaluate."""

    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature. Scoring divides the logits by it too, so the policy whose log-probabilities are used is the one that is sampled."
        },
    )
    max_completion_length: int = field(
        default=128, metadata={"help": "Most tokens in a completion; one cut there is marked as truncated."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in a prompt: the stages leave longer ones out and count them. Where not set, a prompt that leaves no room for its completion is an error."
        },
    )
    stop_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further tokens that end a completion, besides the EOS ids of tokenizer and model and the chat template's end of turn."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, as JSON, e.g. '{\"enable_thinking\": false}'."},
    )

    sampler: str = field(
        default="transformers",
        metadata={
            "help": "What samples completions: transformers (generate) or vllm (an engine in this process; docs/samplers.md).",
            "choices": ["transformers", "vllm"],
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "Share of a GPU's memory that vLLM takes for its copy of the policy and its cache. On a CPU VLLM_CPU_KVCACHE_SPACE in the environment, in GiB (1), sizes the cache."
        },
    )

    def __post_init__(self) -> None:
        """Read JSON, check ranges, and hand on to the next class that is inherited from.

        Raises:
            ValueError: a setting is out of range.
        """
        self.chat_template_kwargs = read_mapping("chat_template_kwargs", self.chat_template_kwargs)
        if isinstance(self.stop_tokens, str):
            raise ValueError(f"stop_tokens must be a list of tokens, got {self.stop_tokens!r}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature}: PPO needs samples, greedy decoding has no ratio "
                "and no KL."
            )
        if self.sampler not in ("transformers", "vllm"):
            raise ValueError(f"sampler must be transformers or vllm, got {self.sampler!r}.")
        if not 0 < self.vllm_gpu_memory_utilization < 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization must be between 0 and 1, got {self.vllm_gpu_memory_utilization}."
            )
        for name in ("max_completion_length", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_kwargs` as a dictionary."""
        return cast(dict[str, Any], self.chat_template_kwargs or {})


def read_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A setting that may be written as JSON.

    Raises:
        ValueError: it is no mapping of names to values.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not valid JSON: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping of names to values, got {value!r}.")
    return value


def settings_of_policy(folder: str | Path) -> dict[str, Any]:
    """Rollout settings that the PPO policy in a folder was trained with; none where PPO left none there.

    Args:
        folder: a folder that `PPOTrainer` has written a policy into; a hub name has no settings.

    Returns:
        Those of `RolloutSettings`, by name, but for what samples.
    """
    path = Path(folder) / PPO_CONFIG
    if not path.is_file():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    names = [item.name for item in fields(RolloutSettings) if item.name not in _OF_THE_MACHINE]
    return {name: saved[name] for name in names if name in saved}
