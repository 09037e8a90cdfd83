"""Traffic for the demo: people come, talk for a while and leave, and most of them never come back."""

from __future__ import annotations

from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING

from hygiene.cli.logs import Message, Skipped

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Traffic"]

_MESSAGES_A_USER = 5.09
_PAUSE = 3_600.0
_START = 1_767_225_600.0  # 2026-01-01, a Thursday like any other
_DAY = 86_400.0
_NIGHT = 8 * 3_600.0
_TEXT = "the bot said my order is on its way but it never came so please look again and tell me what happened"


class Traffic:
    """
    The messages of a chat bot with more and more users, the same at each iteration.

    New users arrive from 8 in the morning to midnight, each day as many. How much each writes follows a power law, as
    it does in chats: most write a few messages, a few write hundreds. Nothing but the users still writing is held.

    Args:
        messages: How many messages there are.
        days: Over how many days, about.
        seed: Another number gives other users with the same habits.
    """

    def __init__(self, messages: int = 40_000, *, days: int = 7, seed: int = 20) -> None:
        self._messages = messages
        self._days = days
        self._seed = seed
        self.messages = 0
        # What a log that was read can tell, for those who take either.
        self.skipped = 0
        self.first_skipped: list[Skipped] = []
        self.out_of_order = 0
        self.has_time = True

    @property
    def lines(self) -> int:
        """As many as messages: nothing in made traffic is broken."""
        return self.messages

    @property
    def progress(self) -> float:
        """How much of the traffic has been made, from 0 to 1."""
        return self.messages / self._messages

    def __iter__(self) -> Iterator[Message]:
        random = Random(self._seed)  # noqa: S311  # traffic that is the same each time, not a secret
        # Long enough to cut any message out of it; about the size of a question and an answer of a language model.
        words = " ".join(random.choices(_TEXT.split(), k=4_000))
        arrivals = self._messages / _MESSAGES_A_USER / (self._days * (_DAY - _NIGHT))
        self.messages = 0
        users = 0
        due: list[tuple[float, int, int]] = []
        next_arrival = _START
        while self.messages < self._messages:
            if not due or next_arrival <= due[0][0]:
                users += 1
                heappush(due, (next_arrival, users, _messages_of(random)))
                next_arrival += random.expovariate(arrivals)
                if next_arrival % _DAY < _NIGHT:
                    next_arrival += _NIGHT
            when, user, left = heappop(due)
            if left > 1:
                heappush(due, (when + random.expovariate(1 / _PAUSE), user, left - 1))
            self.messages += 1
            begin = int(random.random() * 8_000)
            yield Message(f"user-{user}", when, words[begin : begin + 1_000 + int(random.random() * 3_000)])


def _messages_of(random: Random) -> int:
    # Pareto with the exponent 1.2: the mean of the whole numbers below the cap is about 6.
    return min(int(random.paretovariate(1.2) * 1.5), 300)
