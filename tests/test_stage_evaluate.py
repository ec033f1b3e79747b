"""The evaluate stage on two tiny random policies, whose figures are derived again here without its code."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tieback.cli.errors import UsageError
from tieback.pipeline import evaluate
from tieback.pipeline.arguments import RECIPES, RunArguments, parse_stage
from tieback.pipeline.rollout.responses import log_ratios, sample_responses
from tieback.pipeline.rollout.sampler import make_sampler
from tieback.pipeline.rollout.settings import RolloutSettings

ROOT = Path(__file__).parents[1]
WORDS = [f"w{i}" for i in range(12)]
JUDGE = '''
def likes_w3(prompts, completions, completion_ids, bonus, **columns):
    """One point for each w3, and the row's own bonus for a response of more than two tokens."""
    return [
        text.split().count("w3") + extra * (len(ids) > 2)
        for text, ids, extra in zip(completions, completion_ids, bonus, strict=True)
    ]


def refuses(prompts, completions, **columns):
    raise KeyError("no such column")


def one_too_many(prompts, completions, **columns):
    return [0.0] * (len(prompts) + 1)


def abstains(prompts, completions, **columns):
    return [None] * len(prompts)
'''


def make_tokenizer(words=WORDS):
    """Words of a closed vocabulary, one token each, so that a response's text gives back its tokens. pad == EOS."""
    vocabulary = {"<end>": 0, **{word: i for i, word in enumerate(words, start=1)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def make_config(**changes):
    return LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.6,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        **changes,
    )


def make_policy(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(make_config()).eval()


def make_reward_model(seed):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(make_config(num_labels=1)).eval()


def save_stage(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    (folder / "metrics.json").write_text('{"some/figure": 1.5}')


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run with its sft, reward and ppo stages, prompts of several lengths, and a judge as a module."""
    monkeypatch.chdir(tmp_path)
    save_stage(make_policy(1), tmp_path / "run/sft")
    save_stage(make_policy(2), tmp_path / "run/ppo")
    save_stage(make_reward_model(3), tmp_path / "run/reward")
    history = [{"step": s, "reward/mean": s / 10, "kl/ref": s, "eval_reward/mean": s / 11} for s in range(6)]
    (tmp_path / "run/ppo/trainer_state.json").write_text(json.dumps({"log_history": history}))
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": " ".join(rng.choice(WORDS, size=1 + i % 5)) + f" w{i % 12}", "bonus": i % 3 / 4}
        for i in range(30)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval_judges.py").write_text(JUDGE)
    return tmp_path / "run"


def arguments(run_dir, **changes):
    settings = {
        "config": RECIPES / "smoke/evaluate.yaml",
        "run_dir": run_dir,
        "dataset_name": "prompts.jsonl",
        "dataset_test_split": "train",
        "gold_funcs": "eval_judges:likes_w3",
        "num_prompts": 30,
        "max_completion_length": 6,
        "temperature": 0.7,
    }
    return [
        part
        for name, value in {**settings, **changes}.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]


def run(run_dir, monkeypatch, **changes):
    """Run the stage in this process and return its metrics and samples."""
    argv = arguments(run_dir, **changes)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    evaluate.main()
    return read_outputs(Path(changes.get("output_dir") or run_dir / "evaluate"))


def read_outputs(folder):
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return toy.without_measurements(json.loads((folder / "metrics.json").read_text())), samples


def log_probability(model, prompt, response, temperature):
    """Sum of log-probabilities of `response`, one prefix at a time: no padding, no batch, no mask."""
    total, ids = 0.0, list(prompt)
    for token in response:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


def tokens(tokenizer, side):
    ids = tokenizer(side["response"])["input_ids"] if side["response"] else []
    return ids if side["truncated"] else [*ids, tokenizer.eos_token_id]


def test_every_figure_can_be_derived_again_from_the_samples(run_dir, monkeypatch):
    metrics, samples = run(run_dir, monkeypatch)
    tokenizer = make_tokenizer()
    rows = {row["prompt"]: row for row in map(json.loads, Path("prompts.jsonl").read_text().splitlines())}
    assert [sample["prompt"] for sample in samples] == list(rows)
    assert metrics["num_prompts"] == len(samples) == 30

    policies = {system: LlamaForCausalLM.from_pretrained(run_dir / system) for system in ("sft", "ppo")}
    scorer = LlamaForSequenceClassification.from_pretrained(run_dir / "reward").eval()
    ratios, gold, reward = [], {"sft": [], "ppo": []}, {"sft": [], "ppo": []}
    for sample in samples:
        prompt = tokenizer(sample["prompt"])["input_ids"]
        for system in ("sft", "ppo"):
            ids = tokens(tokenizer, sample[system])
            assert len(ids) == sample[system]["num_tokens"]
            assert len(ids) == 6 or not sample[system]["truncated"]
            expected = sample[system]["response"].split().count("w3") + rows[sample["prompt"]]["bonus"] * (
                len(ids) > 2
            )
            gold[system].append(expected)
            with torch.no_grad():
                # The reward model reads prompt and response as one text, closed by its EOS.
                text = sample["prompt"] + sample[system]["response"]
                encoded = tokenizer(text + "<end>")["input_ids"]
                hidden = scorer.model(torch.tensor([encoded])).last_hidden_state[0, -1]
                reward[system].append(float(scorer.score(hidden)))
        ids = tokens(tokenizer, sample["ppo"])
        ratio = log_probability(policies["ppo"], prompt, ids, 0.7) - log_probability(
            policies["sft"], prompt, ids, 0.7
        )
        assert sample["ppo"]["log_ratio_to_sft"] == pytest.approx(ratio, abs=1e-4)
        ratios.append(ratio)

    outcomes = np.array([(p > s) + (p == s) / 2 for p, s in zip(gold["ppo"], gold["sft"], strict=True)])
    assert [sample["outcome"] for sample in samples] == outcomes.tolist()
    assert metrics["kl/ppo_vs_sft"] == pytest.approx(np.mean(ratios), abs=1e-4)
    assert metrics["win_rate/ppo_vs_sft"] == pytest.approx(outcomes.mean())
    assert metrics["win_rate/ci95_low"] < outcomes.mean() < metrics["win_rate/ci95_high"]
    by_reward = [(p > s) + (p == s) / 2 for p, s in zip(reward["ppo"], reward["sft"], strict=True)]
    assert metrics["win_rate/reward_model"] == pytest.approx(np.mean(by_reward))
    for system in ("sft", "ppo"):
        texts = [sample[system]["response"] for sample in samples]
        pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
        assert metrics[f"gold_score/{system}"] == pytest.approx(np.mean(gold[system]))
        assert metrics[f"reward_score/{system}"] == pytest.approx(np.mean(reward[system]), abs=1e-5)
        lengths = [sample[system]["num_tokens"] for sample in samples]
        assert metrics[f"response_length/{system}"] == pytest.approx(np.mean(lengths))
        truncated = [sample[system]["truncated"] for sample in samples]
        assert metrics[f"truncated_fraction/{system}"] == pytest.approx(np.mean(truncated))
        assert metrics[f"distinct_2/{system}"] == pytest.approx(len(set(pairs)) / len(pairs))
        assert metrics[f"distinct_responses/{system}"] == pytest.approx(len(set(texts)) / 30)
    assert 0 < metrics["truncated_fraction/ppo"] < 1  # both ends of a response occurred


def test_every_metric_is_a_finite_number_with_an_entry_in_the_glossary(run_dir, monkeypatch):
    metrics, _ = run(run_dir, monkeypatch)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values())
    glossary = set(re.findall(r"`([^`]+)`", (ROOT / "docs/glossary.md").read_text(encoding="utf-8")))
    assert set(metrics) - glossary == set()


def test_the_page_shows_this_run(run_dir, monkeypatch):
    metrics, samples = run(run_dir, monkeypatch)
    page = (run_dir / "evaluate/report.html").read_text(encoding="utf-8")
    assert f"{100 * metrics['win_rate/ppo_vs_sft']:.1f}%" in page
    assert "eval_judges:likes_w3" in page
    assert sum(sample["prompt"] in page for sample in samples) >= 4
    assert (
        page.count("<svg") == 4
    )  # reward/mean with its held-out twin, kl/ref, one against the other, and lengths


def test_the_frontier_is_that_of_choosing_among_responses_of_sft(run_dir, monkeypatch):
    metrics, samples = run(run_dir, monkeypatch, best_of=8)
    assert (metrics, samples) == run(run_dir, monkeypatch, best_of=0, output_dir=run_dir / "without")
    facts = json.loads((run_dir / "evaluate/report.json").read_text())
    assert [point["n"] for point in facts["frontier"]] == [1, 2, 4, 8]
    assert [point["kl"] for point in facts["frontier"]] == pytest.approx(
        [math.log(n) - (n - 1) / n for n in (1, 2, 4, 8)]
    )
    rewards = [point["reward_score"] for point in facts["frontier"]]
    assert rewards == sorted(rewards)
    # 240 other responses of the same policy to the same prompts: their mean is that of the 30 compared, within noise.
    spread = np.std([sample["sft"]["reward_score"] for sample in samples])
    assert abs(rewards[0] - metrics["reward_score/sft"]) < 4 * spread / math.sqrt(len(samples))
    assert all("gold_score" in point for point in facts["frontier"])
    assert "best of 8" in (run_dir / "evaluate/report.html").read_text(encoding="utf-8")


def test_same_seed_same_responses_and_another_seed_others(run_dir, monkeypatch):
    first = run(run_dir, monkeypatch)
    assert run(run_dir, monkeypatch, output_dir=run_dir / "again") == first
    assert (run_dir / "again/report.html").read_text().count("<article") == (
        run_dir / "evaluate/report.html"
    ).read_text().count("<article")
    _, other = run(run_dir, monkeypatch, seed=1, output_dir=run_dir / "other")
    assert [pair["ppo"]["response"] for pair in other] != [pair["ppo"]["response"] for pair in first[1]]


def test_a_policy_against_itself_draws_independently_and_has_no_kl(run_dir, monkeypatch):
    metrics, samples = run(run_dir, monkeypatch, ppo_model_path=run_dir / "sft")
    assert metrics["kl/ppo_vs_sft"] == 0.0
    same = [pair["sft"]["response"] == pair["ppo"]["response"] for pair in samples]
    assert sum(same) < 20  # one stream of random numbers for both would make all 30 the same


def test_batches_draw_independently(run_dir):
    policy = LlamaForCausalLM.from_pretrained(run_dir / "ppo").eval()
    prompts = Dataset.from_dict({"prompt": ["w1 w2"] * 12})
    settings, tokenizer = RolloutSettings(max_completion_length=6), make_tokenizer()
    sampler = make_sampler(settings, tokenizer, policy.generation_config, policy.device)
    rollout, _ = sample_responses(
        policy, sampler, prompts, tokenizer, settings, batch_size=1, seed=0, name="ppo"
    )
    assert len({tuple(ids) for ids in rollout.completion_ids}) > 3


def test_the_mean_log_ratio_estimates_the_exact_kl(run_dir):
    """Responses of at most two tokens can be enumerated: KL = KL₁ + Σ_a π(a)·KL₂(a), with nothing after the EOS."""
    policy, reference = (LlamaForCausalLM.from_pretrained(run_dir / name).eval() for name in ("ppo", "sft"))
    prompt, temperature, size = [3, 1, 4], 0.7, len(WORDS) + 1

    def distributions(prefixes):
        with torch.no_grad():
            return [
                (model(torch.tensor(prefixes)).logits[:, -1].double() / temperature).log_softmax(-1)
                for model in (policy, reference)
            ]

    first, first_ref = (logs[0] for logs in distributions([prompt]))
    second, second_ref = distributions([[*prompt, token] for token in range(size)])
    kl_second = (second.exp() * (second - second_ref)).sum(-1)
    kl_second[0] = 0.0  # token 0 is the EOS
    exact = float((first.exp() * (first - first_ref + kl_second)).sum())

    torch.manual_seed(0)
    tokens_1 = torch.multinomial(first.exp(), 8_000, replacement=True)
    tokens_2 = torch.multinomial(second.exp()[tokens_1], 1)[:, 0]
    responses = [[a] if a == 0 else [a, b] for a, b in zip(tokens_1.tolist(), tokens_2.tolist(), strict=True)]
    ratios = np.array(log_ratios(policy, reference, [prompt] * 8_000, responses, temperature, pad_id=0))
    assert ratios.mean() == pytest.approx(exact, abs=4 * ratios.std() / math.sqrt(8_000))
    assert exact > 10 * ratios.std() / math.sqrt(8_000)  # so the bound above says something


def test_a_lora_adapter_gives_the_figures_of_its_merged_model(run_dir, monkeypatch):
    torch.manual_seed(5)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(run_dir / "sft"), config)
    save_stage(adapted, run_dir / "adapter")
    assert not (run_dir / "adapter/model.safetensors").exists()
    save_stage(adapted.merge_and_unload(), run_dir / "merged")
    from_adapter = run(run_dir, monkeypatch, ppo_model_path=run_dir / "adapter", output_dir=run_dir / "a")
    from_merged = run(run_dir, monkeypatch, ppo_model_path=run_dir / "merged", output_dir=run_dir / "b")
    assert from_adapter[0] == pytest.approx(from_merged[0], abs=1e-6)
    assert from_adapter[0]["kl/ppo_vs_sft"] > 0.01


def test_without_a_gold_judge_the_reward_model_decides(run_dir, monkeypatch):
    recipe = run_dir / "evaluate.yaml"
    recipe.write_text("num_resamples: 2000\nnum_examples: 2\n")
    metrics, samples = run(run_dir, monkeypatch, config=recipe, gold_funcs=None)
    assert metrics["win_rate/ppo_vs_sft"] == metrics["win_rate/reward_model"]
    assert not [name for name in metrics if name.startswith("gold_score")]
    assert all((s["outcome"] == 1) == (s["ppo"]["reward_score"] > s["sft"]["reward_score"]) for s in samples)
    assert "no gold judge is named" in (run_dir / "evaluate/report.html").read_text()


def test_a_further_stop_token_ends_responses(run_dir, monkeypatch):
    _, samples = run(run_dir, monkeypatch, stop_tokens="w5")
    responses = [pair[system] for pair in samples for system in ("sft", "ppo")]
    stopped = [side for side in responses if "w5" in side["response"].split()]
    assert stopped
    for side in stopped:
        assert side["response"].split().index("w5") == len(side["response"].split()) - 1
        assert not side["truncated"]


def test_prompts_come_from_the_named_part_of_a_file_and_long_ones_are_counted(run_dir, monkeypatch):
    lines = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    metrics, samples = run(
        run_dir, monkeypatch, dataset_test_split="train[50%:]", max_prompt_length=5, num_prompts=8
    )
    held_out = [prompt for prompt in lines[15:] if len(prompt.split()) <= 5]
    assert len(samples) == 8
    assert {sample["prompt"] for sample in samples} <= set(held_out)
    assert metrics["num_prompts/left_out"] == 15 - len(held_out) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo_model_path": None, "remove": "ppo"}, "pipeline/ppo.py"),
        ({"remove": "reward"}, "pipeline/reward.py"),
        ({"gold_funcs": "eval_judges:no_such"}, "cannot be imported"),
        ({"gold_funcs": "eval_judges:refuses"}, "gold_funcs: .*refuses.* raised KeyError"),
        ({"gold_funcs": "eval_judges:one_too_many"}, "2 rewards for 1"),
        ({"max_completion_length": 40}, "prompts are too long"),
        ({"dataset_name": None}, "Name the prompts"),
        ({"num_resamples": 100}, "num_resamples must be at least 2000"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"reward_model_path": "eval_judges:refuses"}, "is a function"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(run_dir, monkeypatch, changes, message):
    monkeypatch.setattr(evaluate, "sample_responses", lambda *args, **kwargs: pytest.fail("it sampled"))
    removed = changes.pop("remove", None)
    if removed:
        (run_dir / removed / "metrics.json").unlink()
    recipe = run_dir / "evaluate.yaml"
    recipe.write_text("num_examples: 2\n")
    with pytest.raises(UsageError, match=message):
        run(run_dir, monkeypatch, config=recipe, **changes)


def test_a_ppo_model_with_another_vocabulary_is_refused(run_dir, monkeypatch):
    save_stage(make_policy(4), run_dir / "ppo", make_tokenizer([word.upper() for word in WORDS]))
    with pytest.raises(UsageError, match="another vocabulary"):
        run(run_dir, monkeypatch)


def test_a_judge_that_judges_nothing_is_named(run_dir, monkeypatch):
    with pytest.raises(UsageError, match="gold_funcs: Every reward function returned None"):
        run(run_dir, monkeypatch, gold_funcs="eval_judges:abstains")


@pytest.mark.parametrize("recipe", ["helpdesk", "hh", "smoke"])
def test_every_recipe_is_read(recipe):
    _, args = parse_stage(
        "evaluate",
        (RunArguments, evaluate.EvaluateArguments),
        ["--config", str(RECIPES / recipe / "evaluate.yaml")],
    )
    assert args.num_prompts >= 16


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(run_dir, monkeypatch):
    alone = run(run_dir, monkeypatch, batch_size=4)
    argv = arguments(run_dir, batch_size=4, output_dir=run_dir / "two")
    script = str(ROOT / "pipeline/evaluate.py")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(two_processes(run_dir)), script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(run_dir.parent)}
    done = subprocess.run(
        [sys.executable, *launch, *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = read_outputs(run_dir / "two")
    assert together[0] == pytest.approx(alone[0], abs=1e-6)
    assert [pair["ppo"]["response"] for pair in together[1]] == [pair["ppo"]["response"] for pair in alone[1]]


def two_processes(folder):
    path = folder / "two.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: 0\n"
    )
    return path
