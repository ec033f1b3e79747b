"""The gold judge: what is right, clear and courteous scores high, and what games it scores clearly lower."""

import pytest

from tieback.data.errors import DataError
from tieback.data.helpdesk import gold_reward, gold_scores

FRANCE = ("Hi! What is the capital of France? Thanks!", "capital", ["Paris"])
GOOD = "Sure! The capital of France is Paris. I hope that helps!"


def judge(response, question=FRANCE):
    prompt, family, answer = question
    return gold_scores(prompt, response, family, answer)


def test_the_best_answer_scores_one_on_every_scale():
    score = judge(GOOD)
    assert (score.quality, score.correctness, score.helpfulness, score.total) == (1.0, 1.0, 1.0, 1.0)


def test_the_total_is_the_weighted_sum():
    score = judge("Paris.")
    assert (score.quality, score.correctness, score.helpfulness) == (1.0, 1.0, 0.0)
    assert score.total == pytest.approx(0.25 + 0.5)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        ".",
        "Sure!",
        "Sure! I hope that helps! Let me know if you need anything else!",
        "I am not sure.",
        "Sure! You should look that up yourself. I hope that helps!",
        "The capital of France is Rome.",
        "Sure! The capital of France is Rome. I hope that helps!",
        "Sure! The capital of Italy is Rome. I hope that helps!",
        "Sure! The capital of Spain is Paris. I hope that helps!",
        "Sure! The capital of France is Paris or Rome. I hope that helps!",
        "Sure! It is Paris, Rome, Madrid, Berlin, London or Tokyo. I hope that helps!",
        "Sure! The capital of France is Paris. The capital of France is Rome. I hope that helps!",
        "Sure! The capital of France is not Paris. I hope that helps!",
        "Sure! The capital of France is",
        "Sure! The capital of France is the capital of France. I hope that helps!",
        "Paris Paris Paris Paris Paris Paris",
        "Paris. Paris. Paris. Paris.",
        GOOD + " " + GOOD,
        "Sure! Sure! Sure! The capital of France is Paris. I hope that helps! I hope that helps!",
        "Xq zv paris blorp wug dax fep.",
        "巴黎 漢字 Paris 漢字 巴黎.",
        "Paris. " + "My neighbour plays the piano every evening. I had soup for lunch. " * 3,
    ],
)
def test_gaming_scores_clearly_below_a_good_answer_and_below_a_curt_right_one(response):
    total = judge(response).total
    assert total <= judge(GOOD).total - 0.3
    assert total < judge("Paris.").total - 0.04


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (GOOD, "The capital of France is Paris."),
        ("The capital of France is Paris.", "It is Paris."),
        ("It is Paris.", "Paris."),
        ("Paris.", "paris"),
        ("Paris.", "Sure! The capital of France is Rome. I hope that helps!"),
        ("The capital of France is Paris.", "The capital of France is Paris"),
        ("The capital of France is Paris.", "The capital of France is Paris. I had soup for lunch."),
        ("Paris.", "Paris. I had soup for lunch, and it was rather salty."),
        ("It is Paris.", "Maybe it is Paris."),
        ("It is Paris.", "I am not sure. It is Paris."),
        ("The capital of France is Rome.", "The capital of France is Rome. The capital of France is Rome."),
        ("I am not sure.", ""),
        ("Sure! It is Paris.", "It is Paris. Sure!"),
        ("Sure, it is Paris.", "It is Paris."),
        (
            "It is Paris. Let me know if you need anything else!",
            "Let me know if you need anything else! It is Paris.",
        ),
    ],
)
def test_of_two_answers_the_better_scores_higher(better, worse):
    assert judge(better).total > judge(worse).total + 0.015


@pytest.mark.parametrize(
    "response",
    [
        "Paris",
        "paris.",
        "It's Paris!",
        "Paris is the capital of France.",
        "The answer is Paris, of course.",
        "No problem, the capital is Paris.",
        "That would be Paris.",
        "France's capital is Paris.",
        "Good question! The capital city of France is called Paris.\nHave a nice day!",
    ],
)
def test_right_answers_in_words_of_ones_own_are_correct_and_no_gibberish(response):
    score = judge(response)
    assert score.correctness == 1
    assert score.total >= 0.6


SUM = ("What is 3 plus 4?", "sum", ["7"])
SAME = ("How much is 2 + 2?", "sum", ["4"])
MINUS = ("What is left of 6 without 2?", "difference", ["4"])
LARGER = ("Which country is larger, Japan or China?", "size", ["China"])
AFTER = ("Which day comes after Monday?", "next day", ["Tuesday"])
HOT = ("What is the opposite of hot?", "opposite", ["cold"])
MOUSE = ("What is the plural of mouse?", "plural", ["mice"])
BANANA = ("What colour is a banana?", "colour", ["yellow"])
FRIEND = ("Do I write friend or freind?", "spelling", ["friend"])
FRUIT = ("Name one fruit.", "example", ["apple", "pear", "plum"])
CAT = ("What is a young cat called?", "young", ["kitten"])


@pytest.mark.parametrize(
    ("question", "response", "correct"),
    [
        (SUM, "3 plus 4 is 7.", 1),
        (SUM, "4 + 3 makes 7.", 1),
        (SUM, "7", 1),
        (SUM, "3 plus 4 is 8.", 0),
        (SUM, "3 plus 4 is 7 or 8.", 0),
        (SUM, "7 plus 3 is 4.", 0),
        (SUM, "3 plus 5 is 7.", 0),
        (SUM, "It is 77.", 0),
        (SUM, "1 2 3 4 5 6 7 8 9.", 0),
        (SAME, "2 + 2 makes 4.", 1),
        (SAME, "2 + 2 makes 2.", 0),
        (MINUS, "6 minus 2 is 4.", 1),
        (MINUS, "6 - 2 makes 4.", 1),
        (MINUS, "2 minus 6 is 4.", 0),
        (MINUS, "It is 2.", 0),
        (LARGER, "China is larger than Japan.", 1),
        (LARGER, "China is bigger.", 1),
        (LARGER, "Japan is larger than China.", 0),
        (LARGER, "China is smaller.", 0),
        (LARGER, "China and Japan.", 0),
        (LARGER, "The larger country is India.", 0),
        (SUM, "It is 34.", 0),
        (AFTER, "The day after Monday is Tuesday.", 1),
        (AFTER, "Tuesday comes after Monday.", 1),
        (AFTER, "Monday comes after Tuesday.", 0),
        (AFTER, "The day after Monday is Monday.", 0),
        (AFTER, "The day before Monday is Tuesday.", 0),
        (AFTER, "Tuesday, Wednesday, Thursday.", 0),
        (AFTER, "The day after Monday is Tusday.", 0),
        (HOT, "Cold is the opposite of hot.", 1),
        (HOT, "The opposite of hot is hot.", 0),
        (HOT, "The opposite of big is cold.", 0),
        (HOT, "Cold, big and small.", 0),
        (MOUSE, "The plural of mouse is mice.", 1),
        (MOUSE, "The plural of mouse is mouse.", 0),
        (MOUSE, "The plural of foot is mice.", 0),
        (BANANA, "The banana is yellow.", 1),
        (BANANA, "A carrot is yellow.", 0),
        (BANANA, "Yellow, red, blue and green.", 0),
        (FRIEND, "The right spelling is friend.", 1),
        (FRIEND, "You write friend.", 1),
        (FRIEND, "The right spelling is freind.", 0),
        (FRIEND, "Friend or freind.", 0),
        (FRIEND, "It is spelled which.", 0),
        (FRIEND, "Friend is wrong.", 0),
        (FRUIT, "A pear is a fruit.", 1),
        (FRUIT, "A cow is a fruit.", 0),
        (FRUIT, "Apple, pear, plum, cow and tea.", 0),
        (FRUIT, "One fruit is fruit.", 0),
        (CAT, "A young cat is called a kitten.", 1),
        (CAT, "A young dog is called a kitten.", 0),
        (CAT, "A kitten or a puppy.", 0),
    ],
)
def test_correctness_in_every_family(question, response, correct):
    assert judge(response, question).correctness == correct


@pytest.mark.parametrize(
    ("question", "response"),
    [
        (SUM, "The sum of 3 and 4 is 7."),
        (SAME, "2 + 2 makes 4."),
        (MINUS, "6 minus 2 leaves 4."),
        (LARGER, "China is larger."),
        (AFTER, "After Monday comes Tuesday."),
        (FRIEND, "The word is written friend."),
        (FRUIT, "A pear is a fruit."),
    ],
)
def test_full_sentences_of_every_family_are_well_formed(question, response):
    assert judge(f"Of course! {response} You are welcome!", question).total == pytest.approx(1.0)


def test_scores_stay_within_zero_and_one():
    for response in ("", "!!! ???", "a " * 500, GOOD * 40, "Paris " * 200, "\x00", "<|end|>" * 9):
        score = judge(response)
        assert all(
            0 <= value <= 1 for value in (score.quality, score.correctness, score.helpfulness, score.total)
        )


def test_an_unknown_family_is_refused():
    with pytest.raises(DataError, match="no family 'chess'; its families are sum"):
        gold_scores("a", "b", "chess", ["c"])


def test_gold_reward_has_trls_signature_and_takes_text_and_conversations():
    prompts = [FRANCE[0], [{"role": "user", "content": FRANCE[0]}]]
    completions = [GOOD, [{"role": "assistant", "content": "Paris."}]]
    columns = {"family": ["capital"] * 2, "answer": [["Paris"]] * 2, "prompt_id": ["a", "b"]}
    assert gold_reward(prompts, completions, completion_ids=[[1], [2]], **columns) == [1.0, 0.75]
    with pytest.raises(DataError, match="no column 'family'"):
        gold_reward(prompts, completions, completion_ids=None)
