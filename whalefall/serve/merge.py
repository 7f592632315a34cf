"""Several requests of the engine, read as one stream."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from whalefall.engine.request import Delta, Request
from whalefall.errors import UserError


class Streams(Protocol):
    """What the server needs of an engine; ``AsyncEngine`` is one."""

    def stream(self, request: Request) -> AsyncIterator[Delta]: ...


class EngineFailedError(Exception):
    """Its cause says how."""


class Event(NamedTuple):
    request: int
    """Its index."""
    delta: Delta


class MergedStream:
    """The deltas of ``requests``, as they come.

    Deltas that are not read at once become one, so a server that falls behind catches up with
    fewer and larger pieces. Closing aborts the requests that are not finished.
    """

    def __init__(self, engine: Streams, requests: Sequence[Request], silence: float) -> None:
        self._engine = engine
        self._silence = silence
        self._unread: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._pumps = [
            asyncio.create_task(self._pump(index, request))
            for index, request in enumerate(requests)
        ]
        for pump in self._pumps:
            pump.add_done_callback(lambda _: self._news.set())

    async def events(self) -> AsyncIterator[Event | None]:
        """Until all requests are finished; None after each ``silence`` seconds without a delta.

        Raises:
            UserError: the engine cannot take one of the requests.
            EngineFailedError: it takes no more requests at all.
        """
        is_over = False
        while not is_over:
            try:
                async with asyncio.timeout(self._silence):
                    await self._news.wait()
            except TimeoutError:
                yield None
                continue
            self._news.clear()
            is_over = self._error is not None or all(pump.done() for pump in self._pumps)
            unread, self._unread = self._unread, {}
            for index, delta in unread.items():
                yield Event(index, delta)
        if self._error is not None:
            raise self._error

    def finish(self, index: int) -> None:
        """Have no more of one request; it is aborted where it still runs."""
        self._pumps[index].cancel()

    async def aclose(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, index: int, request: Request) -> None:
        """A task of its own: a timeout while waiting must not reach into the engine's iterator."""
        try:
            async for delta in self._engine.stream(request):
                earlier = self._unread.get(index)
                self._unread[index] = _joined(earlier, delta) if earlier else delta
                self._news.set()
        except UserError as error:
            self._error = error
        except Exception as error:
            self._error = EngineFailedError()
            self._error.__cause__ = error


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.request,
        first.text + second.text,
        first.tokens + second.tokens,
        first.logprobs + second.logprobs,
        second.finish_reason,
        second.end,
    )
