"""Where a minute of labelling counts most: accuracy of the reward model against the number of judgements, by the order of the items.

    make sft collect
    python -m benchmarks.label_order --run_dir runs/helpdesk --page docs/human_feedback.md --plot docs/images/label_order.png

The simulated annotator ranks the responses that collect left, in random order, or as `label --uncertain_to` shows them: first some at
random, then those that the reward model of the rankings so far is least sure of. The reward models are held to the gold rule, without the
annotator's noise, on items that no order contains. They are kept in `<run_dir>/label_order`: started again, the command
goes on with those that are missing.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.helpdesk_stage import run_stage
from benchmarks.pages import add_page_flags, replace_table
from benchmarks.side_by_side import Figures, machine, tell
from tieback.data.helpdesk import annotate, gold_totals
from tieback.data.rankings import ranking_to_pairs
from tieback.pipeline.labelling.items import Item, read_responses
from tieback.pipeline.labelling.ordering import most_uncertain_first
from tieback.pipeline.scorers import load_reward_scorer

ORDERS = ("random", "uncertain first")
_HELD_OUT = 800
# Accuracy of each order, by the number of judgements.
Curves = dict[str, dict[int, float]]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.label_order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run_dir", default="runs/helpdesk", help="run with sft and collect (runs/helpdesk)")
    parser.add_argument(
        "--judgements", type=int, nargs="+", default=[250, 500, 1000], help="numbers of them (250 500 1000)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of each reward model (3)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of items, annotator and training (0 1 2)"
    )
    add_page_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train what is missing, and write figures, table and picture."""
    items = read_responses(Path(args.run_dir, "collect", "responses.jsonl"))
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda seed: curves_of(items, seed, args), args.seeds))
    tell(figures_of(found), args.threads, args.json)
    if args.page:
        replace_table(Path(args.page), table(found, args))
    if args.plot:
        draw(found, Path(args.plot))


def curves_of(items: Sequence[Item], seed: int, args: argparse.Namespace) -> Curves:
    """Both curves of one seed; they begin with the same reward model."""
    shuffled = random.Random(seed).sample(items, len(items))
    held_out, pool = shuffled[:_HELD_OUT], shuffled[_HELD_OUT:]
    counts = sorted(args.judgements)
    curves: Curves = {}
    for order in ORDERS:
        shown: list[Item] = []
        curves[order] = {}
        newest = None
        for count in counts:
            seen = {item.item_id for item in shown}
            rest = [item for item in pool if item.item_id not in seen]
            if order != "random" and newest is not None:
                rest = most_uncertain_first(rest, [str(newest)])
            shown += rest[: count - len(shown)]
            name = "first" if newest is None else order.replace(" ", "_")
            newest = Path(args.run_dir, "label_order", f"seed{seed}", f"{name}_{count}")
            train(newest, shown, seed, args)
            curves[order][count] = accuracy(newest, held_out)
    return curves


def train(folder: Path, items: Sequence[Item], seed: int, args: argparse.Namespace) -> None:
    """A reward model of what the simulated annotator says of these items."""
    pairs = [pair for item in items for pair in judged(item, seed)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    run_stage(
        "reward", args.threads, "--run_dir", args.run_dir, "--dataset_name", data, "--output_dir", folder, "--seed", seed,
        "--num_train_epochs", args.epochs, "--held_out_fraction", 0.04, "--save_strategy", "no", "--report_to", "none",
    )  # fmt: skip


def judged(item: Item, seed: int) -> list[dict[str, object]]:
    """Pairs of one item, as the simulated annotator orders them."""
    ((ranks, _),) = annotate(gold_totals(item.row), seed, item.row["prompt_id"])
    return ranking_to_pairs({**item.row, "ranks": ranks})


def accuracy(folder: Path, items: Sequence[Item]) -> float:
    """Share of the pairs of responses, not tied by the gold rule, that a reward model orders as the rule does."""
    prompts = [item.row["prompt"] for item in items for _ in item.row["responses"]]
    texts = [[{"role": "assistant", "content": text}] for item in items for text in item.row["responses"]]
    scores = iter(load_reward_scorer(str(folder), 64, "reward").score(prompts, texts))
    right = []
    for item in items:
        own = [next(scores) for _ in item.row["responses"]]
        gold = gold_totals(item.row)
        right += [
            (own[one] > own[other]) == (gold[one] > gold[other])
            for one, other in combinations(range(len(own)), 2)
            if gold[one] != gold[other]
        ]
    return fmean(right)


def figures_of(found: Sequence[Curves]) -> Figures:
    """Accuracies, means over the seeds, with the lowest and the highest."""
    figures: Figures = {}
    for order in ORDERS:
        for count in found[0][order]:
            values = [curves[order][count] for curves in found]
            figures |= {
                f"{order}/{count}": fmean(values),
                f"{order}/{count}/lowest": min(values),
                f"{order}/{count}/highest": max(values),
            }
    return figures


def table(found: Sequence[Curves], args: argparse.Namespace) -> str:
    """The figures as a table of Markdown, under what they were measured by."""
    figures = figures_of(found)
    counts = list(found[0][ORDERS[0]])
    lines = [
        f"{args.epochs} epochs, seeds {', '.join(map(str, args.seeds))}; {machine()}.",
        "",
        f"| judgements | {' | '.join(f'{count:,}' for count in counts)} |",
        f"| --- |{' --- |' * len(counts)}",
    ]
    for order in ORDERS:
        cells = [
            f"{figures[f'{order}/{count}']:.3f} ({figures[f'{order}/{count}/lowest']:.3f} to {figures[f'{order}/{count}/highest']:.3f})"
            for count in counts
        ]
        lines.append(f"| {order} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Sequence[Curves], path: Path) -> None:
    """Accuracy against the number of judgements: means over the seeds, and their range."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for color, order in zip(("0.4", "C0"), ORDERS, strict=True):
        counts = list(found[0][order])
        values = [[curves[order][count] for curves in found] for count in counts]
        axes.fill_between(
            counts, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2, lw=0
        )
        axes.plot(counts, list(map(fmean, values)), color=color, marker="o", label=order)
    axes.set_xlabel("judgements (items of four responses)")
    axes.set_ylabel("pairs ordered as by the gold rule")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
