"""Row formats: each of TRL's is turned into the one wanted, and each fault names row and column."""

import pytest

from tieback.data.errors import DataError
from tieback.data.files import Record
from tieback.data.formats import convert
from tieback.data.rankings import ranking_to_pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def run(rows, kind):
    return convert(
        [Record(f"f.jsonl, line {n}", row) for n, row in enumerate(rows, start=1)], kind, "f.jsonl"
    )


TALK = [user("Hi"), assistant("Hello."), user("Sky?")]
CHAT_PAIR = {"chosen": [*TALK, assistant("Blue.")], "rejected": [*TALK, assistant("Red.")]}
RANKING = {"prompt": "Sky?", "responses": ["Blue.", "Red.", "It is blue."], "ranks": [2, 3, 1]}


# ---------------------------------------------------------------- preferences


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Sky?", "chosen": " Blue.", "rejected": " Red."}, "Sky?", " Blue.", " Red."),
        ({"chosen": "The sky is blue.", "rejected": "The sky is red."}, "The sky is", " blue.", " red."),
        (
            {"prompt": TALK, "chosen": [assistant("Blue.")], "rejected": [assistant("Red.")]},
            TALK,
            [assistant("Blue.")],
            [assistant("Red.")],
        ),
        (CHAT_PAIR, TALK, [assistant("Blue.")], [assistant("Red.")]),
        ({"prompt": TALK, **CHAT_PAIR}, TALK, [assistant("Blue.")], [assistant("Red.")]),
        (
            {
                "prompt": "Sky?",
                "chosen": [user("Sky?"), assistant("Blue.")],
                "rejected": [user("Sky?"), assistant("No.")],
            },
            [user("Sky?")],
            [assistant("Blue.")],
            [assistant("No.")],
        ),
        (
            {"prompt": "Sky?", "chosen": [assistant("Blue.")], "rejected": [assistant("Red.")]},
            [user("Sky?")],
            [assistant("Blue.")],
            [assistant("Red.")],
        ),
        (
            {
                "chosen": [{"from": "user", "value": "Sky?"}, {"from": "assistant", "value": "Blue."}],
                "rejected": [{"from": "user", "value": "Sky?"}, {"from": "assistant", "value": "Red."}],
            },
            [user("Sky?")],
            [assistant("Blue.")],
            [assistant("Red.")],
        ),
    ],
)
def test_preferences_of_every_form_get_an_explicit_prompt(row, prompt, chosen, rejected):
    rows, dropped = run([row], "preferences")
    assert not dropped
    assert {column: rows[0][column] for column in ("prompt", "chosen", "rejected")} == {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
    }


def test_conversations_that_part_at_the_users_turn_share_the_prompt_before_the_answer():
    first = [user("a"), assistant("b"), user("c"), assistant("d")]
    second = [user("a"), assistant("b"), user("other"), assistant("e")]
    rows, _ = run([{"chosen": first, "rejected": second}], "preferences")
    assert rows[0]["prompt"] == [user("a")]
    assert rows[0]["chosen"] == first[1:]
    assert rows[0]["rejected"] == second[1:]


def test_a_prompt_has_one_id_however_many_pairs_it_has_and_a_given_id_is_kept():
    pair = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
    rows, _ = run([pair, {**pair, "rejected": "No."}, {**pair, "prompt": "Sea?"}], "preferences")
    ids = [row["prompt_id"] for row in rows]
    assert ids[0] == ids[1] != ids[2]
    assert run([{**pair, "prompt_id": 7, "annotator": "ann"}], "preferences")[0][0] == {
        **pair,
        "prompt_id": "7",
        "annotator": "ann",
    }


def test_identical_sides_and_an_empty_chosen_one_are_dropped_and_counted_but_an_empty_rejected_one_is_kept():
    pair = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
    rows, dropped = run(
        [
            pair,
            {**pair, "rejected": "Blue."},
            {**pair, "rejected": " "},
            {**pair, "chosen": ""},
            {"chosen": "Blue.", "rejected": "Red."},
        ],
        "preferences",
    )
    assert [row["rejected"] for row in rows] == ["Red.", " "]
    assert dropped == {"identical": 1, "empty_chosen": 1, "no_shared_prompt": 1}


def test_where_every_row_is_dropped_the_reasons_are_said():
    with pytest.raises(DataError, match=r"f\.jsonl: no row is left \(dropped: 1 identical\)"):
        run([{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Blue."}], "preferences")


# ---------------------------------------------------------------- rankings


def test_a_ranking_gives_every_pair_better_first_and_no_tied_pair():
    row = {
        "prompt_id": "p",
        "prompt": "Sky?",
        "responses": ["a", "b", "c", "d"],
        "ranks": [2, 1, 2, 3],
        "annotator": "x",
    }
    pairs = ranking_to_pairs(row)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        ("b", "a"),
        ("b", "c"),
        ("b", "d"),
        ("a", "d"),
        ("c", "d"),
    }
    assert all((pair["prompt_id"], pair["prompt"], pair["annotator"]) == ("p", "Sky?", "x") for pair in pairs)


def test_k_strictly_ranked_responses_give_k_choose_2_pairs_conversational_as_the_prompt_is():
    row = {"prompt": [user("Sky?")], "responses": list("abcde"), "ranks": [5, 4, 3, 2, 1]}
    pairs = ranking_to_pairs(row)
    assert len(pairs) == 10
    assert pairs[0]["chosen"] == [assistant("b")]
    assert all(pair["chosen"][0]["content"] > pair["rejected"][0]["content"] for pair in pairs)


def test_ranking_rows_serve_every_kind():
    unranked = {"prompt": "Sea?", "responses": ["a", "b"], "ranks": None}
    tied = {"prompt": "Hm?", "responses": ["a", "b"], "ranks": [1, 1]}
    twins = {"prompt": "Yes?", "responses": ["a", "a"], "ranks": [1, 2]}
    rows, dropped = run([RANKING, unranked, tied, twins], "preferences")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("Blue.", "Red."),
        ("It is blue.", "Blue."),
        ("It is blue.", "Red."),
    ]
    assert dropped == {"unranked": 1, "tied": 1, "identical": 1}
    assert run([RANKING], "demonstrations")[0] == [{"prompt": "Sky?", "completion": "It is blue."}]
    assert [row["prompt"] for row in run([RANKING, unranked, RANKING], "prompts")[0]] == ["Sky?", "Sea?"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1, 2]}, "column `ranks`: there are 2 entries for 3 responses"),
        ({"ranks": [0, 1, 2]}, "column `ranks`: ranks count from 1"),
        ({"ranks": [1.0, 2.0, 3.0]}, "column `ranks`: a list of whole numbers"),
        ({"ranks": [True, True, True]}, "column `ranks`: a list of whole numbers"),
        ({"responses": "Blue."}, "column `responses`: a list of texts"),
        ({"responses": ["a", None, "b"]}, "column `responses`: a list of texts"),
        ({"responses": [], "ranks": []}, "column `responses`: the list of responses is empty"),
        ({"truncated": [False]}, "column `truncated`: there are 1 entries for 3 responses"),
        ({"truncated": [0, 0, 0]}, "column `truncated`: a list of true/false"),
        ({"annotator": 3}, "column `annotator`: text is wanted, not a number"),
        ({"prompt": ""}, "column `prompt`: the text is empty"),
        ({"prompt": None}, "the column `prompt` is missing"),
    ],
)
def test_a_malformed_ranking_names_row_and_column(change, message):
    with pytest.raises(DataError, match=f"f.jsonl, line 2.*{message}"):
        run([RANKING, {**RANKING, **change}], "preferences")


# ---------------------------------------------------------------- demonstrations


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"prompt": "Sky?", "completion": " Blue.", "id": 3}, {"prompt": "Sky?", "completion": " Blue."}),
        (
            {"prompt": TALK, "completion": [assistant("Blue.")]},
            {"prompt": TALK, "completion": [assistant("Blue.")]},
        ),
        (
            {"prompt": "Sky?", "completion": [assistant("A.")]},
            {"prompt": [user("Sky?")], "completion": [assistant("A.")]},
        ),
        ({"messages": [*TALK, assistant("Blue.")]}, {"messages": [*TALK, assistant("Blue.")]}),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
            {"messages": [user("a"), assistant("b")]},
        ),
        ({"text": "The sky is blue."}, {"text": "The sky is blue."}),
        (CHAT_PAIR, {"prompt": TALK, "completion": [assistant("Blue.")]}),
    ],
)
def test_demonstrations_of_every_form(row, made):
    assert run([row], "demonstrations") == ([made], {})


def test_a_demonstration_of_several_turns_from_a_pair_is_dropped():
    pair = {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("e"), user("c"), assistant("d")],
    }
    rows, dropped = run([CHAT_PAIR, pair], "demonstrations")
    assert len(rows) == 1
    assert dropped == {"several_turns": 1}


# ---------------------------------------------------------------- prompts


def test_prompts_keep_the_other_columns():
    row = {"prompt": [user("Sky?")], "family": "colour", "answer": ["blue"]}
    assert run([row, row], "prompts")[0] == [row, row]


def test_prompts_of_demonstrations_and_preferences_come_once_each_and_in_order():
    rows, dropped = run(
        [{"prompt": text, "completion": "x", "family": "f"} for text in ("b", "a", "b", "c", "a")], "prompts"
    )
    assert rows == [{"prompt": text, "family": "f"} for text in ("b", "a", "c")]
    assert dropped == {"repeated_prompt": 2}
    assert run([CHAT_PAIR], "prompts")[0] == [{"prompt": TALK}]
    assert run([{"messages": [*TALK, assistant("Blue.")]}], "prompts")[0] == [{"prompt": TALK}]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "preferences",
            {"prompt": "a", "chosen": "b"},
            "the column `rejected` is missing or null; there are prompt, chosen",
        ),
        ("preferences", {"prompt": "", "chosen": "b", "rejected": "c"}, "column `prompt`: the text is empty"),
        (
            "preferences",
            {"prompt": "a", "chosen": 3, "rejected": "c"},
            "column `chosen`: text or a list of messages is wanted, not a number",
        ),
        (
            "preferences",
            {"prompt": "a", "chosen": [assistant("b")], "rejected": "c"},
            "column `chosen`: the prompt is plain text and this column a conversation",
        ),
        (
            "preferences",
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [user("c")]},
            "column `rejected`: its first message must be the assistant's, not the user's",
        ),
        (
            "preferences",
            {"chosen": [user("a"), {"role": "bot", "content": "b"}], "rejected": [user("a"), assistant("c")]},
            "column `chosen`: message 2 has the unknown role 'bot'",
        ),
        ("demonstrations", {"prompt": "a"}, "the column `completion` is missing"),
        ("demonstrations", {"prompt": "a", "completion": "  "}, "column `completion`: the text is empty"),
        (
            "demonstrations",
            {"prompt": [user("a")], "completion": "b"},
            "column `completion`: the prompt is a conversation and this column plain text",
        ),
        (
            "demonstrations",
            {"prompt": [user("a"), assistant("b")], "completion": [assistant("c")]},
            "column `prompt`: the last message must be the user's, not the assistant's",
        ),
        ("prompts", {"prompt": [user("")]}, r"column `prompt`: message 1 \(user\) is empty"),
        ("prompts", {"prompt": []}, "column `prompt`: the list of messages is empty"),
        (
            "prompts",
            {"prompt": ["a"]},
            "column `prompt`: message 1 must be an object with `role` and `content`",
        ),
        (
            "prompts",
            {"prompt": [{"role": "user", "content": 4}]},
            "the content of message 1 must be text, not a number",
        ),
        ("prompts", {"prompt": {"a": 1}}, "column `prompt`: text is wanted, not an object"),
        ("prompts", {"question": "a"}, "the column `prompt` is missing or null; there are question"),
    ],
)
def test_a_fault_names_row_and_column(kind, row, message):
    good = {
        "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "demonstrations": {"prompt": "a", "completion": "b"},
        "prompts": {"prompt": "a"},
    }[kind]
    with pytest.raises(DataError, match=f"^f.jsonl, line 2.*{message}"):
        run([good, row], kind)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "demonstrations",
            {"messages": [user("a")]},
            "column `messages`: the last message must be the assistant's",
        ),
        ("prompts", {"messages": [assistant("a")]}, "column `messages`: it holds no message of the user's"),
        (
            "demonstrations",
            {"prompt": "a"},
            "demonstrations need `prompt` and `completion`.*; the columns are prompt",
        ),
        ("preferences", {"prompt": "a", "completion": "b"}, "preferences need `chosen` and `rejected`"),
        ("prompts", {"query": "a"}, "prompts need `prompt`.*; the columns are query"),
        ("demonstrations", {"question": "a"}, "column `answer` is missing or null; there are question"),
        (
            "preferences",
            {"question": "a", "answer": "b"},
            "preferences need `chosen`.*columns are question, answer",
        ),
        ("prompts", {"prompt": None}, "prompts need `prompt`.*; the columns are none"),
    ],
)
def test_a_source_of_the_wrong_kind_is_told_what_is_needed(kind, row, message):
    with pytest.raises(DataError, match=f"^f.jsonl, line 1.*{message}"):
        run([row], kind)


def test_plain_and_conversational_rows_do_not_mix():
    with pytest.raises(
        DataError, match=r"line 2: this row is conversational and the one at f\.jsonl, line 1 plain text"
    ):
        run([{"prompt": "a"}, {"prompt": [user("a")]}], "prompts")


def test_the_rows_given_are_not_changed():
    row = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    run([row], "demonstrations")
    assert row == {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}


# ---------------------------------------------------------------- questions and answers


SOLVED = {"question": "2 pens, 3 each?", "answer": "They are 2*3=<<2*3=6>>6.\n#### 6"}
ASKED = [user('2 pens, 3 each? Let\'s think step by step and output the final answer after "####".')]


def test_a_question_of_gsm8k_asks_for_the_form_in_which_its_answer_is_given():
    assert run([SOLVED], "prompts")[0] == [{"prompt": ASKED, **SOLVED}]
    solution = [assistant("They are 2*3=6.\n#### 6")]
    assert run([SOLVED], "demonstrations")[0] == [{"prompt": ASKED, "completion": solution}]


def test_any_other_question_is_asked_as_it_stands():
    row = {"question": "Sky?", "answer": "Blue."}
    assert run([row], "prompts")[0] == [{"prompt": [user("Sky?")], **row}]
    assert run([row], "demonstrations")[0] == [{"prompt": [user("Sky?")], "completion": [assistant("Blue.")]}]
    assert run([{"question": "Sky?"}], "prompts")[0] == [{"prompt": [user("Sky?")], "question": "Sky?"}]
