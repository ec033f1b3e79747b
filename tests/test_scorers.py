"""Scorers: how several are mixed, what a reward function may return, and faults that are named."""

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import RewardError, Scorer, call_scorers, combine_rewards


def rollout() -> Rollout:
    return Rollout(
        prompts=[f"prompt {row}" for row in range(4)],
        columns={"target": ["cat"] * 4},
        prompt_ids=[[5]] * 4,
        completion_ids=[[6]] * 4,
        truncated=[False] * 4,
        completions=[f"completion {row}" for row in range(4)],
    )


# Several functions, weights, and rows that are not judged.


def test_scores_are_the_weighted_sum_over_the_functions_that_judged() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [1.0, nan], [0.0, -4.0]])
    scores = combine_rewards(rewards, [0.5, 10.0], rollout())
    assert scores.tolist() == [20.5, 20.0, 0.5, -40.0]


def test_functions_models_and_weights_go_together_in_the_trainer(tmp_path: Path) -> None:
    def target_reward(target: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if word == "cat" else float(len(word)) for word in target]

    trainer = toy.ppo_trainer(
        tmp_path, [toy.id_reward, target_reward], reward_weights=[2.0, 0.5], missing_eos_penalty=0
    )
    trainer.train()
    scored = trainer._last_rollout
    first = torch.tensor(toy.id_reward(scored.rollout.completion_ids))
    words = scored.rollout.columns["target"]
    assert "cat" in words
    second = torch.tensor([0.0 if word == "cat" else float(len(word)) for word in words])
    torch.testing.assert_close(scored.scores, 2.0 * first + 0.5 * second)
    torch.testing.assert_close(scored.raw_scores, scored.scores)
    log = trainer.state.log_history[-2]
    judged = [len(word) for word in words if word != "cat"]
    assert log["reward/target_reward"] == pytest.approx(sum(judged) / len(judged))
    assert log["reward/id_reward"] == pytest.approx(first.mean().item())
    assert log["reward/mean"] == pytest.approx(scored.scores.mean().item())
    assert log["reward/std"] == pytest.approx(scored.scores.std(correction=0).item(), rel=1e-5)


def test_what_is_shown_is_the_raw_score_and_what_is_learnt_from_has_a_name_of_its_own(tmp_path: Path) -> None:
    """A score that is normalised may exceed the greatest raw one: neither is shown as the other."""

    def one_for_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids) % 2 == 0) for ids in completion_ids]

    trainer = toy.ppo_trainer(
        tmp_path, one_for_even, normalize_rewards=True, missing_eos_penalty=0.25, max_steps=3
    )
    trainer.train()
    scored = trainer._last_rollout
    raw = torch.tensor(one_for_even(scored.rollout.completion_ids))
    truncated = torch.tensor(scored.rollout.truncated).float()
    assert torch.equal(scored.raw_scores, raw)
    deviation = trainer.reward_moments.std
    assert deviation < 1
    torch.testing.assert_close(scored.scores, raw / deviation - 0.25 * truncated)
    log = trainer.state.log_history[-2]
    assert log["reward/mean"] == pytest.approx(raw.mean().item())
    assert log["reward/std"] == pytest.approx(raw.std(correction=0).item(), rel=1e-5)
    assert log["reward/normalized_mean"] == pytest.approx(scored.scores.mean().item())
    assert abs(log["reward/normalized_mean"] - log["reward/mean"]) > 0.1


def test_weights_must_be_as_many_as_the_functions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_weights has 1 entries for 2 reward functions"):
        toy.ppo_trainer(tmp_path, [toy.id_reward, toy.id_reward], reward_weights=[1.0])


def test_no_reward_function_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_funcs is empty: name at least one"):
        toy.ppo_trainer(tmp_path, [])


# Reward functions that fail, each before a step is taken.

FAULTS = {
    "too few": (
        lambda n: [0.0] * (n - 1),
        r"`faulty` returned 7 rewards for 8 completions.*exactly one for each",
    ),
    "too many": (lambda n: [0.0] * (n + 1), r"`faulty` returned 9 rewards for 8 completions"),
    "NaN": (
        lambda n: [0.0] * (n - 1) + [math.nan],
        r"`faulty` returned nan for row 7 .*Return a finite number, or None",
    ),
    "infinity": (lambda n: [math.inf] + [0.0] * (n - 1), r"`faulty` returned inf for row 0 "),
    "a string": (
        lambda n: ["good"] * n,
        r"`faulty` returned 'good' for row 0 of the batch \(prompt .*completion .*",
    ),
    "a number as a string": (lambda n: ["1.0"] * n, r"`faulty` returned '1.0' for row 0 "),
    "too many of a token": (
        lambda n: [[1.0] * 7] * n,  # of 6 at most
        r"`faulty` returned 7 rewards by token for row 0 of the batch, whose completion has \d tokens \(completion_ids\[0\]\)",
    ),
    "none of a token": (lambda n: [[]] * n, r"`faulty` returned 0 rewards by token for row 0 "),
    "bytes": (lambda n: [b"1"] * n, r"`faulty` returned b'1' for row 0 "),
    "a table": (lambda n: torch.zeros(n, 9), r"`faulty` returned 9 rewards by token for row 0 "),
    "one number as a tensor": (
        lambda n: torch.tensor(1.0),
        r"`faulty` returned float, not a list of numbers",
    ),
    "infinite in fp32": (lambda n: [1e300] * n, r"`faulty` returned 1e\+300 for row 0 "),
    "too great for a float": (lambda n: [10**400] * n, r"`faulty` returned 1000"),
    "no list": (lambda n: 1.0, r"`faulty` returned float, not a list of numbers"),
    "nothing": (lambda n: None, r"`faulty` returned NoneType, not a list of numbers"),
    "None for all": (
        lambda n: [0.0] * (n - 1) + [None],
        r"Every reward function returned None for row 7 of the batch \(prompt ",
    ),
    "an exception": (
        lambda n: 1 / 0,
        r"`faulty` raised ZeroDivisionError: division by zero.*columns \['target'\]",
    ),
}


def awaited(function: Any) -> Any:
    """The same as an asynchronous function."""

    @wraps(function)
    async def asynchronous(**arguments: Any) -> Any:
        await asyncio.sleep(0)
        return function(**arguments)

    return asynchronous


@pytest.mark.parametrize("kind", [lambda function: function, awaited], ids=["plain", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_function_that_fails_is_named_and_no_step_is_taken(
    tmp_path: Path, fault: str, kind: Any
) -> None:
    returned, message = FAULTS[fault]

    def faulty(completions: list[Any], **_: Any) -> Any:
        return returned(len(completions))

    trainer = toy.ppo_trainer(tmp_path, kind(faulty))
    before = toy.weights(trainer.model)
    with pytest.raises(RewardError, match=f"(?s){message}"):
        trainer.train()
    torch.testing.assert_close(toy.weights(trainer.model), before, rtol=0, atol=0)


def test_a_reward_function_that_does_not_take_the_columns_is_refused_before_there_is_anything_to_judge(
    tmp_path: Path,
) -> None:
    def without_the_rest(completions: list[Any]) -> list[float]:
        raise AssertionError("called")

    def with_another_column(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        raise AssertionError("called")

    message = (
        "`without_the_rest` cannot judge train_dataset: got an unexpected keyword argument 'prompts'.*target"
    )
    with pytest.raises(UsageError, match=message):
        toy.ppo_trainer(tmp_path, without_the_rest)
    message = "`with_another_column` cannot judge train_dataset: missing a required argument: 'answer'"
    with pytest.raises(UsageError, match=message):
        toy.ppo_trainer(tmp_path, with_another_column)
    trainer = toy.ppo_trainer(tmp_path, lambda target, **_: [0.0] * len(target))
    with pytest.raises(UsageError, match=r"`<lambda>` cannot judge eval_dataset: missing .*'target'"):
        trainer.evaluate([{"prompt": "red"}])


def test_a_reward_function_may_return_a_tensor_an_array_integers_or_truth_values(tmp_path: Path) -> None:
    for returned in (torch.ones(8), np.ones(8), [1] * 8, (True,) * 8, [np.float32(1.0)] * 8):
        trainer = toy.ppo_trainer(tmp_path, lambda returned=returned, **_: returned, missing_eos_penalty=0)
        scored = trainer.score(trainer.generate([toy.prompts()[row] for row in range(8)]))
        assert scored.scores.tolist() == [1.0] * 8


def by_token(completion_ids: list[list[int]], bad: float | None) -> list[list[float | None]]:
    return [[0.0] * (len(ids) - 1) + [bad] for ids in completion_ids]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1"])
def test_a_reward_of_a_token_that_is_no_finite_number_is_named_with_its_place(bad: Any) -> None:
    three = replace(rollout(), completion_ids=[[6, 7, 8]] * 4)
    with pytest.raises(
        RewardError, match=rf"returned {bad!r} for row 0, token 2 of the batch \(prompt 'prompt 0'"
    ):
        call_scorers([lambda completion_ids, **_: by_token(completion_ids, bad)], three)


def test_rewards_by_token_come_with_their_sums_and_may_be_tensors_or_arrays() -> None:
    two = replace(rollout(), completion_ids=[[6, 7]] * 4)
    given = [[1.0, 2.5], torch.tensor([1.0, 2.5]), np.array([1.0, 2.5]), (1, 2.5)]
    (found,) = call_scorers([lambda **_: given], two)
    assert found == ([3.5] * 4, [[1.0, 2.5]] * 4)
    (found,) = call_scorers([lambda **_: torch.tensor([[1.0, 2.5]] * 4)], two)
    assert found == ([3.5] * 4, [[1.0, 2.5]] * 4)


# Asynchronous reward functions.


class Judge:
    """Judges only when as many are judging at once as there are seats at the table."""

    def __init__(self, table: "Table", reward: float | None) -> None:
        self.table = table
        self.reward = reward

    async def __call__(self, completions: list[Any], **_: Any) -> list[float | None]:
        await self.table.sit_down()
        return [self.reward] * len(completions)


class Table:
    def __init__(self, seats: int) -> None:
        self.seats = seats
        self.taken = 0
        self.loops: set[asyncio.AbstractEventLoop] = set()

    async def sit_down(self) -> None:
        self.loops.add(asyncio.get_running_loop())
        self.taken += 1
        while self.taken < self.seats:
            await asyncio.sleep(0.001)


def test_asynchronous_functions_judge_together_and_their_rewards_stand_in_their_places() -> None:
    table = Table(3)

    async def judge(completions: list[Any], target: list[str], weight: float, **_: Any) -> list[float]:
        await table.sit_down()
        return [weight * len(word) for word in target]

    def plain(completions: list[Any], **_: Any) -> list[float]:
        return [4.0] * len(completions)

    scorers: list[Scorer] = [Judge(table, 1.0), plain, partial(judge, weight=2.0), Judge(table, None)]
    rewards = [found.totals for found in call_scorers(scorers, rollout())]
    assert rewards[:3] == [[1.0] * 4, [4.0] * 4, [6.0] * 4]
    assert all(math.isnan(reward) for reward in rewards[3])


def test_all_iterations_share_one_event_loop() -> None:
    """An HTTP client that is made once belongs to the loop that it was first used in."""
    table = Table(1)
    for _ in range(2):
        call_scorers([Judge(table, 1.0)], rollout())
    (loop,) = table.loops
    assert not loop.is_closed()


def test_an_asynchronous_function_is_called_within_a_running_loop_too(tmp_path: Path) -> None:
    async def notebook() -> dict[str, float]:
        trainer = toy.ppo_trainer(tmp_path, awaited(toy.id_reward))
        trainer.train()
        return toy.weights(trainer.model)

    # In a thread of its own: the browser of other tests keeps a loop running in this one.
    with ThreadPoolExecutor(1) as executor:
        weights = executor.submit(asyncio.run, notebook()).result()
    trainer = toy.ppo_trainer(tmp_path, toy.id_reward)
    trainer.train()
    torch.testing.assert_close(weights, toy.weights(trainer.model), rtol=0, atol=0)


def test_one_that_fails_is_named_at_once_and_the_others_are_cancelled() -> None:
    ended = threading.Event()

    async def waits(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()
        return []

    async def fails(**_: Any) -> list[float]:
        raise ConnectionError("no route")

    with pytest.raises(RewardError, match="`fails` raised ConnectionError: no route"):
        call_scorers([waits, fails], rollout())
    assert ended.wait(timeout=10)
