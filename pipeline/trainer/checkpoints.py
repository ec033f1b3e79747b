"""Checkpoints of a PPO run: their content, the mark of a whole one, and the Trainer that writes and reads them.

A checkpoint is a folder `checkpoint-N` after iteration N: the weights as `ActorCritic.save` writes them, optimiser, schedule,
random states and the Trainer's state. `ppo_state.json` is written last, in one step, when every process has written its
part, and lists all files: a folder without it was torn by a kill, one that lacks a listed file was copied in part, and
neither is resumed from.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from tieback.cli.errors import UsageError
from tieback.pipeline.resumable_trainer import ResumableTrainer
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.rollout.settings import PPO_CONFIG
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.moving_reference import MovingReference
from tieback.pipeline.trainer.run_identity import compare_identities, run_identity, seed_of_process
from tieback.pipeline.trainer.sharded_tensors import load_optimizer_state, whole_optimizer_state

STATE_FILE = "ppo_state.json"


class CheckpointError(UsageError):
    """A checkpoint cannot be resumed from."""


def resolve_checkpoint(output_dir: str | Path, resume: bool | str | None) -> str | None:
    """Folder to resume from: the one named, or for True the newest whole one (None where there is none).

    Raises:
        CheckpointError: the folder named is missing or torn, or a file of a checkpoint is.
    """
    if not resume:
        return None
    if resume is True:
        whole = whole_checkpoints(output_dir, STATE_FILE)
        if not whole:
            return None
        resume = str(whole[-1])
    if not (Path(resume) / STATE_FILE).is_file():
        others = (
            ", ".join(folder.name for folder in whole_checkpoints(Path(resume).parent, STATE_FILE)) or "none"
        )
        raise CheckpointError(
            f"{resume} is not a whole checkpoint of a PPO run: it lacks {STATE_FILE}, which is written last "
            f"(and not at all with save_only_model). Whole ones beside it: {others}."
        )
    _check_files(Path(resume))
    return str(resume)


def _check_files(folder: Path) -> None:
    for name, size in read_state(folder)["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            fault = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(
                f"{folder} is damaged: {name} {fault}. Delete that folder and resume from the checkpoint before it."
            )


def clear_state(folder: str | Path) -> None:
    """Take the mark of a whole checkpoint off a folder that is about to be written anew."""
    (Path(folder) / STATE_FILE).unlink(missing_ok=True)


def write_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write `ppo_state.json`, which marks the checkpoint as whole, with the name and size of every file in it."""
    folder = Path(folder)
    draft = folder / f"{STATE_FILE}.tmp"
    draft.unlink(missing_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    draft.write_text(json.dumps({**state, "files": files}, indent=2))
    os.replace(draft, folder / STATE_FILE)


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read `ppo_state.json`."""
    state: dict[str, Any] = json.loads((Path(folder) / STATE_FILE).read_text())
    return state


def load_weights(actor_critic: ActorCritic, folder: str) -> None:
    """Load the weights of a checkpoint into the models that are there.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        actor_critic.load(folder)
    except (
        Exception
    ) as error:  # safetensors, JSON and shape errors all mean the same to the person who resumes
        raise CheckpointError(
            f"The weights in {folder} cannot be loaded ({type(error).__name__}: {error}). Delete that folder and "
            "resume from the checkpoint before it."
        ) from error


class Stateful(Protocol):
    """A part of a run that changes from iteration to iteration and is written as JSON."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        ...


class CheckpointedTrainer(ResumableTrainer):
    """A Trainer that writes and reads the checkpoints of an `ActorCritic`, so that runs resume exactly.

    Attributes:
        run_state: parts of the run that a checkpoint holds besides those of every Trainer, by name.
        inputs: digests of what the run starts from (see `input_digests`).
        moving_reference: written where the reference has moved.
    """

    run_state: dict[str, Stateful]
    moving_reference: MovingReference
    inputs: dict[str, Any]

    # What the run that is resumed was not: names of what has changed since, and whether all processes draw anew.
    _changed: list[str]
    _draws_anew: bool

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; with `resume_from_checkpoint` go on from that folder, or for True from the newest whole one.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            UsageError: settings or inputs differ from the checkpoint's and `resume_with_changes` does not name them, or
                the number of processes does not fit (see `check_resume`).
        """
        folder = resolve_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if folder is not None:
            self._changed = self.check_resume(folder)
            self._note_changes(folder)
        return super().train(resume_from_checkpoint=folder, **kwargs)

    def check_resume(self, folder: str | Path) -> list[str]:
        """Make sure, before any compute, that this run may go on from a checkpoint.

        Returns:
            Names of the settings and inputs that differ from the checkpoint's, as `resume_with_changes` allows.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            UsageError: something else differs, or the number of processes does not fit.
        """
        folder = Path(resolve_checkpoint(self.args.output_dir, str(folder)) or folder)
        identity = read_state(folder).get("identity")
        return [] if identity is None else compare_identities(folder, identity, self, self.inputs)

    def _note_changes(self, folder: str) -> None:
        """Say in one line each what the resumed run was not."""
        identity = read_state(folder).get("identity")
        processes = self.accelerator.num_processes
        before = processes if identity is None else identity["processes"]
        self._draws_anew = before != processes or "seed" in self._changed
        notes = []
        if identity is None:
            notes.append("an earlier version wrote it without its settings, which cannot be compared.")
        if self._changed:
            notes.append(f"from here on with another {', '.join(self._changed)}.")
        if before != processes:
            notes.append(
                f"the number of processes was {before}, is {processes}: the same run to rounding, but that completions are "
                "sampled from new random numbers."
            )
        for note in notes:
            self.accelerator.print(f"{folder}: {note}", file=sys.stderr)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save(folder, state_dict)
        self.processing_class.save_pretrained(folder)
        self._write_settings(folder)

    def _write_settings(self, folder: str | Path) -> None:
        Path(folder, PPO_CONFIG).write_text(self.args.to_json_string())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            clear_state(folder)
        # Trainer would delete older checkpoints before every process has written its part of this one.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            self.moving_reference.save(folder, self.args.should_save)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        self._write_settings(folder)  # again, with the limit
        if not self.args.save_only_model:
            parts = {name: part.state_dict() for name, part in self.run_state.items()}
            write_state(folder, {**parts, "identity": run_identity(self, self.inputs)})
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The files of one process. Accelerate's own cannot be loaded where a parameter was never trained.
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_fsdp_enabled:
            state = torch.load(
                Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True
            )
            load_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
            self._take_up_settings()
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.moving_reference.load(checkpoint)
            state = read_state(checkpoint)
            for name, part in self.run_state.items():
                # A named kl_coef is where the adaptive one begins again.
                # An earlier version had no such part.
                if name in state and not (name == "kl" and "kl_coef" in self._changed):
                    part.load_state_dict(state[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._draws_anew:
            # Each process has a state of its own there, which none of another number can take up.
            set_seed(seed_of_process(self.args.seed, self.state.global_step, self.accelerator.process_index))
        else:
            super()._load_rng_state(checkpoint)
