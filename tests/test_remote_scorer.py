"""Reward servers: what they are sent, what of their answers is taken, and that one that is away for a while loses nothing."""

import datetime
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from urllib3.util import Retry

from tieback.cli.errors import UsageError
from tieback.pipeline import remote_scorer
from tieback.pipeline.async_calls import run_together
from tieback.pipeline.remote_scorer import RemoteScorer
from tieback.pipeline.scorers import RewardError, load_scorer, reward_name
from tieback.pipeline.trainer import PPOTrainer

Answer = tuple[int, Any]


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by `answer`, and keeps what it was sent."""

    def __init__(self, answer: Callable[[dict[str, list[Any]], int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.bodies: list[dict[str, list[Any]]] = []
        self.headers: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(self.headers)
        status, content = self.server.answer(body, len(self.server.bodies))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


def lengths(body: dict[str, list[Any]], _: int) -> Answer:
    return 200, {"rewards": [len(text) for text in body["completions"]]}


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[dict[str, list[Any]], int], Answer] = lengths) -> Server:
        server = Server(answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries without the waits."""
    monkeypatch.setattr(remote_scorer, "_RETRIES", remote_scorer._RETRIES.new(backoff_factor=0))
    monkeypatch.delenv(remote_scorer.TOKEN, raising=False)


def ask(scorer: RemoteScorer, count: int = 5, **columns: list[Any]) -> list[Any]:
    texts = [f"text {'x' * row}" for row in range(count)]
    given = {
        "prompts": ["p"] * count,
        "completions": texts,
        "completion_ids": [[row] for row in range(count)],
    }
    (rewards,) = run_together([scorer(**given, **columns)])
    return rewards


def test_every_completion_is_sent_once_with_its_columns_in_requests_of_the_batch_size(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setenv(remote_scorer.TOKEN, "secret")
    day = datetime.date(2026, 1, 2)
    rewards = ask(RemoteScorer(server.url, batch_size=2), target=[1, None, "c", [4], day])
    assert rewards == [5, 6, 7, 8, 9]
    assert sorted(len(body["prompts"]) for body in server.bodies) == [1, 2, 2]
    assert {header["Authorization"] for header in server.headers} == {"Bearer secret"}
    sent = sorted(
        (text, ids, target)
        for body in server.bodies
        for text, ids, target in zip(
            body["completions"], body["completion_ids"], map(str, body["target"]), strict=True
        )
    )
    assert sent == [
        ("text ", [0], "1"),
        ("text x", [1], "None"),
        ("text xx", [2], "c"),
        ("text xxx", [3], "[4]"),
        ("text xxxx", [4], "2026-01-02"),
    ]


def test_what_was_judged_once_is_not_asked_again(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_scorer, "_CACHED", 4)
    server = serve()
    scorer = RemoteScorer(server.url)
    assert ask(scorer, 3) == ask(scorer, 3) == [5, 6, 7]
    assert len(server.bodies) == 1
    assert ask(scorer, 5) == [5, 6, 7, 8, 9]
    assert server.bodies[1]["completion_ids"] == [[3], [4]]
    ask(scorer, 1)  # the oldest of more than four is forgotten
    assert server.bodies[2]["completion_ids"] == [[0]]
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_away_for_a_while_is_asked_again(serve: Callable[..., Server], status: int) -> None:
    server = serve(lambda body, request: lengths(body, request) if request > 3 else (status, "busy"))
    assert ask(RemoteScorer(server.url)) == [5, 6, 7, 8, 9]
    assert len(server.bodies) == 4


def test_a_server_that_answers_too_late_is_asked_again(serve: Callable[..., Server]) -> None:
    late = threading.Event()

    def answer(body: dict[str, list[Any]], request: int) -> Answer:
        if request == 1:
            late.wait(20)
        return lengths(body, request)

    server = serve(answer)
    assert ask(RemoteScorer(server.url, timeout=0.5)) == [5, 6, 7, 8, 9]
    late.set()
    assert len(server.bodies) == 2


FAULTS: dict[str, tuple[Answer, str]] = {
    "refused": ((403, "no such token"), 'answered with status 403: "no such token"'),
    "away for good": ((503, "down"), 'answered with status 503: "down"'),
    "moved": ((302, ""), "answered with status 302"),
    "no JSON": ((200, b"<html>"), r"must answer with \{\"rewards\": \[…\]\}, not '<html>'"),
    "no rewards": ((200, {"scores": [1]}), r"must answer with \{\"rewards\": \[…\]\}, not"),
    "no mapping": ((200, [1.0]), r"must answer with \{\"rewards\": \[…\]\}, not"),
    "too few": ((200, {"rewards": [1.0]}), r"must answer with 8 rewards, not \[1.0\]"),
    "a text": ((200, {"rewards": ["good"] * 8}), r"returned 'good' for row 0 of the batch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_cannot_be_used_is_told_with_the_servers_own_words(
    serve: Callable[..., Server], tmp_path: Path, fault: str
) -> None:
    answer, message = FAULTS[fault]
    server = serve(lambda *_: answer)
    trainer = toy.ppo_trainer(tmp_path, server.url, per_device_eval_batch_size=8)
    with pytest.raises(RewardError, match=rf"(?s)127_0_0_1_{server.server_port}_score.*{message}"):
        trainer.train()


def test_a_server_that_is_not_there_is_named() -> None:
    scorer = RemoteScorer("http://127.0.0.1:9/score")
    with pytest.raises(ConnectionError, match=r"^http://127.0.0.1:9/score does not answer \("):
        ask(scorer)


def test_the_wait_for_a_server_is_about_four_minutes() -> None:
    retries, waits = Retry(total=8, backoff_factor=1, backoff_max=120), []
    for _ in range(8):
        retries = retries.increment("POST", "/", error=ConnectionError())
        waits.append(retries.get_backoff_time())
    assert 200 < sum(waits) < 300


def weights_after(folder: Path, reward: Any, **settings: Any) -> tuple[PPOTrainer, dict[str, Any]]:
    trainer = toy.ppo_trainer(folder, reward, max_steps=3, **settings)
    trainer.train()
    return trainer, toy.weights(trainer.model)


def by_token(body: dict[str, list[Any]], _: int) -> Answer:
    return 200, {"rewards": [[float(i % 5) for i in ids] for ids in body["completion_ids"]]}


@pytest.mark.slow
def test_ppo_learns_from_a_server_what_it_would_from_a_function_also_by_token(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(by_token)

    def same(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[float(i % 5) for i in ids] for ids in completion_ids]

    trainer, remote = weights_after(tmp_path / "remote", server.url, per_device_eval_batch_size=3)
    _, local = weights_after(tmp_path / "local", same, per_device_eval_batch_size=3)
    for name, weight in local.items():
        assert (weight == remote[name]).all(), name
    assert trainer.reward_names == [f"127_0_0_1_{server.server_port}_score"]
    assert {len(body["target"]) for body in server.bodies} <= {1, 2, 3}


@pytest.mark.slow
def test_a_run_that_a_server_ended_goes_on_with_the_completions_that_it_would_have_judged(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    _, whole = weights_after(tmp_path / "whole", serve(by_token).url)
    down = serve(lambda body, request: by_token(body, request) if request <= 2 else (403, "over quota"))
    trainer = toy.ppo_trainer(tmp_path / "parts", down.url, max_steps=3)
    with pytest.raises(UsageError, match="over quota"):
        trainer.train()
    again = toy.ppo_trainer(tmp_path / "parts", serve(by_token).url, max_steps=3)
    again.train(resume_from_checkpoint=True)
    for name, weight in toy.weights(again.model).items():
        assert (weight == whole[name]).all(), name


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "'http://' names no reward server: write http://host:port/path"),
        ("https://me:hunter2@example.org/score", r"^The URL of the reward server at example\.org has .* TIEBACK_REWARD_TOKEN"),
    ],
)  # fmt: skip
def test_a_url_without_a_server_or_with_a_password_is_refused_and_the_password_not_repeated(
    url: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        load_scorer(url, 16)
    assert "hunter2" not in str(refused.value)


def test_a_url_is_a_name_of_a_scorer() -> None:
    scorer = load_scorer("https://example.org/v1/reward-model", 16)
    assert isinstance(scorer, RemoteScorer)
    assert scorer.batch_size == 16
    assert reward_name(scorer) == "example_org_v1_reward_model"
