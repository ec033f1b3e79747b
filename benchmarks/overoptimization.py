"""Over-optimisation on the help desk: PPO against a reward model of few pairs, with a judge that is only watched, and with one that stops it.

    python -m benchmarks.overoptimization --run_dir runs/helpdesk --plot docs/images/overoptimization.png

Takes SFT and the collected pairs of a run of the help desk (`make sft collect`), and writes into `<run_dir>/overoptimization`. The judge is the
gold rule, which ranked the pairs, with noise: what the reward model stands for. (Gao et al. 2022, "Scaling Laws for Reward Model
Overoptimization".)
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.helpdesk_stage import run_stage
from benchmarks.side_by_side import Figures, tell
from tieback.pipeline.report.curves import read_log
from tieback.pipeline.report.judging import Evaluation, evaluations

JUDGE = "tieback.data.helpdesk:gold_reward"
_EVERY = 5
RUNS = {
    "plain": ("--save_strategy", "no"),
    "guarded": (
        *("--metric_for_best_model", "judge/mean", "--load_best_model_at_end", "true"),
        *("--early_stopping_patience", "3", "--save_strategy", "steps", "--save_steps", str(_EVERY)),
        *("--save_total_limit", "2"),
    ),
}  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overoptimization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run_dir", default="runs/helpdesk", help="run with sft and collect (runs/helpdesk)")
    parser.add_argument(
        "--pairs", type=int, default=6000, help="rankings of pairs that the reward model learns from (6000)"
    )
    parser.add_argument("--iterations", type=int, default=120, help="of PPO (120)")
    parser.add_argument(
        "--kl_coef", type=float, default=0.02, help="KL coefficient (0.02; the recipe starts at 0.12)"
    )
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of policy and critic (5e-4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all stages (0)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--plot", help="file for the picture")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train, evaluate, draw and print."""
    home = Path(args.run_dir, "overoptimization")
    shared = ("--run_dir", args.run_dir, "--seed", args.seed)
    pairs = ("--max_rows", args.pairs, "--num_train_epochs", 2)
    run_stage("reward", args.threads, *shared, "--output_dir", home / "reward", *pairs)
    found: dict[str, list[Evaluation]] = {}
    figures: Figures = {}
    for name, settings in RUNS.items():
        run_stage(
            "ppo", args.threads, *shared, "--output_dir", home / name, "--reward_funcs", home / "reward", "--judge_funcs", JUDGE,
            "--max_steps", args.iterations, "--kl_coef", args.kl_coef, "--kl_target", "null", "--learning_rate", args.learning_rate,
            "--critic_learning_rate", args.learning_rate, "--num_eval_prompts", 200, "--eval_strategy", "steps",
            "--eval_steps", _EVERY, *settings,
        )  # fmt: skip
        run_stage(
            "evaluate", args.threads, *shared, "--ppo_model_path", home / name, "--reward_model_path", home / "reward",
            "--output_dir", home / f"evaluate_{name}", "--best_of", 0,
        )  # fmt: skip
        found[name] = evaluations(read_log(home / name))
        metrics = json.loads((home / f"evaluate_{name}" / "metrics.json").read_text())
        figures |= {f"unseen/{key}_{name}": metrics[f"{key}/ppo"] for key in ("gold_score", "reward_score")}
        figures["unseen/gold_score_sft"] = metrics["gold_score/sft"]
    tell(figures | figures_of(found), args.threads, args.json)
    if args.plot:
        draw(found, Path(args.plot))


def figures_of(found: Mapping[str, Sequence[Evaluation]]) -> Figures:
    """Where the judge was highest, and where each run ended."""
    best = max(found["plain"], key=lambda at: at.judge)
    last, stopped = found["plain"][-1], max(found["guarded"], key=lambda at: at.judge)
    return {
        "training/judge_best": best.judge,
        "training/iteration_of_best": best.step,
        "training/judge_at_the_end": last.judge,
        "training/reward_at_best": best.reward,
        "training/reward_at_the_end": last.reward,
        "training/kl_at_the_end": last.kl,
        "training/iterations_guarded": found["guarded"][-1].step,
        "training/judge_kept": stopped.judge,
    }


def draw(found: Mapping[str, Sequence[Evaluation]], path: Path) -> None:
    """Reward and judge against the root of the KL, the run that goes on and the one that stops."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, of, label in zip(
        figure.subplots(1, 2),
        ("reward", "judge"),
        ("reward (what PPO maximises)", "judge (gold score)"),
        strict=True,
    ):
        for name, style in (("plain", "C0-"), ("guarded", "C1-")):
            runs = found[name]
            axes.plot(
                [math.sqrt(max(at.kl, 0)) for at in runs], [getattr(at, of) for at in runs], style, label=name
            )
        kept = max(found["guarded"], key=lambda at: at.judge)
        axes.plot([math.sqrt(kept.kl)], [getattr(kept, of)], "C1o", label="kept")
        axes.set_xlabel("root of the KL to SFT (√nats)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
