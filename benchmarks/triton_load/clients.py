"""Clients of a Triton server that ask for all kinds of answers, and what became of each request.

A request must end in one of three ways: with its answer, with an error that says why, or with a connection that closes
because its server died. Everything else is a fault.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

KINDS = {"whole": 4, "stream": 4, "leaves": 2}
"""Weights: the whole answer at once, piece by piece, and a client that goes away after a few pieces."""
OUTPUT_TOKENS = (20, 100, 400, 1500)
REQUEST_TIMEOUT_S = 600  # with hundreds of clients a long answer waits for minutes
_LEAVES_AFTER = 10
_BACK_OFF_S = (0.5, 4.0)
_LAG_S = 0.1  # how often the clients' loop is asked whether it is late


@dataclass(frozen=True)
class Closing:
    """A connection that closed without an answer.

    Attributes:
      began: when the request was sent, seconds of ``time.monotonic``.
      noted: when its client saw the end, the same clock.
      how: the client's error, or after how much of an answer.
    """

    began: float
    noted: float
    how: str


@dataclass
class Ends:
    """How requests ended.

    Attributes:
      counts: by end: ``answered``, ``client left``, ``told why``, ``closed``, ``unclear``, ``no end``.
      reasons: error texts, and what was asked where nothing came.
      closed: connections that closed.
    """

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    closed: list[Closing] = field(default_factory=list)

    def add(self, end: str, reason: str, began: float) -> None:
        """A request that began then has ended now; ``reason``: of a closed connection, how it closed."""
        self.counts[end] += 1
        if end == "closed":
            self.closed.append(Closing(began, time.monotonic(), reason))
        elif reason:
            self.reasons[reason] += 1

    def closed_outside(self, windows: list[tuple[float, float]]) -> list[Closing]:
        """Connections that closed although no server died or was away during their request.

        The request's whole life counts and not the time when its client saw the end: on a busy machine a client sees it
        seconds later.

        Args:
          windows: from each kill until the next server was ready.
        """
        return [c for c in self.closed if not any(c.began <= end and begin <= c.noted for begin, end in windows)]


async def ask(session: aiohttp.ClientSession, url: str, kind: str, inputs: dict[str, Any]) -> tuple[str, str]:
    """One request to ``ensemble``. Returns its end and, if it was told one, the reason; or how it closed."""
    endpoint = "generate" if kind == "whole" else "generate_stream"
    body = inputs if kind == "whole" else {**inputs, "stream": True}
    try:
        async with session.post(f"{url}/v2/models/ensemble/{endpoint}", json=body) as response:
            last, pieces = b"", 0
            async for line in response.content:
                last, pieces = line.strip() or last, pieces + bool(line.strip())
                if kind == "leaves" and pieces > _LEAVES_AFTER:
                    return "client left", ""
            return _end_of(last)
    except asyncio.TimeoutError:
        return "no end", f"no end within {REQUEST_TIMEOUT_S} s: {kind}, {inputs['max_tokens']} tokens"
    except (aiohttp.ClientError, ConnectionError) as error:
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        return "closed", type(cause).__name__


def _end_of(last: bytes) -> tuple[str, str]:
    """What the last line of an answer says."""
    if not last:
        return "closed", "an empty answer"
    try:
        message = json.loads(last.removeprefix(b"data:"))
    except ValueError:
        return "closed", "in the middle of a line"
    if "error" in message:
        return "told why", str(message["error"])
    finish = message.get("finish_reason")
    if finish in ("length", "stop"):
        return "answered", ""
    return ("closed", "in the middle of a stream") if finish == "" else ("unclear", str(message)[:200])


class Clients:
    """Many clients, each with one request at a time.

    Args:
      url: of the server.
      prompts: texts to choose from.
      count: clients.

    Attributes:
      ends: how requests ended.
      max_lag_s: how late the clients' loop was at most: a client sees nothing in that time.
    """

    def __init__(self, url: str, prompts: list[str], count: int) -> None:
        self.ends, self.max_lag_s = Ends(), 0.0
        self._url, self._prompts, self._count = url, prompts, count

    async def run(self, until: float) -> None:
        """Asks until ``time.monotonic`` says ``until``, then waits for the answers."""
        limits = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=limits, timeout=timeout, read_bufsize=2**20) as session:
            lag = asyncio.create_task(self._watch_lag())
            await asyncio.gather(*(self._client(session, random.Random(seed), until) for seed in range(self._count)))
            lag.cancel()

    async def _watch_lag(self) -> None:
        while True:
            expected = time.monotonic() + _LAG_S
            await asyncio.sleep(_LAG_S)
            self.max_lag_s = max(self.max_lag_s, time.monotonic() - expected)

    async def _client(self, session: aiohttp.ClientSession, rng: random.Random, until: float) -> None:
        wait_s = _BACK_OFF_S[0]
        while time.monotonic() < until:
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            inputs = {"text_input": rng.choice(self._prompts), "max_tokens": rng.choice(OUTPUT_TOKENS)}
            began = time.monotonic()
            end, reason = await ask(session, self._url, kind, inputs)
            self.ends.add(end, reason, began)
            if end in ("answered", "client left"):
                wait_s = _BACK_OFF_S[0]
                continue
            # The server is away: clients that ask again at once would only keep it from coming back.
            await asyncio.sleep(min(wait_s * rng.uniform(0.5, 1.5), max(0.0, until - time.monotonic())))
            wait_s = min(2 * wait_s, _BACK_OFF_S[1])
