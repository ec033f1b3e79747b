"""Rollouts on disk: of each iteration the tokens, and what PPO made of them, for a person to look at and to compute again.

`<rollout_dir>/iteration-000012/process-0.safetensors` has the tensors of one process, `process-0.jsonl` the texts, a line a completion.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tieback.cli.errors import UsageError

_SETTINGS = "settings"


@dataclass(frozen=True)
class RolloutFacts:
    """What is the same for all completions of an iteration.

    Args:
        iteration: counted from 1, as in the log.
        kl_coef: coefficient that the reward was made with.
        kl_estimator: of the penalty.
        gamma: discount.
        gae_lambda: λ of the advantages.
        gae_lambda_alpha: of a λ by length; None for none.
        critic_gae_lambda: λ of the returns; None for that of the advantages.
        truncation: treatment of a cut completion.
        num_generations: completions of a prompt.
        importance_sampling: level of the importance weights; None for none.
        importance_sampling_cap: greatest of them.
        reward_names: of the columns of `function_rewards`.
    """

    iteration: int
    kl_coef: float
    kl_estimator: str
    gamma: float
    gae_lambda: float
    gae_lambda_alpha: float | None
    critic_gae_lambda: float | None
    truncation: str
    num_generations: int
    importance_sampling: str | None
    importance_sampling_cap: float
    reward_names: list[str]


@dataclass(frozen=True)
class SavedRollout:
    """Completions of one iteration, of all processes.

    Args:
        facts: of the iteration.
        tensors: by name: `completion_ids`, `mask`, `logprobs`, `ref_logprobs`, `values`, `token_scores`, `advantages`, `returns`,
            and where the sampler tells them `sampler_logprobs`, each [B, T]; `raw_scores`, `truncated`, each [B];
            `function_rewards` [B, F].
        rows: for each completion `prompt`, `completion` and `tokens`, the text of each token.
    """

    facts: RolloutFacts
    tensors: dict[str, Tensor]
    rows: list[dict[str, Any]]


def write_rollout(
    folder: str | Path,
    process: int,
    facts: RolloutFacts,
    tensors: Mapping[str, Tensor],
    rows: list[dict[str, Any]],
) -> None:
    """Write one process's part of an iteration; one that is there already is replaced (see `SavedRollout`)."""
    place = Path(folder, f"iteration-{facts.iteration:06d}")
    place.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    draft = place / f"process-{process}.tmp"
    draft.write_text(lines, encoding="utf-8", errors="replace")
    os.replace(draft, place / f"process-{process}.jsonl")
    # Last: where it is whole, so is the other.
    # Copies, as two names may be one tensor, which safetensors refuses.
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(whole, draft, metadata={_SETTINGS: json.dumps(asdict(facts))})
    os.replace(draft, place / f"process-{process}.safetensors")


def saved_iterations(folder: str | Path) -> list[int]:
    """Numbers of the iterations that are there, in order."""
    numbers = (re.fullmatch(r"iteration-(\d+)", path.name) for path in Path(folder).glob("iteration-*"))
    return sorted(int(number[1]) for number in numbers if number)


def read_rollout(folder: str | Path, iteration: int) -> SavedRollout:
    """Read an iteration, the parts of all processes one after the other.

    Raises:
        UsageError: it is not there, or a part of it is torn.
    """
    place = Path(folder, f"iteration-{iteration:06d}")
    parts = sorted(place.glob("process-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))
    if not parts:
        raise UsageError(f"{place} has no rollout.")
    read: list[dict[str, Tensor]] = []
    rows: list[dict[str, Any]] = []
    for path in parts:
        try:
            with safe_open(path, "pt") as file:
                facts = RolloutFacts(**json.loads(file.metadata()[_SETTINGS]))
                read.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 -- no mapping
            lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
            rows += [json.loads(line) for line in lines]
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    tensors = {name: _joined([part[name] for part in read]) for name in read[0]}
    return SavedRollout(facts, tensors, rows)


def _joined(parts: list[Tensor]) -> Tensor:
    """One below the other; those over tokens, which may differ in width, are padded to the longest."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
