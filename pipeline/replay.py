"""Saved rollouts of PPO (`rollout_dir`): every figure of the rollout computed again, and a page that shows completions token by token.

    tieback ppo --config helpdesk --rollout_dir runs/helpdesk/rollouts
    tieback replay runs/helpdesk/rollouts --log runs/helpdesk/ppo

The figures are computed from the tokens' log-probabilities, values and scores alone, by formulas of their own; so are advantages and returns.
With `--log`, the folder of the run, those of all iterations are held against what was logged. The page shows one iteration (the last where none is named):
the completion that scored best, the one that scored worst, the one farthest from the reference, and those that --rows names.
Exit status 1 where a figure differs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tieback.cli.errors import UsageError, run
from tieback.pipeline.report.curves import read_log
from tieback.pipeline.report.html_parts import number, plain_table
from tieback.pipeline.report.page import document
from tieback.pipeline.report.tokens import completion_html, scale_of
from tieback.pipeline.rollout_files import SavedRollout, read_rollout, saved_iterations

# Sums of 32-bit numbers in another order.
_TOLERANCE = 1e-4


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="tieback replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rollouts", type=Path, help="Folder that rollout_dir named.")
    parser.add_argument(
        "--log", type=Path, help="Folder of the PPO run, with trainer_state.json or checkpoints."
    )
    parser.add_argument("--iteration", type=int, help="Iteration of the page; the last where not set.")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[], help="Further completions of the page, counted from 0."
    )
    parser.add_argument(
        "--output", type=Path, help="The page; <rollouts>/iteration-<number>.html where not set."
    )
    args = parser.parse_args()
    iterations = saved_iterations(args.rollouts)
    if not iterations:
        raise UsageError(f"{args.rollouts} has no rollouts: set rollout_dir for PPO, and name that folder.")
    shown = args.iteration if args.iteration is not None else iterations[-1]
    if shown not in iterations:
        raise UsageError(
            f"{args.rollouts} has no iteration {shown}; there are {iterations[0]} to {iterations[-1]}."
        )
    saved = read_rollout(args.rollouts, shown)
    path = args.output or args.rollouts / f"iteration-{shown:06d}.html"
    path.write_text(page(saved, args.rows), encoding="utf-8")
    for name, value in figures(saved).items():
        print(f"{name:<36} {value:12.5f}")
    print(f"{'advantages and returns, error':<36} {learning_error(saved):12.2g}")
    print(f"The page to read: {path}")
    faults = []
    for iteration in iterations if args.log is not None else [shown]:
        error = learning_error(read_rollout(args.rollouts, iteration))
        if not error <= _TOLERANCE:
            faults.append(f"iteration {iteration}: advantages or returns are off by {error:.3g}")
    if args.log is not None:
        compared, differing = compare_with_log(args.rollouts, iterations, args.log)
        print(f"{compared} figures of {args.log} computed again, {len(differing)} of them differ.")
        faults += differing
    if faults:
        print("\n".join(faults), file=sys.stderr)
        raise SystemExit(1)


def figures(saved: SavedRollout) -> dict[str, float]:
    """The figures of a rollout, by the names that they are logged under (docs/glossary.md)."""
    t, mask = saved.tensors, saved.tensors["mask"]
    lengths = mask.sum(1).float()
    truncated = t["truncated"]
    found = {
        "reward/mean": float(t["raw_scores"].mean()),
        "reward/std": float(t["raw_scores"].std(correction=0)),
        "reward/normalized_mean": float(t["token_scores"].sum(1).mean()),
        "kl/ref": float((t["logprobs"] - t["ref_logprobs"])[mask].sum() / len(mask)),
        "kl_coef": saved.facts.kl_coef,
        "completions/mean_length": float(lengths.mean()),
        "completions/truncated_fraction": float(truncated.float().mean()),
    }
    for name, column in zip(saved.facts.reward_names, t["function_rewards"].T, strict=True):
        found[f"reward/{name}"] = float(column.nanmean())
    if saved.facts.num_generations > 1:
        by_prompt = t["raw_scores"].view(-1, saved.facts.num_generations)
        found["reward/std_within_prompt"] = float(by_prompt.std(1, correction=0).mean())
    counted = mask & ~truncated.unsqueeze(1) if saved.facts.truncation == "mask" else mask
    returns, values = t["returns"][counted], t["values"][counted]
    if returns.numel() > 0 and returns.var(correction=0) > 0:
        residual = (returns - values).var(correction=0)
        found["value/explained_variance"] = float(1 - residual / returns.var(correction=0))
    if "sampler_logprobs" in t:
        gaps = (t["logprobs"] - t["sampler_logprobs"])[mask]
        found["rollout/logprob_gap_mean"] = float(gaps.abs().mean())
        found["rollout/logprob_gap_max"] = float(gaps.abs().max())
        found["rollout/ratio_max"] = math.exp(float(gaps.max()))
    if saved.facts.importance_sampling is not None:
        log_ratios = torch.where(mask, t["logprobs"] - t["sampler_logprobs"], 0.0)
        if saved.facts.importance_sampling == "sequence":
            log_ratios = log_ratios.sum(1, keepdim=True).expand_as(mask)
        ratios, cap = log_ratios.exp()[mask], saved.facts.importance_sampling_cap
        found["rollout/importance_weight_mean"] = float(ratios.clamp(max=cap).mean())
        found["rollout/importance_capped_fraction"] = float((ratios >= cap).float().mean())
    return found


def token_figures(saved: SavedRollout) -> dict[str, Tensor]:
    """What the page colours tokens by, each [B, T]; the reward without the value that `bootstrap` adds at a cut end."""
    t, mask, facts = saved.tensors, saved.tensors["mask"], saved.facts
    d = t["logprobs"] - t["ref_logprobs"]
    penalty = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[facts.kl_estimator]
    reward = torch.where(mask, -facts.kl_coef * penalty, 0.0) + t["token_scores"]
    found = {
        "reward": reward,
        "value": t["values"],
        "advantage": t["advantages"],
        "kl": d,
        "logprob": t["logprobs"],
    }
    if "sampler_logprobs" in t:
        found["ratio"] = torch.exp(t["logprobs"] - t["sampler_logprobs"]) - 1
    return found


def learning_error(saved: SavedRollout) -> float:
    """Greatest difference of the saved advantages and returns to those of the definition, Σ_k (γλ)^k δ_{t+k}.

    A cut completion is left out under `bootstrap`, as the value of its end is not saved.
    """
    t, facts = saved.tensors, saved.facts
    reward = token_figures(saved)["reward"].double()
    worst = 0.0
    for row, mask in enumerate(t["mask"]):
        if facts.truncation == "bootstrap" and t["truncated"][row]:
            continue
        values = t["values"][row, mask].double()
        length = len(values)
        after = torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
        deltas = reward[row, mask] + facts.gamma * after - values
        of_policy = facts.gae_lambda
        if facts.gae_lambda_alpha is not None:
            of_policy = max(0.0, 1 - 1 / (facts.gae_lambda_alpha * length))
        of_critic = of_policy if facts.critic_gae_lambda is None else facts.critic_gae_lambda
        for gae_lambda, saved_ones in (
            (of_policy, t["advantages"][row, mask]),
            (of_critic, (t["returns"] - t["values"])[row, mask]),
        ):
            steps = torch.arange(length)
            ahead = steps[None, :] - steps[:, None]
            weights = torch.where(
                ahead >= 0, torch.tensor(facts.gamma * gae_lambda).double() ** ahead.clamp(min=0), 0.0
            )
            worst = max(worst, float((weights @ deltas - saved_ones.double()).abs().max()))
    return worst


def compare_with_log(folder: Path, iterations: Sequence[int], run_dir: Path) -> tuple[int, list[str]]:
    """How many figures of the log were computed again, and a line for each that differs.

    A log line is a mean over the iterations since the one before it; those of which some are not saved are left out.

    Raises:
        UsageError: there is no log.
    """
    entries = [entry for entry in read_log(run_dir) if "policy/loss" in entry]
    if not entries:
        raise UsageError(
            f"{run_dir} has no trainer_state.json with iterations of PPO, nor a checkpoint with one."
        )
    of = {iteration: figures(read_rollout(folder, iteration)) for iteration in iterations}
    compared, differing, before = 0, [], 0
    for entry in entries:
        span = range(before + 1, entry["step"] + 1)
        before = entry["step"]
        if any(iteration not in of for iteration in span):
            continue
        for name in of[span[0]].keys() & entry.keys():
            mean = sum(of[iteration][name] for iteration in span) / len(span)
            compared += 1
            if abs(mean - entry[name]) > _TOLERANCE * max(1.0, abs(entry[name])):
                differing.append(
                    f"iteration {entry['step']}: {name} was logged as {entry[name]:.6g}, is {mean:.6g}"
                )
    return compared, differing


def page(saved: SavedRollout, rows: Sequence[int]) -> str:
    """The page of an iteration.

    Raises:
        UsageError: there is no such row.
    """
    t, count = saved.tensors, len(saved.rows)
    for row in rows:
        if not 0 <= row < count:
            raise UsageError(f"--rows {row}: the iteration has {count} completions, counted from 0.")
    kl = torch.where(t["mask"], t["logprobs"] - t["ref_logprobs"], 0.0).sum(1)
    scores = t["token_scores"].sum(1)
    chosen = {
        "Highest score": int(scores.argmax()),
        "Lowest score": int(scores.argmin()),
        "Farthest from the reference": int(kl.argmax()),
    } | {f"Completion {row}": row for row in rows}
    by_token = token_figures(saved)
    scales = {name: scale_of(values[t["mask"]].tolist()) for name, values in by_token.items()}
    parts = []
    for title, row in chosen.items():
        written, length = t["mask"][row], len(saved.rows[row]["tokens"])
        cut = ", cut at the limit" if t["truncated"][row] else ""
        facts = (
            f"Row {row}. Raw score {number(float(t['raw_scores'][row]), 3)}, score {number(float(scores[row]), 3)}, "
            f"KL {number(float(kl[row]), 2)} nats, {int(written.sum())} tokens{cut}."
        )
        own = {
            name: torch.where(written, values[row], torch.nan)[:length].tolist()
            for name, values in by_token.items()
        }
        parts.append(completion_html({**saved.rows[row], "facts": facts}, own, title, scales))
    table = plain_table({name: f"{value:.4g}" for name, value in figures(saved).items()})
    title = f"Rollout of iteration {saved.facts.iteration}"
    note = (
        "<p class='note'>Each completion stands once for each figure: blue is above 0, orange below (a log-probability is the more orange the less "
        "likely the token was); the full colour is what 95% of all tokens stay below. The number is shown below the pointer. Grey tokens were not written by the policy.</p>"
    )
    return document(title, f"<h1>{title}</h1>{note}{''.join(parts)}<h2>Figures of the rollout</h2>{table}")


if __name__ == "__main__":
    run(main)
