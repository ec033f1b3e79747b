"""SFT: what it learns from, what it saves, resume, adapters, and its errors."""

import json
import os
import shutil
import signal
import sys
import time

import psutil
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.trainer_callback import ProgressCallback
from trl import ModelConfig, SFTTrainer

from tieback.cli.errors import UsageError
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline import sft
from tieback.pipeline.arguments import RECIPES
from tieback.pipeline.model_loading import (
    ensure_pad_token,
    load_policy,
    load_tokenizer,
    new_policy,
)
from tieback.pipeline.progress import FiguresInBar, FirstStep
from tieback.pipeline.rollout.sampler import end_of_turn_id

SMOKE = str(RECIPES / "smoke" / "sft.yaml")
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(run_dir, *arguments: str) -> SFTTrainer:
    """Run the stage as from the command line, and give the trainer that it made."""
    made = []

    class Spy(SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sft.py", "--config", SMOKE, "--run_dir", str(run_dir), *arguments])
        patch.setattr(sft, "SFTTrainer", Spy)
        sft.main()
    return made[0]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    trainer = run(run_dir, "--report_to", "none", "--save_total_limit", "2")
    return run_dir, trainer


def test_the_folder_holds_a_model_that_stops_and_pads_as_its_tokenizer(smoke):
    folder = smoke[0] / "sft"
    assert (folder / "model.safetensors").is_file()
    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, tokenizer)
    assert model.num_parameters() == json.loads((folder / "metrics.json").read_text())["num_parameters"]
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert saved["pad_token_id"] == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    assert len(tokenizer) == model.config.vocab_size


def test_metrics_are_numbers_under_the_agreed_names(smoke):
    metrics = json.loads((smoke[0] / "sft" / "metrics.json").read_text())
    assert {"loss/train", "loss/eval", "accuracy/token"} <= metrics.keys()
    assert metrics["num_demonstrations/train"] + metrics["num_demonstrations/eval"] == 80
    # After two small steps from scratch the model still knows little more than the size of its vocabulary.
    assert metrics["loss/eval"] == pytest.approx(torch.tensor(400.0).log().item(), abs=0.3)


def test_the_bar_bears_figures_that_are_logged(smoke):
    (bar,) = (item for item in smoke[1].callback_handler.callbacks if isinstance(item, ProgressCallback))
    assert isinstance(bar, FiguresInBar)
    logged = {name for entry in smoke[1].state.log_history for name in entry}
    assert bar.shown.keys() <= logged


def test_a_stage_tells_how_long_it_took_to_begin(smoke):
    """Since this process began; the steps come after."""
    metrics = json.loads((smoke[0] / "sft" / "metrics.json").read_text())
    age = time.time() - psutil.Process().create_time()
    assert 0 < metrics["train/seconds_to_first_step"] < age
    (runtime,) = (e["train_runtime"] for e in smoke[1].state.log_history if "train_runtime" in e)
    assert metrics["train/seconds_to_first_step"] + runtime < age
    (first_step,) = (item for item in smoke[1].callback_handler.callbacks if isinstance(item, FirstStep))
    before = first_step.figures()
    first_step.on_step_begin(smoke[1].args, smoke[1].state, smoke[1].control)
    assert first_step.figures() == before
    assert FirstStep().figures() == {}


def test_the_loss_is_on_the_completion_and_its_end_alone(smoke):
    tokenizer = load_tokenizer(smoke[0] / "sft")
    for row in smoke[1].train_dataset.select(range(5)):
        learnt = [token for token in row["labels"] if token != -100]
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith("<|user|>")
        assert tokenizer.decode(learnt) == text.split("<|assistant|>")[1]
        assert tokenizer.decode(learnt).endswith("<|end|>")


def test_resumed_training_ends_with_the_weights_of_the_straight_run(smoke, tmp_path):
    straight = load_file(smoke[0] / "sft" / "model.safetensors")
    checkpoint = str(smoke[0] / "sft" / "checkpoint-1")
    run(tmp_path, "--report_to", "none", "--resume_from_checkpoint", checkpoint)
    resumed = load_file(tmp_path / "sft" / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    halfway = load_file(smoke[0] / "sft" / "checkpoint-1" / "model.safetensors")
    assert not torch.equal(halfway["model.norm.weight"], straight["model.norm.weight"])


def test_an_interrupted_run_goes_on_by_the_same_command_and_ends_as_the_straight_run(
    smoke, tmp_path, monkeypatch
):
    """Ctrl-C after the first step: no checkpoint is due there, so what is saved is saved for the interruption."""
    flags = ("--report_to", "none", "--save_steps", "50")

    class Interrupted(SFTTrainer):
        def training_step(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(sft, "SFTTrainer", Interrupted)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", SMOKE, "--run_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as end:
        sft.main()
    assert end.value.code == 130
    assert [path.name for path in (tmp_path / "sft").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "sft" / "metrics.json").exists()
    with pytest.raises(UsageError, match=r"started with other settings \(learning_rate was 0.001, is 0.1\)"):
        run(tmp_path, *flags, "--learning_rate", "0.1")
    assert run(tmp_path, *flags).state.global_step == 2
    straight = load_file(smoke[0] / "sft" / "model.safetensors")
    resumed = load_file(tmp_path / "sft" / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.slow
def test_a_run_of_like_lengths_is_resumed_in_its_second_epoch_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    """With batch_rebalance passes have several sizes; where they stand is Trainer's to find again."""
    rows = [
        {"prompt": "say " * (1 + number % 7), "completion": "so " * (1 + number % 11)} for number in range(40)
    ]
    flags = ("--report_to", "none", "--save_steps", "50", "--max_steps", "9", "--dataset_name")
    flags += (write_rows(tmp_path / "rows.jsonl", rows), "--train_sampling_strategy", "batch_rebalance")
    flags += ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    run(tmp_path / "straight", *flags)
    stopped = []

    class Interrupted(SFTTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5 and not stopped:
                stopped.append(True)
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "SFTTrainer", Interrupted)
        where = ("--config", SMOKE, "--run_dir", str(tmp_path / "stopped"))
        patch.setattr(sys, "argv", ["sft.py", *where, *flags])
        with pytest.raises(SystemExit):
            sft.main()
    assert [path.name for path in (tmp_path / "stopped" / "sft").glob("checkpoint-*")] == ["checkpoint-6"]
    run(tmp_path / "stopped", *flags)
    straight, resumed = (
        load_file(tmp_path / name / "sft" / "model.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_other_demonstrations_in_the_same_file_are_refused_and_a_named_rate_is_that_of_the_rest(tmp_path):
    rows = [{"prompt": f"say {number}", "completion": f"{number}"} for number in range(40)]
    data = tmp_path / "rows.jsonl"
    flags = ("--report_to", "none", "--dataset_name", write_rows(data, rows), "--lr_scheduler_type", "linear")
    run(tmp_path, *flags, "--save_total_limit", "2")
    folder = tmp_path / "sft"
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "checkpoint-2")
    write_rows(data, [{"prompt": "say 0", "completion": "none"}, *rows[1:]])
    # The tokenizer is trained on them, too.
    changed = r"\(processing_class was '\w{16}', is '\w{16}'; train_dataset was '\w{16}', is '\w{16}'\)"
    for asked in ((), ("--resume_from_checkpoint", "true")):
        with pytest.raises(UsageError, match=f"started with other settings {changed}"):
            run(tmp_path, *flags, *asked)
    write_rows(data, rows)
    with pytest.raises(UsageError, match=r"\(global_batch_size was 8, is 4\)"):
        run(tmp_path, *flags, "--per_device_train_batch_size", "4")
    # The same batch in two parts is the same run to rounding.
    halves = (
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "2",
        "--logging_steps",
        "1",
    )
    rate = ("--learning_rate", "0.5", "--resume_with_changes", "learning_rate")
    trainer = run(tmp_path, *flags, *halves, *rate, "--max_steps", "5")
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[-4:] == pytest.approx([0.4, 0.3, 0.2, 0.1])


CONVERSATION = [
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and one more?"},
    {"role": "assistant", "content": "five"},
]


def test_whole_conversations_are_learnt_on_every_turn_of_the_assistant(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}] * 12)
    trainer = run(
        tmp_path, "--dataset_name", path, "--max_steps", "1", "--report_to", "none", "--eval_fraction", "0"
    )
    row = trainer.train_dataset[0]
    learnt = [token for token in row["labels"] if token != -100]
    assert load_tokenizer(tmp_path / "sft").decode(learnt) == "four<|end|>five<|end|>"


def test_without_generation_markers_the_last_turn_is_the_completion():
    tokenizer = train_tokenizer(["two plus two? four"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    dataset, assistant_only = sft.completions_only(Dataset.from_dict({"messages": [CONVERSATION]}), tokenizer)
    assert not assistant_only
    assert dataset[0] == {"prompt": CONVERSATION[:-1], "completion": CONVERSATION[-1:]}


@pytest.fixture(scope="module")
def word_model(tmp_path_factory):
    """A GPT-2 whose tokenizer knows words and an EOS, and no pad token."""
    folder = tmp_path_factory.mktemp("words")
    words = ["<eos>", "two", "plus", "is", "four", "five", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=7, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(folder)
    return folder


def sums(tmp_path, *longer: str) -> str:
    rows = [{"prompt": "two plus two", "completion": " is four"}] * 8
    rows += [{"prompt": prompt, "completion": " is five"} for prompt in longer]
    return write_rows(tmp_path / "sums.jsonl", rows)


def test_a_tokenizer_without_a_pad_token_is_handled(word_model, tmp_path):
    trainer = run(
        tmp_path,
        *("--model_name_or_path", str(word_model), "--dataset_name", sums(tmp_path), "--report_to", "none"),
        *("--eval_fraction", "0", "--max_steps", "1"),
    )
    row = trainer.train_dataset[0]
    assert row["input_ids"] == [1, 2, 1, 3, 4, 0]
    assert row["labels"] == [-100, -100, -100, 3, 4, 0]  # a real EOS is learnt though it is the pad token too
    tokenizer = load_tokenizer(tmp_path / "sft")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert load_policy(tmp_path / "sft", tokenizer).config.vocab_size == 7


def test_which_token_pads():
    def tokenizer(tokens, **special):
        backend = Tokenizer(
            models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    own = tokenizer(["<unk>", "</s>", "<p>"], eos_token="</s>", pad_token="<p>")
    reserved = tokenizer(["<unk>", "</s>", "<pad>"], eos_token="</s>", unk_token="<unk>")
    unknown = tokenizer(["<unk>", "</s>"], eos_token="</s>", unk_token="<unk>")
    shared = tokenizer(["</s>", "a"], eos_token="</s>", unk_token="</s>")
    chosen = [ensure_pad_token(each).pad_token for each in (own, reserved, unknown, shared)]
    assert chosen == ["<p>", "<pad>", "<unk>", "</s>"]
    with pytest.raises(UsageError, match="no pad, unk or EOS"):
        ensure_pad_token(tokenizer(["a", "b"]))


def test_a_response_ends_with_the_templates_end_of_turn_too():
    tokenizer = train_tokenizer(["hello"], 300)
    model = new_policy(TINY, tokenizer, seed=0)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|stop|>\n' }}{% endfor %}"
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert end_of_turn_id(tokenizer) == stop
    assert new_policy(TINY, tokenizer, seed=0).generation_config.eos_token_id == sorted(
        [tokenizer.eos_token_id, stop]
    )


def test_lora_saves_an_adapter_and_load_policy_merges_it(smoke, tmp_path):
    base = str(smoke[0] / "sft")
    run(
        tmp_path,
        *(
            "--model_name_or_path",
            base,
            "--use_peft",
            "--lora_r",
            "4",
            "--lora_target_modules",
            "q_proj",
            "up_proj",
        ),
        *("--learning_rate", "0.1", "--report_to", "none"),
    )
    folder = tmp_path / "sft"
    assert not (folder / "model.safetensors").exists()
    tokenizer = load_tokenizer(folder)
    merged = load_policy(folder, tokenizer).eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    plain = load_policy(base, tokenizer).eval()
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)
    assert (merged(ids).logits - plain(ids).logits).abs().max() > 1e-3
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with pytest.raises(UsageError, match="load_in_4bit"):
        load_policy(folder, tokenizer, ModelConfig(load_in_8bit=True))


def test_a_new_model_is_the_same_for_the_same_seed_alone():
    tokenizer = train_tokenizer(["hello"], 300)
    first, again, other = (new_policy(TINY, tokenizer, seed=seed) for seed in (1, 1, 2))
    weight = first.model.embed_tokens.weight
    assert torch.equal(weight, again.model.embed_tokens.weight)
    assert not torch.equal(weight, other.model.embed_tokens.weight)


def test_bad_settings_are_refused_before_training(word_model, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(sft.SFTTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(RECIPES / "hh" / "sft.yaml")])
    with pytest.raises(UsageError, match="--dataset_name"):
        sft.main()
    with pytest.raises(UsageError, match="LlamaConfig has no field hidden_sise"):
        run(tmp_path, "--model_config", '{"hidden_sise": 32}')
    with pytest.raises(UsageError, match="model_config is not valid JSON"):
        run(tmp_path, "--model_config", "{hidden_size: 32}")
    with pytest.raises(UsageError, match="use_peft trains an adapter on a model that exists"):
        run(tmp_path, "--use_peft")
    with pytest.raises(UsageError, match="leaves one side empty"):
        run(tmp_path, "--eval_fraction", "0.001")
    with pytest.raises(
        UsageError, match=r"No tokenizer can be loaded from .*nowhere: there is no such folder here"
    ):
        run(tmp_path, "--model_name_or_path", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="set use_peft as well"):
        run(tmp_path, "--model_name_or_path", str(smoke[0] / "sft"), "--load_in_4bit")


def test_a_prompt_longer_than_the_context_is_refused_or_left_out(word_model, tmp_path):
    path = sums(tmp_path, " ".join(["two"] * 20))
    arguments = ("--model_name_or_path", str(word_model), "--dataset_name", path, "--report_to", "none")
    with pytest.raises(UsageError, match=r"prompt 9 has 20 tokens .* context holds 16"):
        run(tmp_path, *arguments)
    run(tmp_path, *arguments, "--max_prompt_length", "10", "--eval_fraction", "0", "--max_steps", "1")
    metrics = json.loads((tmp_path / "sft" / "metrics.json").read_text())
    assert metrics["num_demonstrations/left_out"] == 1
    assert metrics["num_demonstrations/train"] == 8


def test_conversations_need_a_chat_template(word_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]}] * 8
    path = write_rows(tmp_path / "chat.jsonl", rows)
    arguments = ("--model_name_or_path", str(word_model), "--dataset_name", path, "--report_to", "none")
    arguments += ("--eval_fraction", "0", "--max_steps", "1")
    with pytest.raises(UsageError, match=r"no chat template.*--chat_template_path"):
        run(tmp_path, *arguments)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <eos> ' }}"
        "{% endgeneration %}{% else %}{{ m['content'] + ' plus ' }}{% endif %}{% endfor %}"
    )
    trainer = run(tmp_path, *arguments, "--chat_template_path", str(template))
    assert trainer.train_dataset[0]["input_ids"] == [1, 2, 4, 0]
    assert trainer.train_dataset[0]["labels"] == [-100, -100, 4, 0]
    assert load_tokenizer(tmp_path / "sft").chat_template == template.read_text()
