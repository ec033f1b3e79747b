"""What an iteration of PPO costs: operations counted from the shapes, rates fitted to measurements, phase by phase.

The operations of a Llama are counted in closed form (Kaplan et al. 2020, section 2.1: two a weight and token forward, four backward,
and those of attention). What they take is linear in a few counts, whose coefficients are fitted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

PHASES = ("generate", "score", "logprobs", "update")
PPO_EPOCHS = 4
TOKENS_AT_A_TIME, TOKENS_AT_A_TIME_ON_GPU = 1024, 8192


@dataclass(frozen=True)
class Shape:
    """Size of an iteration; every completion is of the same length.

    Args:
        rows: sequences.
        prompt, completion: tokens of each.
        hidden, layers, vocabulary: of policy, reference, critic and reward model alike.
        intermediate: width of the gated layers; 0 for 11/4 of `hidden`.
        kv: width of keys, and of values; 0 for that of `hidden`.
    """

    rows: int
    prompt: int
    completion: int
    hidden: int
    layers: int
    vocabulary: int
    intermediate: int = 0
    kv: int = 0

    @property
    def trunk(self) -> int:
        """Weights of a model without embeddings and head."""
        wide, kv = self.intermediate or self.hidden * 11 // 4, self.kv or self.hidden
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * wide)

    @property
    def tokens(self) -> int:
        """In a pass of one model over all sequences."""
        return self.rows * (self.prompt + self.completion)

    @property
    def trunk_operations(self) -> float:
        """Of one pass forward without the head."""
        attention = 2 * self.layers * self.hidden * (self.prompt + self.completion)  # half of it is masked
        return self.tokens * (2.0 * self.trunk + attention)

    @property
    def head_operations(self) -> float:
        """Of the head forward on all completions."""
        return 2.0 * self.rows * self.completion * self.hidden * self.vocabulary

    @property
    def passes(self) -> int:
        """Passes that a model takes for all rows."""
        return -(-self.tokens // TOKENS_AT_A_TIME)


def counts(shape: Shape) -> dict[str, dict[str, float]]:
    """What the time of each phase is linear in.

    Returns:
        By phase: `operations` of matrices, elements of `logits`, `layers` that are called, `weights` that are read (in
        generation, once a token) or updated, and elements of the `cache` that each token of generation reads and copies.
    """
    trunk, head = shape.trunk_operations, shape.head_operations
    logits = float(shape.rows * shape.completion * shape.vocabulary)
    called = float(shape.layers * shape.passes)
    whole = float(shape.trunk + shape.hidden * shape.vocabulary)
    keys_and_values = 2.0 * shape.layers * (shape.kv or shape.hidden)
    cache = shape.rows * shape.completion * (shape.prompt + shape.completion / 2) * keys_and_values
    trained = 2 * shape.trunk + 3 * shape.hidden * shape.vocabulary  # policy; critic, which has no head
    return {
        "generate": {
            "operations": trunk + head,
            "logits": logits,
            "layers": float(shape.layers * shape.completion),
            "weights": whole * shape.completion,
            "cache": cache,
        },
        "score": {"operations": trunk, "layers": called},
        "logprobs": {"operations": 3 * trunk + 2 * head, "logits": 2 * logits, "layers": 3 * called},
        "update": {
            "operations": PPO_EPOCHS * 3 * (2 * trunk + head),
            "logits": PPO_EPOCHS * logits,
            "layers": PPO_EPOCHS * 2 * called,
            "weights": float(PPO_EPOCHS * trained),
        },
    }


def fit(shapes: Sequence[Shape], seconds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds for one of each count, none of them negative, that fit the measurements with the least squared relative error.

    Args:
        shapes: what was measured.
        seconds: of each, by phase.

    Returns:
        By phase and count.
    """
    found = {}
    for phase in PHASES:
        names = list(counts(shapes[0])[phase])
        table = np.array([[counts(shape)[phase][name] for name in names] for shape in shapes])
        relative = table / np.array([[of[phase]] for of in seconds])
        scale = relative.max(axis=0)
        best, error = np.zeros(len(names)), np.inf
        # Few counts: the best of all subsets whose coefficients come out positive.
        for size in range(1, len(names) + 1):
            for chosen in map(list, combinations(range(len(names)), size)):
                solved = np.linalg.lstsq(relative[:, chosen] / scale[chosen], np.ones(len(shapes)))[0]
                missed = float(((relative[:, chosen] / scale[chosen] @ solved - 1) ** 2).sum())
                if (solved >= 0).all() and missed < error:
                    best, error = np.zeros(len(names)), missed
                    best[chosen] = solved / scale[chosen]
        found[phase] = dict(zip(names, best.tolist(), strict=True))
    return found


def predict(shape: Shape, rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """Seconds of each phase."""
    return {
        phase: sum(rates[phase][name] * count for name, count in of.items())
        for phase, of in counts(shape).items()
    }


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU among several. Those of the defaults are an H100's data sheet times what is commonly reached: assumed,
    not measured.

    Args:
        operations: matrix operations a second, in bf16.
        bandwidth: bytes of its own memory a second.
        link: bytes a second that it exchanges with the others.
        launch: seconds that one layer costs the host at each token of generation, as a CPU's fitted `layers` says.
    """

    operations: float = 0.4 * 989e12
    bandwidth: float = 0.6 * 3.35e12
    link: float = 0.5 * 450e9
    launch: float = 5e-4


def predict_sharded(shape: Shape, gpus: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of each phase on several GPUs that share the rows, and hold weights of 2 bytes sharded (ZeRO-3, FSDP2).

    The policy is gathered whole to generate; every other pass gathers each layer once forward and once backward, and
    gradients are scattered in 4 bytes.

    Args:
        shape: of all GPUs together.
        gpus: how many.
        gpu: what each does.
    """
    operations, head = shape.trunk_operations / gpus, shape.head_operations / gpus
    whole = 2.0 * (shape.trunk + shape.hidden * shape.vocabulary)
    gather = whole * (gpus - 1) / gpus / gpu.link
    passes = math.ceil(shape.tokens / gpus / TOKENS_AT_A_TIME_ON_GPU)
    decode = max(whole / gpu.bandwidth, gpu.launch * shape.layers)
    # Of policy and critic: weights forward and backward, and gradients of twice their bytes.
    exchanged = 2 * gather * (1 + 1 + 2) * passes
    return {
        "generate": gather + (operations + head) / gpu.operations + shape.completion * decode,
        "score": gather * passes + operations / gpu.operations,
        "logprobs": 3 * gather * passes + (3 * operations + 2 * head) / gpu.operations,
        "update": PPO_EPOCHS * (3 * (2 * operations + head) / gpu.operations + exchanged),
    }
