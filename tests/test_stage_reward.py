"""Reward: the split, what is dropped, the centred bias, the report, adapters, and its errors."""

import json
import os
import random
import re
import signal
import sys
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tieback.cli.errors import UsageError
from tieback.data.helpdesk import make_split
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline import reward
from tieback.pipeline.arguments import RECIPES
from tieback.pipeline.model_loading import load_tokenizer, new_policy
from tieback.reward_model.head import load_reward_model, reward_bias
from tieback.reward_model.scoring import RewardScorer

SMOKE = str(RECIPES / "smoke" / "reward.yaml")
DIVIDED = ("--gradient_accumulation_steps", "4", "--train_sampling_strategy", "batch_rebalance")
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(run_dir, *arguments: str, recipe: str = SMOKE, output: str = "reward") -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        fixed = ["--config", recipe, "--run_dir", str(run_dir), "--output_dir", str(run_dir / output)]
        patch.setattr(sys, "argv", ["reward.py", *fixed, "--report_to", "none", *arguments])
        reward.main()
    return json.loads((run_dir / output / "metrics.json").read_text())


def pair(prompt: str, chosen: str, rejected: str, annotator: str = "ann") -> dict:
    return {
        "prompt_id": prompt,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "annotator": annotator,
    }


@pytest.fixture
def run_dir(tmp_path):
    """A run with an SFT model, and 20 prompts with three pairs each."""
    rows = make_split("demonstrations", 60, 0)
    texts = [row["completion"][0]["content"] for row in rows]
    tokenizer = train_tokenizer(texts, 300)
    folder = tmp_path / "sft"
    new_policy({**SIZES, "max_position_embeddings": 160}, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "metrics.json").write_text("{}")
    rng = random.Random(0)
    write_pairs(
        tmp_path,
        [
            pair(f"Question {prompt}?", *rng.sample(texts, 2), rng.choice(["ann", "bob"]))
            for prompt in range(20)
            for _ in range(3)
        ],
    )
    return tmp_path


def write_pairs(run_dir, pairs) -> None:
    (run_dir / "collect").mkdir(exist_ok=True)
    (run_dir / "collect" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def read_pairs(run_dir):
    return [json.loads(line) for line in (run_dir / "collect" / "preferences.jsonl").read_text().splitlines()]


def test_demonstrations_score_zero_on_average_after_reload(run_dir):
    metrics = run(run_dir)
    folder = run_dir / "reward"
    model = load_reward_model(folder)
    scorer = RewardScorer(model, load_tokenizer(folder))
    demonstrations = make_split("demonstrations", 16, 0)
    scores = scorer.score(demonstrations["prompt"], demonstrations["completion"])
    assert fmean(scores) == pytest.approx(0, abs=1e-5)
    assert max(map(abs, scores)) > 1e-3
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    assert stock.config.reward_bias == reward_bias(model) != 0
    assert (folder / "calibration.png").stat().st_size > 1000
    assert metrics["num_pairs/train"] + metrics["num_pairs/held_out"] == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "flags"),
    [
        (1, ("--per_device_train_batch_size", "16")),  # in the first epoch of four steps
        (6, ("--per_device_train_batch_size", "16")),  # in the second
        (6, ("--per_device_train_batch_size", "4", *DIVIDED)),
    ],
)
def test_an_interrupted_run_goes_on_by_the_same_command_and_ends_as_the_straight_run(
    run_dir, monkeypatch, step, flags
):
    flags += ("--save_steps", "50", "--max_steps", "12")
    assert run(run_dir, *flags, output="straight")["train/steps"] == 12

    stopped = []

    class Interrupted(reward.PairTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step - 1 and not stopped:
                stopped.append(True)
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(reward, "PairTrainer", Interrupted)
        with pytest.raises(SystemExit) as end:
            run(run_dir, *flags)
    assert end.value.code == 130
    assert [path.name for path in (run_dir / "reward").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    run(run_dir, *flags)
    straight = load_file(run_dir / "straight" / "model.safetensors")
    resumed = load_file(run_dir / "reward" / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_other_pairs_in_the_same_file_and_another_sft_model_are_refused(run_dir):
    flags = ("--save_steps", "1", "--save_total_limit", "5")
    run(run_dir, *flags)
    folder = run_dir / "reward"
    (folder / "metrics.json").unlink()
    pairs, model = run_dir / "collect" / "preferences.jsonl", run_dir / "sft" / "model.safetensors"
    for path, name in ((pairs, "train_dataset"), (model, "model")):
        before = path.read_bytes()
        if path == pairs:
            lines = before.splitlines(keepends=True)
            path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
        else:
            weights = load_file(path)
            save_file({key: tensor + 0.01 for key, tensor in weights.items()}, path, {"format": "pt"})
        for asked in ((), ("--resume_from_checkpoint", "true")):
            with pytest.raises(UsageError, match=rf"other settings \({name} was '\w{{16}}', is '\w{{16}}'\)"):
                run(run_dir, *flags, *asked)
        path.write_bytes(before)
    run(run_dir, *flags)


def test_the_report_is_that_of_the_saved_model_on_the_held_out_pairs(run_dir):
    metrics = run(run_dir)
    tokenizer = load_tokenizer(run_dir / "reward")
    _, held_out = reward.split_by_prompt(Dataset.from_list(read_pairs(run_dir)), 0.25, seed=0)
    scorer = RewardScorer(load_reward_model(run_dir / "reward"), tokenizer)
    margins = {"ann": [], "bob": []}
    longer = []
    for row in held_out:
        chosen, rejected = scorer.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        margins[row["annotator"]].append(chosen - rejected)
        lengths = [len(tokenizer(row[side][0]["content"])["input_ids"]) for side in ("chosen", "rejected")]
        longer.append(0.5 if lengths[0] == lengths[1] else float(lengths[0] > lengths[1]))
    everyone = margins["ann"] + margins["bob"]
    assert len(everyone) == metrics["num_pairs/held_out"] == 15
    assert metrics["accuracy/held_out"] == pytest.approx(fmean(margin > 0 for margin in everyone))
    assert metrics["accuracy/length_only"] == pytest.approx(fmean(longer))
    assert metrics["margin/mean"] == pytest.approx(fmean(everyone), abs=1e-5)
    assert metrics["margin/ann"] == pytest.approx(fmean(margins["ann"]), abs=1e-5)
    assert metrics["margin/bob"] == pytest.approx(fmean(margins["bob"]), abs=1e-5)


def test_the_terminal_shows_a_bar_with_its_figures_and_one_table(run_dir, capfd):
    run(run_dir, "--logging_steps", "1")
    out, err = capfd.readouterr()
    last = err.split("\r")[-1]
    assert "100%" in last
    assert all(re.search(rf"{name} -?\d", last) for name in ("loss", "accuracy", "margin")), last
    assert "{" not in out + err, "a dictionary of the Trainer's"
    assert out.count("accuracy/held_out") == 1


def test_it_learns_a_preference_that_length_does_not_tell(run_dir):
    longer, shorter = ("Sure! It is blue.", "Never! Red."), ("Sure! Blue.", "Never! It is red.")
    write_pairs(run_dir, [pair(f"Question {n}?", *(longer, shorter)[n % 2]) for n in range(40)])
    metrics = run(run_dir, "--max_steps", "40", "--learning_rate", "0.01", "--save_strategy", "no")
    assert metrics["accuracy/held_out"] == 1
    assert metrics["accuracy/length_only"] < 0.9
    assert metrics["margin/mean"] > 2
    assert metrics["calibration/ece"] < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_one_prompt_never_straddle_the_split(seed):
    rng = random.Random(seed)
    rows = [pair(f"Question {rng.randrange(30)}?", str(n), "no") for n in range(200)]
    train, held_out = reward.split_by_prompt(Dataset.from_list(rows), 0.2, seed)
    sides = [{row["prompt"][0]["content"] for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(0.2 * len(sides[0] | sides[1]))
    assert len(train) + len(held_out) == 200
    again = reward.split_by_prompt(Dataset.from_list(rows), 0.2, seed)[1]
    assert again["chosen"] == held_out["chosen"]


def test_identical_pairs_are_dropped_and_counted_after_truncation_too(run_dir):
    long = "It is blue. " * 30
    pairs = read_pairs(run_dir)
    pairs.append(pair("Question 1?", "It is blue.", "It is blue."))
    pairs += [
        pair("Question 2?", "Yes. " + long, "No. " + long),
        pair("Question 3?", "Oh. " + long, "Ah. " + long),
    ]
    write_pairs(run_dir, pairs)
    metrics = run(run_dir, "--max_length", "100")
    assert metrics["num_pairs/dropped_identical"] == 1
    assert metrics["num_pairs/dropped_identical_after_truncation"] == 2
    assert metrics["num_pairs/train"] + metrics["num_pairs/held_out"] == 60


def test_demonstrations_are_the_chosen_responses_where_none_are_named(run_dir):
    recipe = (RECIPES / "smoke" / "reward.yaml").read_text().replace("demonstrations_name: helpdesk\n", "")
    (run_dir / "reward.yaml").write_text(recipe)
    run(run_dir, "--num_demonstrations", "1000", recipe=str(run_dir / "reward.yaml"))
    train, _ = reward.split_by_prompt(Dataset.from_list(read_pairs(run_dir)), 0.25, seed=0)
    scorer = RewardScorer(load_reward_model(run_dir / "reward"), load_tokenizer(run_dir / "reward"))
    assert fmean(scorer.score(train["prompt"], train["chosen"])) == pytest.approx(0, abs=1e-5)


LORA = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "0.05")


@pytest.mark.parametrize("merge", [False, True])
def test_lora_leaves_an_adapter_with_a_head_or_a_model_with_both_merged_in(run_dir, merge):
    run(run_dir, *LORA, *(["--merge_adapter"] if merge else []))
    folder = run_dir / "reward"
    demonstrations = make_split("demonstrations", 16, 0)
    loaded = load_reward_model(folder)
    scores = RewardScorer(loaded, load_tokenizer(folder)).score(
        demonstrations["prompt"], demonstrations["completion"]
    )
    assert fmean(scores) == pytest.approx(0, abs=1e-5)
    if not merge:
        assert not (folder / "model.safetensors").exists()
        adapter = load_file(folder / "adapter_model.safetensors")
        assert loaded.score.weight.equal(adapter["base_model.model.score.weight"])
        ids = torch.tensor([[5, 6, 7, 8]])
        stock = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        own = load_reward_model(folder).eval()(ids).logits - own_bias(folder)
        torch.testing.assert_close(stock(ids).logits, own, rtol=0, atol=1e-5)
        return
    merged = load_file(folder / "model.safetensors")
    start = load_file(run_dir / "sft" / "model.safetensors")
    assert not any("lora" in name for name in merged)
    assert not list(folder.glob("adapter*"))
    moved = {name for name in merged if name in start and not torch.equal(merged[name], start[name])}
    assert moved == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"}


def own_bias(folder):
    return json.loads((folder / "config.json").read_text())["reward_bias"]


def test_the_adapter_of_sft_is_where_that_of_the_reward_model_starts(run_dir):
    sft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(run_dir / "sft"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    folder = run_dir / "sft_adapter"
    sft.save_pretrained(folder)
    load_tokenizer(run_dir / "sft").save_pretrained(folder)
    start = ("--model_name_or_path", str(folder), *LORA[:-2])
    run(run_dir, *start, "--learning_rate", "1e-9", output="adapted")
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(run_dir / "adapted" / "adapter_model.safetensors")
    assert after.keys() - before.keys() == {"base_model.model.score.weight"}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    settings = json.loads((run_dir / "adapted" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run_dir / "sft")
    with pytest.raises(UsageError, match=r"lora_r: 8 is asked for, but the adapter in .*sft_adapter.* has 4"):
        run(run_dir, *start[:3], "--lora_r", "8", output="refused")


def test_a_reward_model_goes_on_being_trained(run_dir):
    run(run_dir)
    first = load_file(run_dir / "reward" / "model.safetensors")["score.weight"]
    run(run_dir, "--model_name_or_path", str(run_dir / "reward"), "--learning_rate", "1e-6", output="again")
    second = load_file(run_dir / "again" / "model.safetensors")["score.weight"]
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_bad_input_is_refused_before_training(run_dir, monkeypatch):
    monkeypatch.setattr(reward.PairTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(UsageError, match="leaves one side empty"):
        run(run_dir, "--held_out_fraction", "0.001")
    with pytest.raises(UsageError, match=r"group_by_length is not for pairs.*Choose batch_rebalance"):
        run(run_dir, "--train_sampling_strategy", "group_by_length")
    two_labels = run_dir / "two"
    LlamaForSequenceClassification(
        LlamaConfig(vocab_size=300, **SIZES, id2label={0: "bad", 1: "good"})
    ).save_pretrained(two_labels)
    load_tokenizer(run_dir / "sft").save_pretrained(two_labels)
    with pytest.raises(UsageError, match=r"2 labels \(bad, good\)"):
        run(run_dir, "--model_name_or_path", str(two_labels))
    (run_dir / "collect" / "preferences.jsonl").unlink()
    with pytest.raises(UsageError, match=r"accelerate launch pipeline/collect\.py"):
        run(run_dir)
    (run_dir / "collect" / "responses.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="not ranked"):
        run(run_dir)


def by_four_annotators(run_dir, texts):
    """Thirty pairs that ann, cat and dan order alike, and bob the other way round."""
    rows = []
    for number in range(30):
        good, bad = texts[2 * number : 2 * number + 2]
        rows += [pair(f"Question {number}?", good, bad, name) for name in ("ann", "cat", "dan")]
        rows.append(pair(f"Question {number}?", bad, good, "bob"))
    write_pairs(run_dir, rows)


def test_who_rarely_agrees_with_the_others_is_left_out_and_named(run_dir, capsys):
    texts = [f"{word} number {number}" for number in range(30) for word in ("good", "bad")]
    by_four_annotators(run_dir, texts)
    plain = run(run_dir)
    assert "num_pairs/dropped_unreliable" not in plain
    metrics = run(run_dir, "--least_agreement", "0.6", output="reliable")
    assert "left out: bob, who orders 0% of 30 shared pairs as most others do" in capsys.readouterr().out
    assert metrics["num_pairs/dropped_unreliable"] == 30
    assert metrics["num_pairs/train"] + metrics["num_pairs/held_out"] == 90
    assert [metrics[f"agreement/{name}"] for name in ("ann", "bob", "cat")] == [1, 0, 1]
    assert "margin/bob" in plain
    assert "margin/bob" not in metrics


def test_annotators_who_cannot_be_told_apart_are_an_error(run_dir):
    with pytest.raises(UsageError, match=r"least_agreement must be between 0 and 1, got 60.0"):
        run(run_dir, "--least_agreement", "60")
    rows = read_pairs(run_dir)
    write_pairs(run_dir, [row | {"annotator": "ann"} for row in rows])
    with pytest.raises(UsageError, match=r"preferences.jsonl name 1 in a column `annotator`. Leave it out"):
        run(run_dir, "--least_agreement", "0.6")
    both = [
        pair(f"Question {number}?", *order, name)
        for number in range(20)
        for order, name in ((("a", "b"), "ann"), (("b", "a"), "bob"))
    ]
    write_pairs(run_dir, both)
    with pytest.raises(UsageError, match=r"leaves out all annotators of .* \(ann, bob\)"):
        run(run_dir, "--least_agreement", "0.6")


def test_votes_on_a_pair_are_merged_and_disputed_pairs_left_out(run_dir):
    texts = [f"{word} number {number}" for number in range(30) for word in ("good", "bad")]
    by_four_annotators(run_dir, texts)
    write_pairs(
        run_dir, [*read_pairs(run_dir), *(pair(f"Alone {n}?", "good", "bad", "dan") for n in range(10))]
    )
    majority = run(run_dir, "--least_pair_agreement", "0.75")
    assert majority["num_pairs/train"] + majority["num_pairs/held_out"] == 30 + 10
    assert (majority["num_pairs/dropped_merged"], majority["num_pairs/dropped_disputed"]) == (90, 0)
    assert not any(name.startswith("margin/") and name != "margin/mean" for name in majority)
    # Bob disputes all that several have ordered, unless he is left out first.
    unanimous = run(run_dir, "--least_pair_agreement", "1", output="unanimous")
    assert unanimous["num_pairs/train"] + unanimous["num_pairs/held_out"] == 10
    assert unanimous["num_pairs/dropped_disputed"] == 30
    both = run(run_dir, "--least_pair_agreement", "1", "--least_agreement", "0.6", output="both")
    assert both["num_pairs/train"] + both["num_pairs/held_out"] == 30 + 10
    assert (both["num_pairs/dropped_unreliable"], both["num_pairs/dropped_merged"]) == (30, 60)


def test_a_share_of_votes_out_of_range_and_disputes_everywhere_are_errors(run_dir):
    with pytest.raises(UsageError, match=r"least_pair_agreement must be from 0.5 .* got 0.4"):
        run(run_dir, "--least_pair_agreement", "0.4")
    by_four_annotators(run_dir, [f"answer {number}" for number in range(60)])
    with pytest.raises(UsageError, match=r"least_pair_agreement 1.0 leaves out all 30 pairs"):
        run(run_dir, "--least_pair_agreement", "1")
