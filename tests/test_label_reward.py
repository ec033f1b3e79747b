"""From keys pressed in a browser to a reward model: what a person ranks there is worth what any ranking is."""

import json
import random
import sys

import pytest
from playwright.sync_api import expect

from tieback.data.helpdesk import annotate, gold_totals, make_split
from tieback.data.helpdesk.demonstrations import write_completion
from tieback.data.helpdesk.questions import draw_questions
from tieback.data.rankings import ranking_to_pairs
from tieback.data.tokenizer import train_tokenizer
from tieback.pipeline import reward
from tieback.pipeline.arguments import RECIPES
from tieback.pipeline.label import open_log
from tieback.pipeline.labelling.items import read_responses
from tieback.pipeline.labelling.page import build_page, open_page
from tieback.pipeline.labelling.session import Session
from tieback.pipeline.model_loading import load_tokenizer, new_policy
from tieback.reward_model.head import load_reward_model
from tieback.reward_model.scoring import RewardScorer


def collected(count, seed):
    """Rows as collect leaves them, of four people's answers in place of a model's."""
    rng = random.Random(seed)
    return [
        {
            "prompt_id": f"{number:06d}",
            "prompt": [{"role": "user", "content": question.prompt}],
            "responses": [write_completion(question, rng) for _ in range(4)],
            "family": question.family.name,
            "answer": list(question.fact.answers),
        }
        for number, question in enumerate(draw_questions("preferences", count, rng))
    ]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rank_in_browser(browser, rows, folder, seed):
    """Have the simulated annotator press the keys; returns the preference file that the page wrote."""
    items = read_responses(write_rows(folder / "responses.jsonl", rows))
    by_prompt = {row["prompt"][0]["content"]: row for row in rows}
    output = folder / "preferences.jsonl"
    page = build_page(Session(items, open_log(output), output), "Tieback")
    try:
        tab = browser.new_page()
        tab.goto(open_page(page, "127.0.0.1", None, None))
        tab.get_by_label("Your name").fill("scripted")
        tab.keyboard.press("Enter")
        for done in range(len(items)):
            expect(tab.locator(".count")).to_have_text(f"{done} of {len(items)}")
            row = by_prompt[tab.locator(".prompt .written").text_content()]
            ((ranks, _),) = annotate(gold_totals(row), seed, row["prompt_id"])
            rank_of = dict(zip(row["responses"], ranks, strict=True))
            for text in tab.locator(".response .written").all_text_contents():
                tab.keyboard.press(str(rank_of[text]))
            tab.keyboard.press("Enter")
        expect(tab.get_by_text("All done")).to_be_visible()
        tab.close()
    finally:
        page.close(verbose=False)
    return output


def simulated_pairs(rows, seed):
    return [
        pair
        for row in rows
        for pair in ranking_to_pairs(
            {**row, "ranks": annotate(gold_totals(row), seed, row["prompt_id"])[0][0]}
        )
    ]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_different_responses(rows):
    return [row for row in rows if len(set(row["responses"])) == 4]


def test_the_pages_file_is_the_one_of_an_annotator_who_ranks_alike(browser, tmp_path):
    rows = with_different_responses(collected(24, seed=0))
    made = read(rank_in_browser(browser, rows, tmp_path, seed=0))
    assert {pair.pop("annotator") for pair in made} == {"scripted"}
    assert made == simulated_pairs(rows, seed=0)


def train_reward_model(folder, pairs):
    output = pairs.parent / "reward_model"
    arguments = [
        *("--config", str(RECIPES / "helpdesk" / "reward.yaml"), "--run_dir", str(folder)),
        *("--output_dir", str(output), "--dataset_name", str(pairs), "--report_to", "none"),
        *("--save_strategy", "no", "--num_train_epochs", "2"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reward.py", *arguments])
        reward.main()
    return RewardScorer(load_reward_model(output), load_tokenizer(output))


def accuracy(scorer, rows):
    """Share of pairs, not tied by the gold judge, that the reward model orders as the judge does."""
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    texts = [[{"role": "assistant", "content": text}] for row in rows for text in row["responses"]]
    scores = iter(scorer.score(prompts, texts))
    right = []
    for row in rows:
        own, gold = [next(scores) for _ in row["responses"]], gold_totals(row)
        right += [
            (own[i] > own[j]) == (gold[i] > gold[j]) for i in range(4) for j in range(i) if gold[i] != gold[j]
        ]
    return sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.long
def test_a_reward_model_of_browser_made_rankings_is_as_good_as_the_simulated_annotators(browser, tmp_path):
    """The annotator in the browser follows the gold order with noise of its own: other mistakes, as many of them."""
    rows = with_different_responses(collected(1700, seed=1))
    train, held_out = rows[:1300], rows[1300:]
    texts = [row["completion"][0]["content"] for row in make_split("demonstrations", 2000, 0)]
    tokenizer = train_tokenizer(texts, 1536)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    new_policy({**sizes, "max_position_embeddings": 128}, tokenizer, seed=0).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    (tmp_path / "sft" / "metrics.json").write_text("{}")
    by_browser = rank_in_browser(browser, train, tmp_path / "browser", seed=1)
    simulated = write_rows(tmp_path / "simulated" / "preferences.jsonl", simulated_pairs(train, seed=0))
    accuracies = [
        accuracy(train_reward_model(tmp_path, pairs), held_out) for pairs in (simulated, by_browser)
    ]
    print("accuracy against the gold order: simulated annotator, browser:", accuracies)
    assert min(accuracies) > 0.6
    assert accuracies[1] >= accuracies[0] - 0.02
