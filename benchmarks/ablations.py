"""What single settings of PPO do on the help desk: each changed alone, from one base, over three seeds.

    make sft collect reward
    python -m benchmarks.ablations --run_dir runs/helpdesk --page docs/ablations.md --plot docs/images/ablations.png

All trainings start from the SFT model and the reward model of one run; the seeds are those of PPO. The judge is the gold rule, which takes
no part in training. Trainings are kept in `<run_dir>/ablations`: started again, the command goes on with those that are missing.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.helpdesk_stage import run_stage
from benchmarks.pages import add_page_flags, replace_table
from benchmarks.side_by_side import Figures, machine, tell
from tieback.pipeline.report.curves import read_log
from tieback.pipeline.report.judging import Evaluation, evaluations

JUDGE = "tieback.data.helpdesk:gold_reward"
_EVERY = 10
BASE = "base"
# The base is the recipe, but for these.
_BASE_SETTINGS = {"whiten_advantages": "true", "kl_target": "null"}
# Of each subject, the settings that differ from the base, by what the page calls them.
SUBJECTS: dict[str, dict[str, dict[str, str]]] = {
    "advantages": {"not whitened": {"whiten_advantages": "false"}},
    "value clipping": {"none": {"value_clip_range": "null"}},
    "KL coefficient": {"0.03": {"kl_coef": "0.03"}, "0.48": {"kl_coef": "0.48"}},
    "place of the KL": {"loss, 0.12": {"kl_coef": "0", "kl_loss_coef": "0.12"}},
    "critic warm-up": {"none": {"critic_warmup_iterations": "0"}},
    "λ": {"0.8": {"gae_lambda": "0.8"}, "1": {"gae_lambda": "1"}},
    "critic": {"shared": {"critic": "shared", "critic_init": "policy"}},
    "minibatches": {"1": {"num_minibatches": "1"}, "8": {"num_minibatches": "8", "micro_batch_size": "16"}},
}


class Training(NamedTuple):
    """What one training came to.

    Args:
        evaluations: during it.
        explained_variance: of the critic, mean of all iterations.
    """

    evaluations: Sequence[Evaluation]
    explained_variance: float


def variants() -> dict[str, dict[str, str]]:
    """Settings of each variant by its name: the base, and each setting that is changed."""
    changed = {
        f"{subject}: {name}": _BASE_SETTINGS | settings
        for subject, names in SUBJECTS.items()
        for name, settings in names.items()
    }
    return {BASE: _BASE_SETTINGS, **changed}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run_dir", default="runs/helpdesk", help="run with sft, collect and reward (runs/helpdesk)"
    )
    parser.add_argument("--iterations", type=int, default=120, help="of PPO (120, as the recipe has)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of PPO (0 1 2)")
    add_page_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train what is missing, and write figures, table and picture."""
    runs = [(name, seed) for seed in args.seeds for name in variants()]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(runs, pool.map(lambda run: train(*run, args), runs), strict=True))
    found = {name: [done[name, seed] for seed in args.seeds] for name in variants()}
    tell(figures_of(found), args.threads, args.json)
    if args.page:
        replace_table(Path(args.page), table(found, args))
    if args.plot:
        draw(found, Path(args.plot))


def train(name: str, seed: int, args: argparse.Namespace) -> Training:
    """PPO with the settings of a variant; one that has finished is read alone."""
    flags = [part for setting, value in variants()[name].items() for part in (f"--{setting}", value)]
    folder = Path(args.run_dir, "ablations", re.sub(r"\W+", "_", name), f"seed{seed}")
    run_stage(
        "ppo", args.threads, "--run_dir", args.run_dir, "--output_dir", folder, "--seed", seed,
        "--judge_funcs", JUDGE, "--max_steps", args.iterations, "--num_eval_prompts", 300, "--eval_strategy", "steps",
        "--eval_steps", _EVERY, "--save_strategy", "no", "--report_to", "none", *flags,
    )  # fmt: skip
    log = read_log(folder)
    explained = [entry["value/explained_variance"] for entry in log if "value/explained_variance" in entry]
    return Training(evaluations(log), fmean(explained))


def figures_of(found: Mapping[str, Sequence[Training]]) -> Figures:
    """Of each variant what its last evaluations say, means over the seeds."""
    figures: Figures = {}
    for name, trainings in found.items():
        last = [training.evaluations[-1] for training in trainings]
        figures |= {
            f"{name}/judge": fmean(at.judge for at in last),
            f"{name}/judge_lowest": min(at.judge for at in last),
            f"{name}/judge_highest": max(at.judge for at in last),
            f"{name}/reward": fmean(at.reward for at in last),
            f"{name}/kl": fmean(at.kl for at in last),
            f"{name}/explained_variance": fmean(training.explained_variance for training in trainings),
        }
    return figures


def table(found: Mapping[str, Sequence[Training]], args: argparse.Namespace) -> str:
    """The figures as a table of Markdown, under what they were measured by."""
    figures = figures_of(found)
    lines = [
        f"{args.iterations} iterations, seeds {', '.join(map(str, args.seeds))}; {machine()}.",
        "",
        "| | judge (lowest to highest seed) | reward | KL (nats) | explained variance |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in found:
        judge, lowest, highest, reward, kl, explained = (
            f"{figures[f'{name}/{key}']:.2f}"
            for key in ("judge", "judge_lowest", "judge_highest", "reward", "kl", "explained_variance")
        )
        lines.append(f"| {name} | {judge} ({lowest} to {highest}) | {reward} | {kl} | {explained} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Sequence[Training]], path: Path) -> None:
    """The judge's mean along training, a panel for each subject: means over the seeds, and their range."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for axes, (subject, names) in zip(panels, SUBJECTS.items(), strict=False):
        shown = {BASE: BASE} | {f"{subject}: {name}": name for name in names}
        for color, (name, label) in zip(("0.4", "C0", "C1"), shown.items(), strict=False):
            curves = [[at.judge for at in training.evaluations] for training in found[name]]
            steps = [at.step for at in found[name][0].evaluations]
            by_step = list(zip(*curves, strict=True))
            axes.fill_between(
                steps, list(map(min, by_step)), list(map(max, by_step)), color=color, alpha=0.2, lw=0
            )
            axes.plot(steps, list(map(fmean, by_step)), color=color, label=label)
        axes.set_title(subject, fontsize=10)
        axes.legend(fontsize=8, loc="lower left")
        axes.grid(alpha=0.3)
    for axes in panels:
        axes.set_axis_off()
    figure.supxlabel("iteration")
    figure.supylabel("judge (gold score), mean of 300 prompts")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
