"""Collect: the files it writes, going on after a kill, the annotator, and its errors."""

import json
import sys

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tieback.cli.errors import UsageError
from tieback.data.helpdesk import annotate, gold_scores, make_split
from tieback.data.tokenizer import train_tokenizer
from tieback.data.worlds import WORLDS
from tieback.pipeline import collect, response_files
from tieback.pipeline.arguments import RECIPES
from tieback.pipeline.model_loading import new_policy

SMOKE = str(RECIPES / "smoke" / "collect.yaml")
K = 3
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    texts = [row["completion"][0]["content"] for row in make_split("demonstrations", 50, 0)]
    tokenizer = train_tokenizer(texts, 300)
    model = new_policy(SIZES, tokenizer, seed=0)
    model.generation_config.eos_token_id = list(
        range(1, 300, 5)
    )  # an untrained model ends at every fifth token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(policy, output_dir, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fixed = ["--config", SMOKE, "--model_name_or_path", str(policy), "--output_dir", str(output_dir)]
        patch.setattr(sys, "argv", ["collect.py", *fixed, *arguments])
        collect.main()


@pytest.fixture(scope="module")
def collected(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect")
    run(policy, folder)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_hold_k_responses_to_each_prompt_in_order(collected):
    rows = read(collected / "responses.jsonl")
    assert [row["prompt"] for row in rows] == list(make_split("preferences", 12, 0)["prompt"])
    assert len({row["prompt_id"] for row in rows}) == 12
    for row in rows:
        assert len(row["responses"]) == len(row["truncated"]) == K
        assert {"family", "answer"} <= row.keys()
    # Different samples, of different batches too: the batches do not share their random numbers.
    assert len({text for row in rows for text in row["responses"]}) > 30
    assert rows[0]["responses"] != rows[4]["responses"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 0.999, 1.0])
def test_a_file_torn_at_any_byte_is_completed_to_the_same_bytes(policy, collected, tmp_path, share):
    whole = (collected / "responses.jsonl").read_bytes()
    (tmp_path / "responses.jsonl").write_bytes(whole[: int(share * len(whole))])
    (tmp_path / "responses.settings.json").write_text((collected / "responses.settings.json").read_text())
    run(policy, tmp_path)
    assert (tmp_path / "responses.jsonl").read_bytes() == whole
    assert (tmp_path / "preferences.jsonl").read_bytes() == (collected / "preferences.jsonl").read_bytes()


def test_after_an_interruption_only_what_is_missing_is_sampled(policy, collected, tmp_path, monkeypatch):
    real, calls = collect.respond, []

    def killed_in_the_third_batch(*args):
        calls.append(args[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(collect, "respond", killed_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        run(policy, tmp_path)
    assert len(read(tmp_path / "responses.jsonl")) == 8
    assert not (tmp_path / "metrics.json").exists()
    run(policy, tmp_path)
    assert calls == [0, 1, 2, 2]
    run(policy, tmp_path)  # nothing is left to do
    assert calls == [0, 1, 2, 2]
    assert (tmp_path / "responses.jsonl").read_bytes() == (collected / "responses.jsonl").read_bytes()


def test_files_of_several_processes_are_gathered_in_the_order_of_the_prompts(collected, tmp_path):
    rows = read(collected / "responses.jsonl")
    batches = [[row["prompt_id"] for row in rows[start : start + 4]] for start in range(0, 12, 4)]
    response_files.append(tmp_path, 1, rows[4:8])
    response_files.append(tmp_path, 0, rows[8:])
    response_files.append(tmp_path, 2, rows[:3])  # a batch of which a kill left three rows
    assert response_files.compact(tmp_path, batches) == {1, 2}
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["responses.jsonl"]
    assert response_files.read_rows(tmp_path) == rows[4:]


def test_other_settings_are_refused_by_name(policy, collected, tmp_path):
    for name in ("responses.jsonl", "responses.settings.json"):
        (tmp_path / name).write_bytes((collected / name).read_bytes())
    with pytest.raises(UsageError, match=r"temperature was 1\.0, is 0\.7.*--overwrite"):
        run(policy, tmp_path, "--temperature", "0.7")
    with pytest.raises(UsageError, match=r"stop_tokens was None, is \['!'\]"):
        run(policy, tmp_path, "--stop_tokens", "!")
    with pytest.raises(UsageError, match=r"chat_template_kwargs was None, is {'brief': True}"):
        run(policy, tmp_path, "--chat_template_kwargs", '{"brief": true}')
    other = tmp_path / "other"
    tokenizer = train_tokenizer(["a"], 300)
    new_policy(SIZES, tokenizer, seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(UsageError, match="model was"):
        run(other, tmp_path)
    assert (tmp_path / "responses.jsonl").read_bytes() == (collected / "responses.jsonl").read_bytes()


def test_truncated_says_that_no_end_was_sampled(policy, tmp_path):
    run(policy, tmp_path / "short", "--max_completion_length", "1")
    run(policy, tmp_path / "long", "--max_completion_length", "200", "--max_rows", "4")
    short, long = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("short", "long"))
    # A token is no end with probability 4/5: of 36, 28.8 ± 2.4 are cut after the first, and after 200 none is.
    assert 0.55 < short["truncated_fraction"] < 1
    assert long["truncated_fraction"] == 0


def test_stop_tokens_end_responses(policy, tmp_path, monkeypatch):
    rollouts, make_rollout = [], collect.make_rollout
    monkeypatch.setattr(
        collect, "make_rollout", lambda *args: rollouts.append(make_rollout(*args)) or rollouts[-1]
    )
    characters = [chr(code) for code in range(33, 127)]
    run(policy, tmp_path, "--stop_tokens", *characters)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    stops = {tokenizer.encode(character)[0] for character in characters}
    sampled = [ids for rollout in rollouts for ids in rollout.completion_ids]
    assert sum(ids[-1] in stops for ids in sampled) > 5
    assert not any(set(ids[:-1]) & stops for ids in sampled)


def test_every_eos_id_of_the_model_ends_a_response(policy, tmp_path):
    everything = tmp_path / "everything"
    everything.mkdir()
    for file in policy.iterdir():
        (everything / file.name).write_bytes(file.read_bytes())
    GenerationConfig(eos_token_id=list(range(300)), pad_token_id=0).save_pretrained(everything)
    run(everything, tmp_path / "out")
    rows = read(tmp_path / "out" / "responses.jsonl")
    assert not any(cut for row in rows for cut in row["truncated"])
    lengths = [len(text) for row in rows for text in row["responses"]]
    assert max(lengths) < 12  # of a single token each


def test_pairs_are_those_of_the_annotators_rankings(tmp_path):
    questions = make_split("demonstrations", 90, 0)
    texts = [completion[0]["content"] for completion in questions["completion"]]
    rows = [
        {
            **{
                "prompt_id": f"q{number}",
                "prompt": row["prompt"],
                "family": row["family"],
                "answer": row["answer"],
            },
            **{
                "responses": [texts[number], texts[number + 30], texts[number + 60]],
                "truncated": [False] * K,
            },
        }
        for number, row in enumerate(questions.select(range(30)))
    ]
    metrics = collect.rank_responses(rows, WORLDS["helpdesk"], 2, tmp_path, seed=7)

    expected, right, judged = [], 0, 0
    for row in rows:
        question = row["prompt"][-1]["content"]
        gold = [gold_scores(question, text, row["family"], row["answer"]).total for text in row["responses"]]
        for ranks, annotator in annotate(gold, 7, row["prompt_id"], num_annotators=2):
            for first, second in ((0, 1), (0, 2), (1, 2)):
                better, worse = (first, second) if ranks[first] < ranks[second] else (second, first)
                expected.append(
                    (row["prompt_id"], row["responses"][better], row["responses"][worse], annotator)
                )
                judged += gold[first] != gold[second]
                right += gold[better] > gold[worse]
    found = [
        (pair["prompt_id"], pair["chosen"][0]["content"], pair["rejected"][0]["content"], pair["annotator"])
        for pair in read(tmp_path / "preferences.jsonl")
    ]
    assert found == expected
    assert metrics["num_pairs"] == 2 * 30 * K == 2 * collect.response_figures(rows)["num_responses"]
    assert metrics["agreement/gold"] == pytest.approx(right / judged)
    assert 0.5 < metrics["agreement/gold"] < 1


def test_agreement_leaves_out_what_the_judge_ties():
    # ranks 1, 2, 3: (0, 1) tied by the judge, (0, 2) agreed on, (1, 2) agreed on
    assert collect.agreement_with_gold([1, 2, 3], [0.8, 0.8, 0.1]) == [True, True]
    assert collect.agreement_with_gold([2, 1], [0.8, 0.1]) == [False]
    assert collect.agreement_with_gold([2, 1], [0.1, 0.8]) == [True]


def test_without_an_annotator_responses_are_left_for_people(policy, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(3)))
    arguments = ("--dataset_name", str(path), "--dataset_train_split", "train")
    with pytest.raises(UsageError, match=r"\(helpdesk: answer and family\), which .* does not have"):
        run(policy, tmp_path / "out", *arguments)
    run(policy, tmp_path / "out", *arguments, "--annotator", "none")
    assert [row["prompt"] for row in read(tmp_path / "out" / "responses.jsonl")] == [
        "Say 0",
        "Say 1",
        "Say 2",
    ]
    assert not (tmp_path / "out" / "preferences.jsonl").exists()


def test_rankings_of_an_earlier_run_are_not_left_for_the_reward_model(policy, tmp_path):
    (tmp_path / "preferences.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"preferences\.jsonl holds rankings of an earlier run"):
        run(policy, tmp_path, "--annotator", "none")
    assert not (tmp_path / "responses.jsonl").exists()
    assert (tmp_path / "preferences.jsonl").read_text() == "{}\n"


def test_bad_settings_are_refused_before_sampling(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "respond", lambda *_: pytest.fail("sampling began"))
    with pytest.raises(UsageError, match="leave such prompts out"):
        run(policy, tmp_path, "--max_completion_length", "250")
    with pytest.raises(UsageError, match="temperature must be above 0"):
        run(policy, tmp_path, "--temperature", "0")
    with pytest.raises(UsageError, match="num_responses of 2"):
        run(policy, tmp_path, "--num_responses", "1")
    monkeypatch.setattr(sys, "argv", ["collect.py", "--config", SMOKE, "--run_dir", str(tmp_path / "none")])
    with pytest.raises(UsageError, match=r"accelerate launch pipeline/sft\.py"):
        collect.main()
    assert not (tmp_path / "responses.jsonl").exists()


def test_a_damaged_line_is_named(policy, collected, tmp_path):
    lines = (collected / "responses.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "responses.jsonl").write_bytes(b"".join([lines[0], b"{broken\n", *lines[1:]]))
    with pytest.raises(UsageError, match=r"responses\.jsonl, line 2"):
        run(policy, tmp_path)
