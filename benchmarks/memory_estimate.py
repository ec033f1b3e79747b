"""What `tieback memory` says that ppo.py will need, beside what it then needs.

    python -m benchmarks.memory_estimate --json memory_estimate.json

Untrained Llamas of 9, 38 and 135 million weights with a vocabulary of 49,152: an iteration of 32 × (64 + 32) tokens in two
minibatches, 8 rows a pass, in fp32 on the CPU; with everything trained (four whole models), and with LoRA on one base (and a
reward model of its own). What is measured is the greatest resident memory of ppo.py, less what it needs for a Llama of a few
thousand weights: that is of the libraries, which the estimate leaves out.

It is measured twice: once with glibc told to give back whatever is freed (MALLOC_MMAP_THRESHOLD_), and once as it is, when it
keeps a part of that for later.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.side_by_side import Figures, tell, threads_of
from tieback.data.tokenizer import train_tokenizer

SIZES: dict[str, dict[str, int]] = {
    "9m": {"hidden_size": 160, "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 432},
    "38m": {"hidden_size": 384, "num_hidden_layers": 11, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 1024},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536},
}  # fmt: skip
SMALLEST = {"vocab_size": 700, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}  # fmt: skip
VOCABULARY, PROMPT_LENGTH = 49_152, 64
KINDS: dict[str, list[str]] = {
    "whole": [],
    "lora": ["--use_peft", "--lora_r", "16", "--lora_target_modules", "all-linear", "--critic", "adapter"],
}
SETTINGS: dict[str, Any] = {
    "max_prompt_length": PROMPT_LENGTH, "max_completion_length": 32, "missing_eos_penalty": 0.0, "critic_init": "policy",
    "per_device_train_batch_size": 32, "num_minibatches": 2, "micro_batch_size": 8, "per_device_eval_batch_size": 8,
    "max_steps": 1, "num_ppo_epochs": 1, "learning_rate": 1e-5, "bf16": False, "use_cpu": True,
    "save_strategy": "no", "report_to": "none",
}  # fmt: skip
MIB = 2**20
# Linux counts in a process's ru_maxrss what the process that started it held: a small one in between keeps ours out.
_LAUNCHER = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, usage.ru_maxrss, usage.ru_utime + usage.ru_stime]))
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models (all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ppo.py (1)")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Estimate, measure, print, and write the file."""
    figures: Figures = {}
    libraries: Figures = {}
    for size, shape in {"smallest": SMALLEST, **{size: SIZES[size] for size in args.sizes}}.items():
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            make_models(home, shape)
            for kind, flags in KINDS.items():
                estimate, runs = estimate_and_runs(home, flags, args.threads)
                print(f"{size} {kind}: {estimate:,.0f} MiB estimated; {runs}", flush=True)
                if size == "smallest":
                    libraries |= {f"{name}_{kind}": run.peak_mib - estimate for name, run in runs.items()}
                    continue
                figures[f"estimate_mib/{size}_{kind}"] = estimate
                for name, run in runs.items():
                    measured = run.peak_mib - libraries[f"{name}_{kind}"]
                    figures[f"{name}_mib/{size}_{kind}"] = measured
                    figures[f"ratio/{name}_{size}_{kind}"] = estimate / measured
                figures[f"ratio/cpu_{size}_{kind}"] = runs["given_back"].cpu / runs["kept"].cpu
    tell(figures, args.threads, args.json)


def make_models(home: Path, shape: dict[str, int]) -> None:
    """Write a policy, a reward model, their tokenizer and prompts of `PROMPT_LENGTH` tokens."""
    words = [f"w{i}" for i in range(100)]
    tokenizer = train_tokenizer([" " + " ".join(words)] * 4, 700)
    size: Any = {"vocab_size": VOCABULARY, **shape, "tie_word_embeddings": True}
    config = LlamaConfig(**size, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(home / "policy")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(home / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(home / name)
    rows = []
    for first in range(64):
        text = "".join(f" {words[(first + i) % len(words)]}" for i in range(200))
        ids = tokenizer(text, add_special_tokens=False).input_ids[:PROMPT_LENGTH]
        rows.append({"prompt": tokenizer.decode(ids)})
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "ppo.yaml").write_text("{}\n")


@dataclass(frozen=True)
class Run:
    """Greatest resident memory of a program, libraries and all, and its CPU seconds."""

    peak_mib: float
    cpu: float


def estimate_and_runs(home: Path, flags: Sequence[str], threads: int) -> tuple[float, dict[str, Run]]:
    """What is estimated, in MiB, and what ppo.py needed, by what glibc does with freed memory."""
    named = {
        "config": home / "ppo.yaml",
        "run_dir": home / "run",
        "model_name_or_path": home / "policy",
        "reward_funcs": home / "reward",
        **SETTINGS,
    }
    settings = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    python = [sys.executable, "-m"]
    written = home / "memory.json"
    run([*python, "tieback.pipeline.memory", *settings, *flags, "--json", str(written)], threads_of(threads))
    data = ["--dataset_name", str(home / "prompts.jsonl"), "--overwrite", "true"]
    command = [*python, "tieback.pipeline.ppo", *settings, *flags, *data]
    runs = {
        "given_back": run(command, threads_of(threads) | {"MALLOC_MMAP_THRESHOLD_": "131072"}),
        "kept": run(command, threads_of(threads)),
    }
    return json.loads(written.read_text())["peak"] / MIB, runs


def run(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run a program to its end.

    Raises:
        RuntimeError: it failed; with the last lines that it wrote.
    """
    with tempfile.TemporaryFile("w+") as log:
        launched = [sys.executable, "-S", "-c", _LAUNCHER, *command]
        done = subprocess.run(launched, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        returncode, peak_kib, cpu = json.loads(done.stdout)
        if returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    return Run(peak_kib / 1024, cpu)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
