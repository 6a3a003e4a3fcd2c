"""Brings the rows of many callers together: one batch at a time runs, and whoever waits longest is in the next one.

No batch waits to be filled: what is there when the machine is free is taken. It holds the row that waits longest and the rows nearest to
it in length, as long as little is computed on padding. A row so waits for at most as many batches as there are rows before it, mostly
for one. Rows that would wait behind too many others are refused at once, so that memory stays bounded and a caller can turn elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from slimformer.data.batching import collate
from slimformer.measuring.sessions import Session
from slimformer.serving.answering import Answerer, TokenRow
from slimformer.tasks.base import Features

MOST_ROWS = 32  # in a batch
MOST_TOKENS = 8192  # in a batch, padding counted
MOST_WASTE = 2.0  # the longest row of a batch over its shortest: more would be computed on padding than on tokens
MOST_WAITING = 1024  # rows


@dataclass(frozen=True)
class Limits:
    """What one caller may ask for, and how much may wait.

    Attributes:
        items: Texts in a request.
        characters: Characters of a text.
        body: Bytes of a request.
        waiting: Rows that wait for the machine; a request beyond is answered with 429.
    """

    items: int = 1024
    characters: int = 100_000
    body: int = 16 << 20
    waiting: int = MOST_WAITING


class FullError(Exception):
    """So many rows wait that no more are taken."""


@dataclass(eq=False)
class _Waiting:
    row: TokenRow
    answer: asyncio.Future[np.ndarray]


def next_batch(lengths: Sequence[int], most_rows: int = MOST_ROWS, most_tokens: int = MOST_TOKENS) -> list[int]:
    """The places of the rows that run next, of rows that wait with these lengths, the one that waits longest first.

    >>> next_batch([10, 200, 11, 12, 9], most_rows=3)
    [0, 2, 4]
    """
    first = lengths[0]
    nearest = sorted(range(1, len(lengths)), key=lambda place: (abs(lengths[place] - first), place))
    chosen, shortest, longest = [0], max(1, first), max(1, first)
    for place in nearest:
        short, long = min(shortest, max(1, lengths[place])), max(longest, lengths[place])
        if len(chosen) >= most_rows or long > MOST_WASTE * short or long * (len(chosen) + 1) > most_tokens:
            break
        chosen.append(place)
        shortest, longest = short, long
    return sorted(chosen)


class Batcher:
    """Runs rows through a session, those of all callers together. It lives in one event loop; the session runs in a thread.

    Attributes:
        waiting: Rows that wait.
        seen: Called with the rows and the padded width of each batch, once it ran.
    """

    def __init__(
        self,
        session: Session,
        answerer: Answerer,
        *,
        most_waiting: int = MOST_WAITING,
        most_rows: int = MOST_ROWS,
        seen: Callable[[int, int], None] | None = None,
    ) -> None:
        self.session, self.answerer = session, answerer
        self.most_waiting, self.most_rows, self.seen = most_waiting, most_rows, seen
        self._rows: list[_Waiting] = []
        self._some = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "slimformer-serve")
        self._loop: asyncio.Task[None] | None = None
        self._ending = False

    @property
    def waiting(self) -> int:
        return len(self._rows)

    def start(self) -> None:
        """Begins to take rows; call it in the event loop."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends; rows that wait still, or are computed, are answered first."""
        self._ending = True
        self._some.set()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    async def answers(self, rows: Sequence[TokenRow]) -> list[np.ndarray]:
        """The output of each row. FullError if they would wait behind too many; what the runtime raises if it fails."""
        if self._rows and len(self._rows) + len(rows) > self.most_waiting:
            raise FullError(f"{len(self._rows):,} rows wait already.")
        loop = asyncio.get_running_loop()
        mine = [_Waiting(row, loop.create_future()) for row in rows]
        self._rows += mine
        self._some.set()
        try:
            return list(await asyncio.gather(*(item.answer for item in mine)))
        finally:  # whoever went away, or had a row that failed, waits for no others
            for item in mine:
                item.answer.cancel()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            self._rows = [item for item in self._rows if not item.answer.done()]
            if not self._rows:
                if self._ending:
                    return
                self._some.clear()
                continue
            places = next_batch([len(item.row) for item in self._rows], self.most_rows)
            batch = [self._rows[place] for place in places]
            taken = set(places)
            self._rows = [item for place, item in enumerate(self._rows) if place not in taken]
            try:
                outputs = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._computed, [item.row for item in batch]
                )
            except Exception as error:  # one batch failed; the server goes on
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            for item, output in zip(batch, outputs, strict=True):
                if not item.answer.done():
                    item.answer.set_result(output)

    def _computed(self, rows: Sequence[TokenRow]) -> list[np.ndarray]:
        columns = {"input_ids": [list(row.ids) for row in rows], "token_type_ids": [list(row.types) for row in rows]}
        features = Features(columns, range(len(rows)), 0, self.answerer.pad_id)
        feeds = collate(features, range(len(rows)))
        outputs = self.answerer.read(self.session(feeds))
        if self.seen is not None:
            self.seen(*feeds["input_ids"].shape)
        if self.answerer.per_token:
            return [output[: len(row)] for row, output in zip(rows, outputs, strict=True)]
        return list(outputs)
