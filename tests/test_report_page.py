import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tieback.pipeline.report import page as page_module
from tieback.pipeline.report.curves import curve, line_chart, logged_names, read_log
from tieback.pipeline.report.examples import examples_html
from tieback.pipeline.report.html_parts import escape
from tieback.pipeline.report.page import Report, render
from tieback.reward_model.report import CalibrationBin

HOSTILE = (
    "\"><script>alert(1)</script><img src=x onerror=alert(2)>'</style></td>&amp;<!-- ]]> javascript:alert(3)"
)
METRICS = {
    "num_prompts": 3,
    "win_rate/ppo_vs_sft": 0.8,
    "win_rate/ci95_low": 0.7,
    "win_rate/ci95_high": 0.9,
    "win_rate/reward_model": 0.85,
    "kl/ppo_vs_sft": 4.5,
    **{
        f"{name}/{side}": 0.5
        for name in ("gold_score", "reward_score", "response_length")
        for side in ("sft", "ppo")
    },
}
VOID = {"meta", "img", "br"}
OWN_SCRIPT = "\n" + (Path(page_module.__file__).parent / "sort.js").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would make of the page: its tags, its text, and whether tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.styles, self.scripts, self.open = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kept = {"style": self.styles, "script": self.scripts}
        kept.get(self.open[-1] if self.open else "", self.text).append(data)


def side(response="fine", gold=0.0, reward=0.0, **more):
    return {
        "response": response,
        "gold_score": gold,
        "reward_score": reward,
        "num_tokens": 3,
        "truncated": False,
        **more,
    }


def pair(prompt="Hello?", sft=None, ppo=None):
    return {"prompt": prompt, "sft": sft or side(), "ppo": ppo or side("better", gold=1.0)}


def make_report(**changes):
    history = [
        {"step": step, "reward/mean": step / 2, "eval_reward/mean": step / 3, "kl/ref": 0.1}
        for step in range(5)
    ]
    defaults = {
        "metrics": METRICS,
        "pairs": [pair() for _ in range(3)],
        "judge": "gold_score",
        "judge_name": "the judge",
        "prompts_name": "some prompts",
        "histories": {"ppo": history, "sft": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
        "settings": {"evaluate": {"temperature": 1.0}},
        "versions": {"torch": "2"},
    }
    return Report(**{**defaults, **changes})


@pytest.fixture
def hostile_report():
    return make_report(
        pairs=[
            pair(prompt=HOSTILE),
            pair(
                prompt=[{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": HOSTILE}],
                sft=side(HOSTILE, gold=2.0),
                ppo=side(HOSTILE),
            ),
        ],
        judge_name=HOSTILE,
        prompts_name=HOSTILE,
        histories={"ppo": [{"step": step, HOSTILE: step, "$\\frac{": step} for step in range(4)]},
        stage_metrics={HOSTILE: {HOSTILE: 1.0}},
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        versions={HOSTILE: HOSTILE},
    )


def test_hostile_text_is_shown_and_does_nothing(hostile_report):
    page = Page(render(hostile_report))
    assert page.tags.count("script") == 1
    assert page.scripts == [OWN_SCRIPT]
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = "".join(page.text)
    # Prompts twice and more, two responses, judge, prompts' name, stage, metric, setting, version, curve.
    assert shown.count(HOSTILE) >= 12
    assert "".join(page.styles).count("alert") == 0


@pytest.mark.parametrize("make", [make_report, None])
def test_the_page_needs_no_network(make, hostile_report):
    html = render(make() if make else hostile_report)
    page = Page(html)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith("data:image/png;base64,"), (name, value)
        assert "://" not in (value or "")
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not re.search(r"url\(|@import|expression", "".join(page.styles))


def test_control_characters_and_lone_surrogates_are_made_visible():
    assert escape("a\x00b\x1b[31m\ud800\nc\td") == "a␀b␛[31m?\nc\td"


def test_the_headline_says_what_the_interval_allows():
    def title(low, high):
        metrics = {**METRICS, "win_rate/ci95_low": low, "win_rate/ci95_high": high}
        return re.search("<title>(.*)</title>", render(make_report(metrics=metrics)))[1]

    assert title(0.51, 0.6) == "PPO’s responses are preferred to SFT’s"
    assert title(0.4, 0.49) == "SFT’s responses are preferred to PPO’s"
    assert title(0.49, 0.6) == title(0.4, 0.51) == "No clear preference between PPO and SFT"


def test_an_interval_without_width_is_explained():
    certain = {**METRICS, "win_rate/ppo_vs_sft": 1.0, "win_rate/ci95_low": 1.0, "win_rate/ci95_high": 1.0}
    assert "the interval has no width" in " ".join(render(make_report(metrics=certain)).split())
    assert "the interval has no width" not in " ".join(render(make_report()).split())


def test_the_page_works_with_the_reward_model_as_the_only_judge():
    reward_only = {name: value for name, value in METRICS.items() if not name.startswith("gold_score")}
    without_gold = {name: value for name, value in side().items() if name != "gold_score"}
    report = make_report(
        metrics=reward_only,
        judge="reward_score",
        pairs=[pair(sft=without_gold, ppo={**without_gold, "reward_score": 1.0})],
    )
    html = render(report)
    assert "gold" not in "".join(Page(html).text).lower()
    assert html.count('<span class="won">') == 1


def test_the_same_run_gives_the_same_page():
    assert render(make_report()) == render(make_report())


def shown_without_script(pairs, count, seed=0):
    html = examples_html(pairs, "gold_score", count, seed)
    return re.findall(r'data-drawn="1"><div class="prompt"><div class="text" dir="auto">(.*?)</div>', html)


def test_examples_are_drawn_from_all_pairs_without_repeats():
    pairs = [pair(prompt=f"prompt {number}") for number in range(40)]
    drawn = [shown_without_script(pairs, 10, seed) for seed in range(60)]
    assert all(len(set(sample)) == 10 for sample in drawn)
    assert {prompt for sample in drawn for prompt in sample} == {f"prompt {number}" for number in range(40)}
    assert len(shown_without_script(pairs, 100)) == 40
    html = examples_html(pairs, "gold_score", 10, 0)
    assert html.count("<article") == 40
    assert html.count('data-drawn="0" hidden>') == 30


def test_what_changed_is_marked_where_two_responses_are_alike():
    def marks(sft, ppo):
        html = examples_html([pair(sft=side(sft), ppo=side(ppo))], "gold_score", 1, 0)
        return [re.findall("<mark>(.*?)</mark>", part) for part in html.split('class="side"')[1:]]

    assert marks("The capital is Sydney.", "The capital is Canberra.") == [["Sydney."], ["Canberra."]]
    assert marks("It is two", "It is two, I think") == [["two"], ["two, I think"]]
    assert marks("So: yes.\n\nIt is two", "So: yes. It is  three") == [["two"], ["three"]], "space is no word"
    assert marks("the same", "the same") == [[], []]
    assert marks("one thing", "something else entirely") == [[], []], (
        "nothing in common: marks would tell nothing"
    )
    assert marks("a <b> c d", "a <i> c d") == [["&lt;b&gt;"], ["&lt;i&gt;"]]
    long = "word " * 5000
    assert marks(long + "x", long + "y") == [[], []], "beyond the words that are compared"


def test_peoples_judgement_stands_beside_the_judges():
    figures = {
        "human/win_rate": 0.625,
        "human/ci95_low": 0.5,
        "human/ci95_high": 0.75,
        "human/num_prompts": 40,
        "human/num_judgements": 44,
        "human/agreement_with_judge": 0.9,
    }
    text = " ".join(" ".join(Page(render(make_report(human=figures))).text).split())
    assert "62.5% win rate of PPO, by people 95% interval 50.0% to 75.0%" in text
    assert "44 judgements of 40 of these prompts" in text
    assert "they agree on 90.0%" in text
    assert "By people" not in render(make_report())


def test_rounds_stand_below_one_another():
    rounds = [{**METRICS, "gold_score/ppo": gold} for gold in (0.125, 0.25, 0.375)]
    text = "".join(Page(render(make_report(rounds=rounds))).text)
    assert re.search(r"round 1.*?0\.125.*round 2.*?0\.250.*round 3.*?0\.375", text, re.DOTALL)
    assert "Round by round" not in render(make_report(rounds=rounds[:1]))


def test_reward_stands_against_kl_with_the_frontier_where_there_is_one():
    html = render(make_report())
    assert "Reward against KL" in html
    assert "best of" not in html
    frontier = [{"n": n, "kl": n / 4, "reward_score": n / 2, "gold_score": n / 8} for n in (1, 2, 4)]
    with_frontier = render(make_report(frontier=frontier))
    assert with_frontier.count("<svg") == html.count("<svg")
    text = "".join(Page(with_frontier).text)
    assert re.search(r"best of 4.*?1\.00.*?2\.00.*?0\.50", text, re.DOTALL)
    assert "Reward against KL" not in render(make_report(histories={}))


def points_of(html, colour, chart=0):
    """Heights of the points of a colour in a chart of reward against KL."""
    svg = html.split("Reward against KL", 1)[1].split("</svg>")[chart]
    paths = re.findall(rf'<path d="([^"]+)" style="[^"]*stroke: var\(--series-{colour}\)', svg)
    return [float(y) for path in paths for y in dict.fromkeys(re.findall(r"[ML] [\d.]+ ([\d.]+)", path))]


def test_ppo_and_best_of_n_are_drawn_by_the_same_score():
    """PPO whose raw score is always that of best-of-n lies on its curve, however its scores are normalised."""
    frontier = [{"n": n, "kl": kl, "reward_score": kl / 2} for n, kl in ((1, 0.0), (2, 0.2), (4, 0.6))]
    history = [
        {"step": step, "kl/ref": kl, "reward/rm": kl / 2, "reward/mean": kl, "reward/normalized_mean": 2 * kl}
        for step, kl in enumerate((0.0, 0.2, 0.6))
    ]
    html = render(make_report(frontier=frontier, histories={"ppo": history}, reward_name="rm"))
    assert points_of(html, 1) == pytest.approx(points_of(html, 2))
    # Of a reward model that PPO did not learn from, the score is another one, and only the table has it.
    html = render(make_report(frontier=frontier, histories={"ppo": history}, reward_name="other"))
    chart = html.split("Reward against KL", 1)[1].split("</svg>")[0]
    assert "var(--series-1)" in chart
    assert "var(--series-2)" not in chart
    assert "best of 4" in html


def test_the_gold_judge_has_a_chart_of_its_own_where_it_judged_both_and_evaluations_come_first():
    frontier = [
        {"n": n, "kl": kl, "reward_score": kl, "gold_score": 1 - kl}
        for n, kl in ((1, 0.0), (2, 0.2), (4, 0.6))
    ]
    history = [
        {"step": 1, "kl/ref": 9.0, "reward/rm": 9.0},
        {"step": 2, "kl/ref": 8.0, "reward/rm": 8.0},
        *(
            {
                "step": step,
                "eval_kl/ref": kl,
                "eval_reward/rm": kl,
                "eval_judge/mean": 1 - kl,
                "eval_reward/mean": kl,
            }
            for step, kl in enumerate((0.0, 0.2, 0.6))
        ),
    ]
    judges = {"ppo": {"judge_funcs": ["rules:gold"]}, "evaluate": {"gold_funcs": ["rules:gold"]}}
    metrics = METRICS | {"gold_score/ppo": 0.89, "kl/ppo_vs_sft": 3.04}
    given = {"frontier": frontier, "histories": {"ppo": history}, "reward_name": "rm", "metrics": metrics}
    html = render(make_report(**given, settings=judges))
    for chart in (0, 1):
        assert len(points_of(html, 1, chart)) == 3
        assert points_of(html, 1, chart) == pytest.approx(points_of(html, 2, chart), abs=0.01)
    rising, falling = points_of(html, 1), points_of(html, 1, 1)
    assert (rising, falling) == (sorted(rising, reverse=True), sorted(falling))  # heights count from the top
    shades = [
        float(shade) for shade in re.findall(r"stroke-opacity: ([\d.]+)", html.split("Reward against KL")[1])
    ]
    assert shades[:2] == sorted(shades[:2])
    said = "PPO’s gold score is 0.89 at 3.0 nats, that of the best of 4 responses of SFT 0.40 at 0.6."
    assert said in "".join(Page(html).text)
    other = judges | {"ppo": {"judge_funcs": ["rules:other"]}}
    assert "Gold judge" not in render(make_report(**given, settings=other))


def test_people_are_named_only_where_people_ranked():
    accuracies = {"reward": {"accuracy/held_out": 0.75, "accuracy/length_only": 0.5}}
    html = render(make_report(stage_metrics=accuracies, ranked_by="the simulated annotator"))
    assert "prefers what the simulated annotator preferred in 75.0%" in html
    assert "people preferred" not in html


def test_the_diagnostics_of_pong_stand_on_the_axes_of_the_language_model():
    names = ("policy/entropy", "policy/approx_kl", "policy/clip_fraction")
    history = [{"step": step, **dict.fromkeys(names, step / 7)} for step in range(1, 6)]
    pong = [
        {"step": 2048 * step, **dict.fromkeys(names, step / 9), "return/mean_20": 1.0} for step in range(1, 9)
    ]
    without = render(make_report(histories={"ppo": history}))
    html = render(make_report(histories={"ppo": history}, pong_history=pong))
    assert "The tie-back" not in without
    assert html.count("<svg") == without.count("<svg") + 3
    assert "% of the training" in html


def test_the_page_says_where_the_time_went():
    phases = {"time/generate": 3.0, "time/score": 1.0, "time/logprobs": 1.0, "time/update": 5.0}
    more = {"tokens_per_second": 1234.4, "memory/peak": 1500.0}
    slow = {name: 100 * value for name, value in (phases | more).items()}
    history = [{"step": step, **phases, **more} for step in range(4)] + [{"step": 4, **slow}]
    html = render(make_report(histories={"ppo": history}))
    assert (
        "An iteration took 10.0 seconds (medians): sampling 30%, scoring 10%, log-probabilities and values 10%, "
        "the update 50%. 1,234 tokens were sampled for each second of it, and a process held 150,000 MiB at most."
    ) in " ".join(Page(html).text)
    assert "seconds (medians)" not in render(make_report())


def test_curves_leave_out_what_is_not_a_finite_number():
    history = [
        {"step": 1, "kl/ref": 1.0},
        {"step": 2, "kl/ref": float("nan")},
        {"step": 3, "kl/ref": True},
        {"step": 4, "kl/ref": "high"},
        {"step": 5, "other": 1.0},
        {"step": 6, "kl/ref": 3},
    ]
    found = curve(history, "kl/ref")
    assert (found.steps, found.values) == ((1.0, 6.0), (1.0, 3.0))
    assert curve(history, "other") is None
    assert logged_names(
        [{"step": 1, "epoch": 0.1, "kl/ref": 1, "train_runtime": 3, "eval_samples_per_second": 2}]
    ) == ["kl/ref"]


def test_a_chart_draws_its_values_in_the_colours_of_the_page():
    rising, falling = (curve([{"step": s, "x": sign * s} for s in range(3)], "x") for sign in (1, -1))
    svg = line_chart([rising, falling], "A <b> title", "iteration", "nats")

    def heights(series):
        path = re.search(rf'd="([^"]*)"[^>]*stroke: var\(--series-{series}\)', svg)[1]
        return [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path)]

    assert heights(1) == sorted(heights(1), reverse=True)  # in SVG, y grows downwards
    assert heights(2) == sorted(heights(2))
    assert len(heights(1)) == 3
    assert "://" not in svg
    assert "id=" not in svg
    assert ">nats</text>" in svg


def test_a_chart_says_in_words_what_it_shows():
    item = curve(
        [{"step": step, "kl/ref": value} for step, value in ((1, 0.5), (2, 3.0), (8, 2.0))], "kl/ref"
    )
    svg = line_chart([None, item], "A <b> title", "iteration", "nats")
    opening, _, rest = svg.partition(">")
    assert 'role="img"' in opening
    assert rest.startswith("<title>A &lt;b&gt; title</title>")
    assert "<desc>kl/ref: 0.5 at iteration 1, 2 at 8; between 0.5 and 3.</desc>" in rest


def test_every_chart_of_the_page_has_a_text():
    html = render(make_report(calibration=[CalibrationBin(0.2, 0.3, 9), CalibrationBin(0.8, 0.7, 9)]))
    assert "<desc>held-out pairs: 0.3 at predicted probability 0.2, 0.7 at 0.8; between 0.3 and 0.7." in html
    charts = re.findall(r"<svg[^>]*>(?:<title>[^<]+</title><desc>[^<]+</desc>)?", html)
    assert charts
    assert all('role="img"' in chart and chart.endswith("</desc>") for chart in charts)


def test_the_log_is_read_from_the_folder_or_its_newest_checkpoint(tmp_path):
    assert read_log(tmp_path) == []
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    (tmp_path / "checkpoint-best").mkdir()
    assert read_log(tmp_path) == [{"step": 10}]
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 11, "loss": NaN}]}')
    assert read_log(tmp_path)[0]["step"] == 11


def kinds_of_pairs(counts, column="family"):
    """For each kind so many prompts, of which PPO wins the share that stands behind the count."""
    return [
        pair(sft=side(gold=0.0), ppo=side(gold=float(row < share * count)))
        | {
            "outcome": float(row < share * count),
            "columns": {column: kind, "answer": [str(row)], "number": f"{kind} {row}"},
        }
        for kind, (count, share) in counts.items()
        for row in range(count)
    ]


def test_each_kind_of_prompt_has_its_win_rate_the_worst_first():
    pairs = kinds_of_pairs({"sums": (10, 0.9), HOSTILE: (10, 0.2), "capitals": (10, 0.5)})
    html = render(make_report(pairs=pairs))
    assert HOSTILE not in html
    text = " ".join(" ".join(Page(html).text).split("By kind of prompt")[1].split("PPO training")[0].split())
    shown = "script.* 10 20% 0% to 50% 0.00 0.20 .*capitals 10 50% .*sums 10 90% 70% to 100% 0.00 0.90"
    assert re.search(f"family .*{shown}", text)
    assert "answer" not in text
    assert "number" not in text  # each its own


@pytest.mark.parametrize(
    "counts",
    [{"one": (30, 0.5)}, {f"kind {n}": (5, 0.4) for n in range(21)}, {"many": (4, 0.5), "few": (4, 0.5)}],
)
def test_a_column_of_one_value_or_of_many_is_no_kind(counts):
    assert "By kind of prompt" not in render(make_report(pairs=kinds_of_pairs(counts)))


def test_what_was_left_out_of_the_reward_models_pairs_is_said() -> None:
    figures = {"num_pairs/dropped_unreliable": 30, "agreement/ann": 0.91, "agreement/<b>": 0.48}
    html = render(make_report(stage_metrics={"reward": figures}))
    assert "30 pairs are left out for annotators who rarely order pairs as most others do." in html
    assert "&lt;b&gt; 48%, ann 91%" in html
    votes = {"num_pairs/dropped_disputed": 11, "num_pairs/train": 18, "num_pairs/held_out": 2}
    html = render(make_report(stage_metrics={"reward": votes}))
    assert "11 pairs of responses are left out because too few" in html
    assert "on the order; 20 are kept." in html
    assert "left out" not in render(make_report(stage_metrics={"reward": {"num_pairs/train": 18}}))
    assert "rarely order pairs" not in render(make_report(stage_metrics={"reward": {"loss/train": 0.6}}))
