"""The README's commands for data and models of one's own, run on a tiny Qwen3 that stands for the one of the hub."""

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from tieback.cli.arguments import parse_flags
from tieback.pipeline.rlhf import RlhfArguments, commands

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Your data and your models")[1].split("\n## ")[0]
NAME = "Qwen/Qwen3-0.6B"
# What makes minutes of hours, and nothing else.
SMALLER = {
    "sft": ["--max_steps", "2", "--lora_r", "4", "--report_to", "none"],
    "collect": ["--max_rows", "4", "--max_completion_length", "8"],
    "reward": ["--max_steps", "2", "--lora_r", "4", "--report_to", "none"],
    "ppo": [
        *("--max_steps", "2", "--per_device_train_batch_size", "8", "--num_eval_prompts", "2"),
        *("--max_completion_length", "8", "--lora_r", "4", "--report_to", "none"),
    ],
    "evaluate": ["--num_prompts", "4", "--num_resamples", "2000"],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the model (by its hub name), a reward model, preference pairs, prompts and the README's function."""
    tok = toy.tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    special = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    config = Qwen3Config(vocab_size=len(tok), tie_word_embeddings=True, **sizes, **heads, **special)
    folders = {NAME: Qwen3ForCausalLM(config)}
    config.num_labels = 1
    folders["path/to/reward_model"] = AutoModelForSequenceClassification.from_config(config)
    for name, model in folders.items():
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    prompts = [row["prompt"] for row in toy.prompts(24)]
    pairs = [
        {"prompt": prompt, "chosen": [said("yes")], "rejected": [said("no no no")]} for prompt in prompts
    ]
    write(tmp_path / "pairs.jsonl", pairs)
    write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(prompts, completions, completion_ids, **columns):\n"
        "    return [-float(len(ids)) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    # Other tests have a module of this name, too.
    sys.modules.pop("my_rewards", None)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def readme_command(beginning: str) -> list[str]:
    """Words of the section's command that begins so."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)).replace("\\\n", " ")
    (line,) = [line for line in blocks.splitlines() if line.startswith(beginning)]
    return shlex.split(line)


def run(stage: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [stage, *words, *SMALLER[stage]])
    importlib.import_module(f"tieback.pipeline.{stage}").main()


def test_ppo_on_a_model_of_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = readme_command("accelerate launch pipeline/ppo.py")
    run("ppo", words[words.index("pipeline/ppo.py") + 1 :], monkeypatch)
    made = home / "runs" / "Qwen-Qwen3-0.6B" / "ppo"
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["train/iterations"] == 2
    assert metrics["policy/ratio"] == pytest.approx(1, abs=0.1)
    assert (made / "adapter_model.safetensors").is_file()
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == NAME


@pytest.mark.slow
def test_all_stages_on_a_model_of_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (arguments,) = parse_flags(RlhfArguments, "tieback rlhf", readme_command("tieback rlhf")[2:])
    for command in commands(arguments, []):
        run(Path(command[0]).stem, command[1:], monkeypatch)
    made = home / "runs" / "Qwen-Qwen3-0.6B"
    assert {path.parent.name for path in made.glob("*/metrics.json")} == set(SMALLER)
    for stage in ("sft", "ppo"):
        adapter = json.loads((made / stage / "adapter_config.json").read_text())
        # All linear layers of a Qwen3.
        assert {name.rsplit(".", 1)[-1] for name in adapter["target_modules"]} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
    assert (made / "evaluate" / "report.html").is_file()
