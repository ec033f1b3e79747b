"""Rewards from a server that is asked over HTTP: a reward model on machines of its own, or a judge."""

import asyncio
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tieback.cli.errors import UsageError

SCHEMES = ("http://", "https://")
# In the environment, as a recipe is written into the run's folder.
TOKEN = "TIEBACK_REWARD_TOKEN"
_CONNECT_SECONDS = 10.0
_REQUESTS_AT_A_TIME = 8
# Waits of 0, 2, 4, … 64 and 120 seconds: four minutes for a server to come back.
_RETRIES = Retry(
    total=8,
    backoff_factor=1,
    backoff_max=120,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
_CACHED = 100_000


class RemoteScorer:
    """An asynchronous reward function behind a URL.

    It posts JSON, `{"prompts": […], "completions": […], "completion_ids": […]}` and the columns of the data beside them, a list
    item for each completion, and expects `{"rewards": […]}`, each what a reward function may return. Where the server does not
    answer, or answers with 429 or 5xx, it is asked again for about four minutes. What it has judged once it is not asked again.
    The environment variable TIEBACK_REWARD_TOKEN, where set, is sent as a bearer token.

    Args:
        url: of the server.
        batch_size: completions in a request; several requests run together.
        timeout: seconds that a request may take.

    Raises:
        UsageError: the URL names no server, or has a password in it, which logs and recipes would show.
    """

    def __init__(self, url: str, batch_size: int = 64, timeout: float = 120.0) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise UsageError(f"{url!r} names no reward server: write http://host:port/path.")
        if "@" in parts.netloc:
            raise UsageError(
                f"The URL of the reward server at {parts.hostname} has a name or password in it: leave it out, and give the server "
                f"a token by the environment variable {TOKEN}."
            )
        self.url = url
        self.batch_size = batch_size
        self.timeout = timeout
        self.__name__ = re.sub(r"\W+", "_", f"{parts.netloc}{parts.path}").strip("_")
        self._judged: OrderedDict[bytes, Any] = OrderedDict()
        self._session = requests.Session()
        for scheme in SCHEMES:
            self._session.mount(scheme, HTTPAdapter(max_retries=_RETRIES, pool_maxsize=_REQUESTS_AT_A_TIME))

    async def __call__(self, **columns: Sequence[Any]) -> list[Any]:
        """Rewards of B completions, from B values of each column.

        Raises:
            ConnectionError: the server does not answer, or does so with an error.
            ValueError: its answer has no rewards, or another number of them.
        """
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        keys = [hashlib.sha256(_json(row)).digest() for row in rows]
        missing = list(
            {key: row for key, row in zip(keys, rows, strict=True) if key not in self._judged}.items()
        )
        batches = [
            missing[first : first + self.batch_size] for first in range(0, len(missing), self.batch_size)
        ]
        gate = asyncio.Semaphore(_REQUESTS_AT_A_TIME)

        async def judge(batch: list[tuple[bytes, dict[str, Any]]]) -> None:
            async with gate:
                rewards = await asyncio.to_thread(self._post, [row for _, row in batch])
            self._judged.update(zip((key for key, _ in batch), rewards, strict=True))

        await asyncio.gather(*map(judge, batches))
        found = [self._judged[key] for key in keys]
        while len(self._judged) > _CACHED:
            self._judged.popitem(last=False)
        return found

    def _post(self, rows: list[dict[str, Any]]) -> list[Any]:
        token = os.environ.get(TOKEN)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {token}"} if token else {}
        )
        try:
            response = self._session.post(
                self.url,
                data=_json({name: [row[name] for row in rows] for name in rows[0]}),
                headers=headers,
                timeout=(_CONNECT_SECONDS, self.timeout),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise ConnectionError(f"{self.url} does not answer ({type(error).__name__}: {error})") from error
        if response.status_code != requests.codes.ok:
            raise ConnectionError(
                f"{self.url} answered with status {response.status_code}: {response.text[:300]}"
            )
        try:
            rewards = response.json()["rewards"]
        except (requests.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{self.url} must answer with {{"rewards": […]}}, not {response.text[:300]!r}'
            ) from error
        if not isinstance(rewards, list) or len(rewards) != len(rows):
            raise ValueError(f"{self.url} must answer with {len(rows)} rewards, not {str(rewards)[:300]}")
        return rewards


def _json(value: Any) -> bytes:
    """As JSON; what has no form of its own there, such as a date, as its text."""
    return json.dumps(value, default=str).encode()
