"""Pong from pixels, by the PPO core that also tunes language models.

    python -m classic_rl.pong                              train, evaluate, draw and film into runs/pong
    python -m classic_rl.pong --preset tutorial            with the settings of the tutorials
    python -m classic_rl.pong --resume                     go on where a run in runs/pong was stopped
    python -m classic_rl.pong --evaluate runs/pong         evaluate, draw and film a trained policy again

The policy sees four grey frames of 84x84 and chooses one of six moves of the joystick; a reward is a point won (+1) or
lost (−1), and 21 points end a game. docs/pong.md says what it is made of.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tieback.classic_rl.checkpoints import list_checkpoints
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong_pictures import write_pictures, write_training_video
from tieback.classic_rl.pong_policy import PongPolicy, greedy_returns, load_policy
from tieback.classic_rl.pong_training import PongPPOArguments, train
from tieback.classic_rl.tracking import tracking_accelerator
from tieback.cli.arguments import parse_flags
from tieback.cli.devices import choose_device, has_fast_bf16
from tieback.cli.errors import UsageError, run
from tieback.cli.results import print_metrics, write_json, write_metrics

__all__ = ["PongPolicy", "load_policy"]

_EVALUATION_SEED = 2_000_000
PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of PongPPOArguments.
    "fast": {},
    # Those of most tutorials, after Schulman et al. 2017, table 5.
    "tutorial": {
        "total_steps": 10_000_000,
        "num_envs": 8,
        "num_steps": 128,
        "num_ppo_epochs": 4,
        "num_minibatches": 4,
        "clip_range": 0.1,
        "ent_coef": 0.01,
        "anneal_ent_coef": False,
        "gae_lambda": 0.9,
        "gamma": 0.99,
        "learning_rate": 2.5e-4,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "normalize_frames": False,
    },
}


@dataclass
class PongArguments:
    """What to run, and where to write."""

    preset: str = field(
        default="fast",
        metadata={"help": "Settings to start from; any flag overrides.", "choices": list(PRESETS)},
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    output_dir: str = field(default="runs/pong", metadata={"help": "Folder to write into."})
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from the newest checkpoint in output_dir, with the settings it was started with."
        },
    )
    evaluate: str = field(
        default="", metadata={"help": "Do not train: evaluate the policy of this folder, draw and film it."}
    )
    eval_episodes: int = field(default=30, metadata={"help": "Episodes of an evaluation."})
    save_every: int = field(default=50_000, metadata={"help": "Environment steps between checkpoints."})
    video_every: int = field(
        default=0, metadata={"help": "Environment steps between videos while training; 0 for none."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16 where it is safe; if not given, where the machine is faster with it."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    report_to: str = field(
        default="tensorboard",
        metadata={
            "help": "Tracker that figures are logged to.",
            "choices": ["tensorboard", "wandb", "trackio", "none"],
        },
    )

    def __post_init__(self) -> None:
        if self.eval_episodes < 1:
            raise UsageError(f"eval_episodes must be at least 1, but is {self.eval_episodes}.")
        if self.save_every < 1 or self.video_every < 0:
            raise UsageError("save_every must be at least 1, and video_every at least 0.")
        if self.bf16 is None:
            self.bf16 = has_fast_bf16(self.use_cpu)


def parse(argv: list[str]) -> tuple[PongArguments, PongPPOArguments]:
    """Read the flags, on top of the preset's settings, or of those that a run to resume was started with.

    Raises:
        UsageError: a setting is out of its range, or there is no run to resume.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="fast")
    first.add_argument("--output_dir", default="runs/pong")
    first.add_argument("--resume", nargs="?", const="True", default="False")
    known, _ = first.parse_known_args(argv)
    types = (PongArguments, PongPPOArguments)
    started_with: dict[str, Any] | None = None
    if known.resume.lower() in ("true", "1", "yes"):
        started_with = _read_settings(Path(known.output_dir))
    defaults = PRESETS.get(known.preset, {}) if started_with is None else started_with
    arguments, settings = parse_flags(types, "python -m classic_rl.pong", argv, defaults)
    if started_with is not None:
        _refuse_changes(started_with, arguments, settings)
    return arguments, settings


# Settings that a resume may change, because they do not affect what is learnt.
_FREE = {"output_dir", "resume", "evaluate", "eval_episodes", "save_every", "video_every", "report_to"}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no run to resume ({path.name} is missing): start without --resume.")
    known = {
        item.name for kind in (PongArguments, PongPPOArguments) for item in fields(kind) if item.init
    } - _FREE
    return {name: value for name, value in json.loads(path.read_text()).items() if name in known}


def _refuse_changes(started_with: dict[str, Any], *parsed: PongArguments | PongPPOArguments) -> None:
    now = {name: value for part in parsed for name, value in asdict(part).items()}
    changed = [
        f"{name} {value} (now {now[name]})" for name, value in started_with.items() if now[name] != value
    ]
    if changed:
        raise UsageError(
            f"the run was started with {', '.join(changed)}: resume with the same, or start another run."
        )


def evaluate(policy: PongPolicy, folder: Path, num_episodes: int) -> dict[str, float]:
    """Play, draw and film into `folder`; returns the figures."""
    returns = greedy_returns(policy, num_episodes, _EVALUATION_SEED)
    write_pictures(policy, folder, _EVALUATION_SEED)
    return {
        "eval/mean_return": float(returns.mean()),
        "eval/std_return": float(returns.std()),
        "eval/min_return": float(returns.min()),
        "eval/episodes": float(len(returns)),
    }


def _report(folder: Path, metrics: dict[str, float]) -> None:
    path = folder / "metrics.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    write_metrics(folder, {**earlier, **metrics})
    print_metrics(f"pong → {folder}", metrics)


def _train(arguments: PongArguments, settings: PongPPOArguments, device: torch.device) -> None:
    folder = Path(arguments.output_dir)
    if list_checkpoints(folder) and not arguments.resume:
        raise UsageError(
            f"{folder} holds a run already: go on with it by --resume, or name another --output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", {**asdict(arguments), **asdict(settings)})
    accelerator = tracking_accelerator(
        arguments.report_to, folder, device.type == "cpu", bool(arguments.bf16)
    )

    def film(steps: int, network: NatureActorCritic) -> None:
        every = arguments.video_every
        if every and steps // every > (steps - settings.steps_per_iteration) // every:
            (folder / "videos").mkdir(exist_ok=True)
            write_training_video(network, folder / "videos" / f"{steps:012d}.mp4", _EVALUATION_SEED, device)

    network, status = train(
        settings,
        arguments.seed,
        folder,
        accelerator,
        arguments.save_every,
        resume=arguments.resume,
        on_iteration=film,
    )
    accelerator.end_training()
    if status.interrupted:
        print(f"Stopped after {status.steps:,} steps, and saved. Go on with: --resume --output_dir {folder}")
        return
    metrics = evaluate(PongPolicy(network, device), folder, arguments.eval_episodes)
    if len(status.curve) > 1:
        steps, seconds, returns = (np.array(column) for column in zip(*status.curve, strict=True))
        # matplotlib takes half a second, which --help has no use for
        from tieback.classic_rl.plots import draw_learning_curve

        draw_learning_curve(folder / "learning_curve.png", steps, seconds, returns)
    if status.mean_return_100 is not None:
        metrics["train/mean_return_100"] = status.mean_return_100
    metrics["train/env_steps"] = float(status.steps)
    metrics["train/seconds"] = status.seconds
    metrics["train/steps_per_second"] = status.steps / status.seconds
    _report(folder, metrics)


def main(arguments: PongArguments, settings: PongPPOArguments) -> None:
    """Train or evaluate."""
    device = choose_device(arguments.use_cpu).device
    if arguments.evaluate:
        folder = Path(arguments.evaluate)
        _report(folder, evaluate(load_policy(folder, device), folder, arguments.eval_episodes))
    else:
        _train(arguments, settings, device)


if __name__ == "__main__":
    run(lambda: main(*parse(sys.argv[1:])))
