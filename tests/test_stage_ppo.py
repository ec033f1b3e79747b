"""The stage script pipeline/ppo.py: what it refuses, adapters of this and the SFT stage, and what it goes on from."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import toy
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from tieback.cli.errors import UsageError
from tieback.pipeline import ppo
from tieback.reward_model.adapter import write_scalar_adapter


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with SFT models, reward models, and prompts."""
    folder = tmp_path_factory.mktemp("run")
    tok = toy.tokenizer()
    models = {
        "sft": toy.brief_policy(tok),
        "reward": toy.reward_model(tok),
        "two_labels": toy.reward_model(tok, num_labels=2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    base = AutoModelForCausalLM.from_pretrained(folder / "sft")
    adapted = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False))
    adapted.save_pretrained(folder / "sft_adapter")
    tok.save_pretrained(folder / "sft_adapter")
    (folder / "prompts.jsonl").write_text('{"prompt": "red cat"}\n' * 12)
    (folder / "empty.jsonl").write_text("")
    (folder / "queries.jsonl").write_text('{"query": "red cat"}\n' * 12)
    (folder / "blank.jsonl").write_text('{"prompt": "red cat"}\n' * 9 + '{"prompt": " "}\n')
    (folder / "long.jsonl").write_text(
        '{"prompt": "red cat"}\n' * 9 + json.dumps({"prompt": "red cat " * 60}) + "\n"
    )
    (folder / "few.jsonl").write_text('{"prompt": "red cat"}\n' * 10)
    talk = {"prompt": [{"role": "user", "content": "red cat"}]}
    (folder / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 12)
    models["reward"].save_pretrained(folder / "mute")
    mute = toy.tokenizer()
    mute.chat_template = None
    mute.save_pretrained(folder / "mute")
    torch.manual_seed(5)
    config = BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "encoder")
    tok.save_pretrained(folder / "encoder")
    toy.reward_model(tok, seed=7).save_pretrained(folder / "critic")
    adapter = toy.reward_adapter()
    adapter.config.base_model_name_or_path = str(folder / "sft")
    own = (adapter.weights, adapter.head, base.config, adapter.bias)
    write_scalar_adapter(folder / "critic_adapter", adapter.config, *own)
    return folder


FAULTS: dict[str, tuple[list[str], str]] = {
    "no such reward model": (
        ["--reward_funcs", "{run}/nowhere"],
        r"reward_funcs: no reward model can be loaded from .*nowhere: ",
    ),
    "no such function": (
        ["--reward_funcs", "json:nothing"],
        r"reward_funcs: json:nothing cannot be imported .*nothing.*Write module:function",
    ),
    "no such module": (["--reward_funcs", "not_there:f"], r"reward_funcs: not_there:f cannot be imported"),
    "a language model": (
        ["--reward_funcs", "{run}/sft"],
        r"reward_funcs: .*sft is a LlamaForCausalLM, not a reward model",
    ),
    "two labels": (["--reward_funcs", "{run}/two_labels"], r"two_labels has 2 labels \(LABEL_0, LABEL_1\)"),
    "no reward model for the critic": (
        ["--reward_funcs", "json:dumps"],
        r"critic_init is 'reward', but reward_funcs names no reward model: set critic_init to 'policy'",
    ),
    "conversations for a reward model that cannot read them": (
        ["--dataset_name", "{run}/talks.jsonl", "--reward_funcs", "{run}/mute"],
        r"conversations, but the reward model's tokenizer \(.*mute\) has no chat template",
    ),
    "an encoder for the critic": (
        ["--reward_funcs", "{run}/encoder"],
        r"critic is a BertForSequenceClassification without a `score` head .*critic_init policy.*value_model",
    ),
    "no such critic": (
        ["--value_model", "{run}/nowhere"],
        r"value_model: no model can be loaded from .*nowhere",
    ),
    "weights": (["--reward_weights", "1", "2"], r"reward_weights has 2 entries for 1 reward functions"),
    "an empty file": (["--dataset_name", "{run}/empty.jsonl"], r"empty\.jsonl"),
    "no prompt column": (["--dataset_name", "{run}/queries.jsonl"], r"queries\.jsonl.*prompt"),
    "an empty prompt": (["--dataset_name", "{run}/blank.jsonl"], r"blank\.jsonl, line 10, column `prompt`"),
    "a prompt longer than the context": (
        ["--dataset_name", "{run}/long.jsonl"],
        r"prompt 10 has \d+ tokens .* context holds 64.*max_prompt_length",
    ),
    "no prompt left to train on": (
        ["--dataset_name", "{run}/few.jsonl", "--num_eval_prompts", "10"],
        r"num_eval_prompts=10 leaves none of 10 prompts to train on",
    ),
    "too few prompts": (
        ["--dataset_name", "{run}/few.jsonl", "--num_eval_prompts", "3"],
        r"has 7 prompts, but one iteration takes 8",
    ),
    "no number of prompts": (["--num_eval_prompts", "-3"], r"num_eval_prompts must be at least 0, got -3"),
    "a completion that leaves no room for a prompt": (
        ["--max_completion_length", "64"],
        r"12 of 12 prompts are too long: .* context holds 64\. Lower max_completion_length\.",
    ),
    "a reward model for the policy": (
        ["--model_name_or_path", "{run}/reward"],
        r"No language model can be loaded from .*reward: it is a classifier",
    ),
    "the best of no evaluation": (
        ["--save_strategy", "best"],
        r"save_strategy=best .* need evaluations during training: .*num_eval_prompts",
    ),
    "prompts as texts to imitate": (
        ["--ptx_dataset_name", "{run}/prompts.jsonl"],
        r"prompts.jsonl, line 1: demonstrations need `prompt` and `completion`",
    ),
    "a weight without texts": (["--ptx_coef", "1.0"], r"ptx_coef is 1\.0, .* is missing: give both"),
    "fp16": (["--fp16", "true"], r"fp16=True is not supported"),
    "a reward function with other parameters": (
        ["--reward_funcs", "json:dumps", "--critic_init", "policy"],
        r"The reward function `dumps` cannot judge train_dataset: missing a required argument: 'obj'",
    ),
    "a reward function that returns no list": (
        ["--reward_funcs", "builtins:dict", "--critic_init", "policy"],
        r"The reward function `dict` returned dict, not a list of numbers",
    ),
}


def run(run_dir: Path, output_dir: Path, *options: str) -> None:
    """The stage in this process, by the smoke recipe."""
    recipe = Path(ppo.__file__).parent / "recipes" / "smoke" / "ppo.yaml"
    given = {
        "config": recipe,
        "run_dir": run_dir,
        "output_dir": output_dir,
        "dataset_name": run_dir / "prompts.jsonl",
        "num_eval_prompts": 0,
        "report_to": "none",
        "use_cpu": True,
    }
    argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ppo.py", *argv, *options])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        ppo.main()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_refused_with_a_message(run_dir: Path, tmp_path: Path, fault: str) -> None:
    options, message = FAULTS[fault]
    options = [option.replace("{run}", str(run_dir)) for option in options]
    with pytest.raises(UsageError, match=f"(?s){message}"):
        run(run_dir, tmp_path, *options)
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("name", "options"),
    [("critic", ()), ("critic_adapter", ("--use_peft", "--model_name_or_path", "{run}/sft"))],
)
def test_the_critic_starts_from_the_model_that_value_model_names(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[str, ...]
) -> None:
    critics = []

    def keep(trainer: ppo.PPOTrainer, **_: object) -> None:
        critics.append(trainer.model.critic.score.weight.detach().clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo.PPOTrainer, "train", keep)
    options = tuple(option.replace("{run}", str(run_dir)) for option in options)
    with pytest.raises(KeyboardInterrupt):
        run(run_dir, tmp_path, "--value_model", str(run_dir / name), *options)
    file = run_dir / name / ("adapter_model.safetensors" if options else "model.safetensors")
    (head,) = [tensor for key, tensor in load_file(file).items() if key.endswith("score.weight")]
    assert critics[0].equal(head)


# Adapters.


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_new_adapter_is_saved_alone_and_loads_on_the_sft_model(run_dir: Path, tmp_path: Path) -> None:
    run(run_dir, tmp_path, "--use_peft", "--lora_r", "4", "--learning_rate", "0.05")
    assert not (tmp_path / "model.safetensors").exists()
    trained = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    sft = logits(AutoModelForCausalLM.from_pretrained(run_dir / "sft"))
    assert (logits(trained) - sft).abs().max() > 1e-2
    with trained.disable_adapter():
        torch.testing.assert_close(logits(trained), sft, rtol=0, atol=0)


def test_an_sft_adapter_goes_on_being_trained_on_its_base_and_stays_the_reference(
    run_dir: Path, tmp_path: Path
) -> None:
    options = ["--model_name_or_path", str(run_dir / "sft_adapter"), "--use_peft", "--learning_rate", "0.05"]
    run(run_dir, tmp_path, *options, "--lora_r", "4")
    trained = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert trained.peft_config["default"].base_model_name_or_path == str(run_dir / "sft")
    sft = AutoPeftModelForCausalLM.from_pretrained(run_dir / "sft_adapter")
    assert (logits(trained) - logits(sft)).abs().max() > 1e-2
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["kl/ref"] == 0
    with pytest.raises(UsageError, match=r"lora_r: 8 is asked for, but the adapter in .*sft_adapter.* has 4"):
        run(run_dir, tmp_path / "refused", *options, "--lora_r", "8")


def test_without_lora_an_sft_adapter_is_merged_and_the_whole_model_trained(
    run_dir: Path, tmp_path: Path
) -> None:
    run(run_dir, tmp_path, "--model_name_or_path", str(run_dir / "sft_adapter"), "--learning_rate", "0.0")
    sft = logits(AutoPeftModelForCausalLM.from_pretrained(run_dir / "sft_adapter"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), sft, rtol=0, atol=1e-5)


def test_the_critic_can_start_from_the_policy_and_rewards_be_functions_alone(
    run_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "functions"
    folder.mkdir()
    (folder / "lengths.py").write_text(
        "def short(completions, **_):\n    return [-len(text) for text in completions]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(run_dir, tmp_path, "--reward_funcs", "lengths:short", "--critic_init", "policy")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reward/short"] < 0
    assert metrics["num_prompts/train"] == 12
    assert metrics["train/iterations"] == 2


def test_texts_are_imitated_that_a_file_holds(run_dir: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"cat dog {word} up"}) + "\n" for word in ("red", "blue", "no"))
    )
    run(run_dir, tmp_path, "--ptx_dataset_name", str(texts), "--ptx_max_rows", "2", "--ptx_coef", "0.5")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_demonstrations/ptx"] == 2
    assert metrics["imitation/loss"] > 1


@pytest.fixture(scope="module")
def interrupted(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first iteration of two: its folder."""
    output = tmp_path_factory.mktemp("interrupted") / "ppo"
    run(run_dir, output, *KILLED)
    (output / "metrics.json").unlink()
    shutil.rmtree(output / "checkpoint-2")
    return output


KILLED = ("--save_steps", "1", "--save_total_limit", "5")


def move(path: Path) -> None:
    """Other weights under the same name."""
    weights = load_file(path)
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, path, metadata={"format": "pt"})


CHANGES = {
    "the SFT model": ("sft/model.safetensors", [], r"\(model was '\w{16}', is '\w{16}'\)"),
    "the reward model": (
        "reward/model.safetensors",
        [],
        r"\(reward_funcs was \['\w{16}'\], is \['\w{16}'\]; value_model was '\w{16}', is '\w{16}'\)",
    ),
    "the prompts": ("prompts.jsonl", [], r"\(train_dataset was '\w{16}', is '\w{16}'\)"),
    "the split": (None, ["--num_eval_prompts", "1"], r"\(train_dataset was '\w{16}', is '\w{16}'\)"),
    "the critic": (None, ["--critic_init", "policy"], r"\(value_model was '\w{16}', is 'of the policy'\)"),
    "a rate": (None, ["--learning_rate", "0.5"], r"\(learning_rate was 0\.001, is 0\.5\)"),
}


@pytest.mark.parametrize("asked", [(), ("--resume_from_checkpoint", "true")], ids=["by itself", "asked"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_run_does_not_go_on_with_another_input_or_setting(
    run_dir: Path,
    interrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    asked: tuple[str, ...],
) -> None:
    file, options, message = CHANGES[change]
    output = tmp_path / "ppo"
    shutil.copytree(interrupted, output)
    before = (output / "settings.json").read_bytes()
    monkeypatch.setattr(ppo.PPOTrainer, "generate", lambda *_: pytest.fail("it computed"))
    if file is not None:
        home = tmp_path / "home"
        shutil.copytree(run_dir, home)
        if file.endswith("jsonl"):
            (home / file).write_text((home / file).read_text().replace("red cat", "red dog"))
        else:
            move(home / file)
        run_dir = home
    with pytest.raises(UsageError, match=f"started with other settings {message}"):
        run(run_dir, output, *KILLED, *options, *asked)
    assert (output / "settings.json").read_bytes() == before
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_run_goes_on_with_what_is_named_and_writes_it_down(
    run_dir: Path, interrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ppo"
    shutil.copytree(interrupted, output)
    named = (
        "--learning_rate",
        "0.5",
        "--kl_coef",
        "0.2",
        "--resume_with_changes",
        "kl_coef",
        "learning_rate",
    )
    run(run_dir, output, *KILLED, *named)
    last = [
        entry
        for entry in json.loads((output / "trainer_state.json").read_text())["log_history"]
        if "policy/loss" in entry
    ][-1]
    assert (last["step"], last["learning_rate"], last["kl_coef"]) == (2, 0.25, 0.2)
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["learning_rate"], settings["kl_coef"]) == (0.5, 0.2)
    first = json.loads((output / "checkpoint-1" / "ppo_state.json").read_text())["identity"]
    assert settings["digests"] == first["inputs"]


def test_the_same_files_in_another_folder_are_the_same_run(
    run_dir: Path, interrupted: Path, tmp_path: Path
) -> None:
    home, output = tmp_path / "home", tmp_path / "ppo"
    shutil.copytree(run_dir, home)
    shutil.copytree(interrupted, output)
    run(home, output, *KILLED)
    assert json.loads((output / "metrics.json").read_text())["train/iterations"] == 2


def test_the_last_figures_are_means_of_what_was_logged_and_the_peak_of_memory() -> None:
    log = [
        {"step": step, "policy/loss": float(step), "memory/peak": 100.0 * step, "epoch": 1.0}
        | ({} if step == 12 else {"reward/half": 2.0})
        for step in range(1, 14)
    ]
    found = ppo.last_metrics([*log, {"step": 13, "eval_reward/mean": 1.0}])
    # A figure that was not finite in one iteration is not in its line.
    assert found == {"policy/loss": 8.5, "memory/peak": 1300.0, "reward/half": 2.0}
    assert ppo.last_metrics([]) == {}
