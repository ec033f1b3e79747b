"""How the cost of an iteration of PPO grows, and a model of it that says what other sizes take.

    python -m benchmarks.growth --json growth.json --plot docs/images/growth.png

One thing at a time is changed from 32 rows of 32 + 32 tokens, a Llama of hidden 256 and 6 layers, and a vocabulary of 2,048, as
policy, reference, critic and reward model in bf16. The model (`benchmarks.cost_model`) is fitted to that, and then has to say what
five other sizes take, which differ in everything.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from benchmarks.cost_model import PHASES, Gpu, Shape, fit, predict, predict_sharded
from benchmarks.side_by_side import Figures, flag_parser, ours, take_turns, tell

_BASE = Shape(rows=32, prompt=32, completion=32, hidden=256, layers=6, vocabulary=2048)
# What is changed, its label, and the values, of which one is the base's.
_GROWTH: dict[str, tuple[str, list[dict[str, int]]]] = {
    "completion": ("tokens of a response", [{"completion": n} for n in (8, 16, 32, 64, 128)]),
    "vocabulary": ("vocabulary", [{"vocabulary": n} for n in (512, 2048, 8192, 32768)]),
    "rows": ("sequences", [{"rows": n} for n in (8, 16, 32, 64, 128)]),
    "trunk": (
        "weights of a model, millions",
        [
            {"hidden": hidden, "layers": layers}
            for hidden, layers in ((128, 3), (192, 4), (256, 6), (384, 8), (512, 10))
        ],
    ),
}
_HELD_OUT = [
    Shape(rows=48, prompt=64, completion=96, hidden=384, layers=6, vocabulary=8192),
    Shape(rows=24, prompt=16, completion=48, hidden=320, layers=5, vocabulary=4096),
    Shape(rows=16, prompt=48, completion=24, hidden=512, layers=4, vocabulary=16384),
    Shape(rows=64, prompt=100, completion=20, hidden=256, layers=12, vocabulary=2048),
    Shape(rows=12, prompt=24, completion=160, hidden=160, layers=16, vocabulary=1024),
]
# Llama 3.2 1B, Llama 3.1 8B and 70B: 512 sequences of 512 + 512 tokens on 8 GPUs, one minibatch an epoch.
_LARGE = {
    "1b": Shape(rows=512, prompt=512, completion=512, hidden=2048, layers=16, vocabulary=128256, intermediate=8192, kv=512),
    "8b": Shape(rows=512, prompt=512, completion=512, hidden=4096, layers=32, vocabulary=128256, intermediate=14336, kv=1024),
    "70b": Shape(rows=512, prompt=512, completion=512, hidden=8192, layers=80, vocabulary=128256, intermediate=28672, kv=1024),
}  # fmt: skip
_GPUS = 8


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flag_parser("growth", __doc__, rounds=1)
    parser.add_argument("--plot", help="file for the plot (PNG)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, fit, predict, print, and write the files."""
    grown = {name: [replace(_BASE, **changes) for changes in values] for name, (_, values) in _GROWTH.items()}
    shapes = list(dict.fromkeys(shape for of in grown.values() for shape in of))
    seconds = {shape: measure(shape, args.rounds, args.threads) for shape in [*shapes, *_HELD_OUT]}
    rates = fit(shapes, [seconds[shape] for shape in shapes])

    figures: Figures = {}
    for name, of in grown.items():
        for shape in of:
            figures |= {f"seconds/{name}_{_size(shape, name):g}_{p}": s for p, s in seconds[shape].items()}
    for number, shape in enumerate(_HELD_OUT):
        figures |= {f"seconds/held_out{number}_{phase}": s for phase, s in seconds[shape].items()}
    figures |= {f"rate/{phase}_{name}": rate for phase, of in rates.items() for name, rate in of.items()}
    figures |= errors(shapes, seconds, rates, "fitted") | errors(_HELD_OUT, seconds, rates, "held_out")
    # A token of generation costs the host of a GPU what it costs here beside the matrices.
    gpu = Gpu(launch=rates["generate"]["layers"])
    for name, shape in _LARGE.items():
        figures |= {f"gpus/{name}_{p}": s for p, s in predict_sharded(shape, _GPUS, gpu).items()}
    if args.plot is not None:
        draw(Path(args.plot), grown, seconds, rates)
    tell(figures, args.threads, args.json)


def measure(shape: Shape, rounds: int, threads: int) -> dict[str, float]:
    """CPU seconds of an iteration, divided among its phases as the clock divides it."""
    world = {
        "rows": shape.rows,
        "prompt_lengths": (shape.prompt, shape.prompt),
        "max_completion_length": shape.completion,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_layers": shape.layers,
    }
    worker = ours("tieback_ppo.py", json.dumps(world), "bf16", threads, "separate")
    label = f"{shape.rows} x {shape.prompt}+{shape.completion}, {shape.hidden} x {shape.layers}, {shape.vocabulary}"
    found = take_turns({label: worker}, rounds, threads=threads)[label]
    by_clock = sum(found[f"time/{phase}"] for phase in PHASES)
    return {phase: found["cpu"] * found[f"time/{phase}"] / by_clock for phase in PHASES}


def errors(
    shapes: Sequence[Shape],
    seconds: dict[Shape, dict[str, float]],
    rates: dict[str, dict[str, float]],
    label: str,
) -> Figures:
    """How far the model is from what was measured, as a share of it: of the whole iteration, and of each phase (median)."""
    whole = [abs(sum(predict(s, rates).values()) / sum(seconds[s].values()) - 1) for s in shapes]
    by_phase = {p: median(abs(predict(s, rates)[p] / seconds[s][p] - 1) for s in shapes) for p in PHASES}
    return {
        f"error/{label}_median": median(whole),
        f"error/{label}_max": max(whole),
        **{f"error/{label}_{phase}": value for phase, value in by_phase.items()},
    }


def draw(
    path: Path,
    grown: dict[str, list[Shape]],
    seconds: dict[Shape, dict[str, float]],
    rates: dict[str, dict[str, float]],
) -> None:
    """Measured seconds as points, those of the model as lines, against each size."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for axes, (name, shapes) in zip(figure.subplots(2, 2).flat, grown.items(), strict=True):
        sizes = [_size(shape, name) for shape in shapes]
        for phase in PHASES:
            (points,) = axes.loglog(sizes, [seconds[shape][phase] for shape in shapes], "o", label=phase)
            modelled = [predict(shape, rates)[phase] for shape in shapes]
            axes.loglog(sizes, modelled, "-", color=points.get_color(), linewidth=1)
        axes.set_xticks(sizes, [f"{size:,.3g}" if name == "trunk" else f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(_GROWTH[name][0])
        axes.set_ylabel("CPU seconds")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = "points: measured, lines: model"
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PHASES), title=title)
    figure.savefig(path, dpi=110)


def _size(shape: Shape, name: str) -> float:
    return shape.trunk / 1e6 if name == "trunk" else float(getattr(shape, name))


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
