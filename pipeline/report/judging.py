"""What judges said of PPO while it trained, beside the reward that it maximises."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tieback.pipeline.report.curves import Curve, line_chart
from tieback.pipeline.report.html_parts import number


class Evaluation(NamedTuple):
    """One evaluation during training: means over its prompts."""

    step: int
    kl: float
    reward: float
    judge: float


def evaluations(history: Sequence[dict[str, Any]]) -> list[Evaluation]:
    """Those of a log that judges took part in, in their order."""
    names = ("step", "eval_kl/ref", "eval_reward/mean", "eval_judge/mean")
    return [Evaluation(*(entry[name] for name in names)) for entry in history if "eval_judge/mean" in entry]


def judged_html(history: Sequence[dict[str, Any]]) -> str:
    """Reward and judge against the root of the KL, and in a sentence whether they part; empty without two evaluations.

    The root, as the reward of a proxy and what it stands for are smooth in it (Gao et al. 2022, "Scaling Laws for Reward Model
    Overoptimization", section 3).
    """
    found = evaluations(history)
    if len(found) < 2:
        return ""
    roots = tuple(math.sqrt(max(at.kl, 0.0)) for at in found)
    charts = "".join(
        f"<figure><figcaption><b>{label}</b> {note}</figcaption>"
        f"{line_chart([Curve(label, roots, values)], label, 'root of the KL to the reference (√nats)', unit)}</figure>"
        for label, note, unit, values in (
            ("Reward", "what PPO maximises", "raw score", tuple(at.reward for at in found)),
            ("Judge", "no part in training", "score", tuple(at.judge for at in found)),
        )
    )
    return f'<h2>Reward and judge</h2><p class="note">{verdict(found)}</p><div class="charts">{charts}</div>'


def verdict(found: Sequence[Evaluation]) -> str:
    """Whether what PPO maximises still measures what the judge does."""
    best, last = max(found, key=lambda at: at.judge), found[-1]
    where = f"{number(best.judge, 2)} at iteration {best.step} ({number(best.kl, 1)} nats)"
    if best is last:
        return f"The judge's mean was highest at the last evaluation: {where}."
    end = f"The judge's mean was highest, {where}; at the last evaluation, iteration {last.step}, it was {number(last.judge, 2)}."
    if last.reward <= best.reward:
        return end
    return (
        f"{end} The reward rose from {number(best.reward, 2)} to {number(last.reward, 2)} meanwhile. Where that is more than "
        "chance, the policy exploits the reward: keep the best policy (load_best_model_at_end, metric_for_best_model: "
        "judge/mean), or raise kl_coef."
    )
