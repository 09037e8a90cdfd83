"""A bot that is killed in the middle of its work, and what its store has of it afterwards."""

# Theory of operation
#
# Acknowledged. The bot is a process of its own. After every few messages it calls flush() and then writes to a pipe how
# many there were: from then on they may not be lost, whatever happens to it. The pipe outlives the bot, so the last
# number in it is what was acknowledged, even if it was written in the same instant as the bot was killed.
#
# The moment is drawn anew each time, and the bot goes on at full speed until then: it may be in the middle of a
# message, of an eviction, or of a transaction.

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import msgspec

from hygiene.cli.ledger import SPACE, opened
from hygiene.cli.logs import InputError
from hygiene.cli.replay import Comparison, boot, bounded_bot
from hygiene.cli.traffic import Traffic
from hygiene.stores import open_store
from hygiene.writebehind import WriteBehind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Demonstration", "Killed", "kill", "main"]

_FLUSH_EVERY = 75
"""Messages between two acknowledgements: more than a write-behind saves at once, so that some are saved before."""
_HELD = 50
"""Conversations in memory: fewer than are being written, so that many leave, and many come back."""
_EARLIEST, _LATEST = 1_000, 4_000
"""Messages acknowledged when the bot is killed: enough to lose some, and over in a second."""
_LONGEST_DELAY = 0.01
"""Seconds: about as long as it takes to handle the messages between two acknowledgements."""


class Killed(msgspec.Struct, frozen=True, kw_only=True):
    """
    What was found of a bot that was killed.

    Args:
        acknowledged: Messages after which `flush` had returned.
        found: Of these, those in the store.
        unacknowledged: Messages in the store that were said later: saved, and not acknowledged yet.
        users: Conversations in the store.
        in_order: Whether each conversation begins as it was said, without a gap.
    """

    acknowledged: int
    found: int
    unacknowledged: int
    users: int
    in_order: bool

    @property
    def whole(self) -> bool:
        """Whether nothing that was acknowledged is lost."""
        return self.in_order and self.found == self.acknowledged

    @property
    def sentence(self) -> str:
        """What was found, for a person."""
        order = "in order" if self.in_order else "NOT IN ORDER"
        return (
            f"killed after {self.acknowledged:,} acknowledged messages; {self.found:,} found, {order}, "
            f"and {self.unacknowledged:,} more that were saved but not acknowledged."
        )


class Demonstration(Comparison, frozen=True, kw_only=True):
    """What the demo shows: the same messages through both bots, and a third bot that was killed."""

    killed: Killed


def kill(on_progress: Callable[[float], None] = lambda progress: None) -> Killed:
    """
    Let a bot work with a store in a temporary folder, kill it at a random moment, and look at the store.

    The process and the folder are gone when this call is over, however that happens.

    Args:
        on_progress: Called in this thread with the progress, from 0 to 1.

    Raises:
        InputError: there is no room for temporary files, or the bot ended by itself.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="hygiene-demo-")
    except OSError as problem:
        raise InputError(f"wanted a folder for temporary files, found: {problem}. Set TMPDIR") from problem
    with folder as name:
        address = f"sqlite:{Path(name, 'chats.db')}"
        acknowledged = _kill_at_random(address, on_progress)
        with opened(address) as store:
            return _compare(acknowledged, dict(store.items(SPACE)))


def _kill_at_random(address: str, on_progress: Callable[[float], None]) -> int:
    """Start a bot, kill it, and return how many messages it has acknowledged."""
    moment = random.randrange(_EARLIEST, _LATEST)  # noqa: S311  # no secret: any moment must do
    acknowledged = 0
    # A group of its own: an interrupt from the keyboard is for us, who then end the bot.
    with subprocess.Popen(
        boot("kill", address), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0
    ) as bot:
        try:
            numbers = cast("IO[bytes]", bot.stdout)
            for line in numbers:
                acknowledged = max(acknowledged, _number(line))
                on_progress(min(acknowledged / moment, 1.0))
                if acknowledged >= moment:
                    break
            time.sleep(random.random() * _LONGEST_DELAY)  # noqa: S311  # as above
        finally:
            bot.kill()
        # What it had still said when it was killed.
        acknowledged = max([acknowledged, *map(_number, numbers)])
    if acknowledged < moment:
        raise InputError(
            f"wanted to kill a bot after {moment:,} messages, found that it ended by itself after {acknowledged:,}, "
            f"with exit code {bot.returncode}. What it said is above"
        )
    return acknowledged


def _number(line: bytes) -> int:
    return int(line) if line.endswith(b"\n") else 0  # half a number is none


def _compare(acknowledged: int, stored: Mapping[str | int, list[str]]) -> Killed:
    said: dict[str | int, list[str]] = {}
    owed: dict[str | int, int] = {}
    # It may have handled as many more as it does between two acknowledgements.
    for number, (user, _, text) in enumerate(islice(_traffic(), acknowledged + _FLUSH_EVERY)):
        said.setdefault(user, []).append(text)
        owed[user] = owed.get(user, 0) + (number < acknowledged)
    found = sum(min(len(texts), owed.get(user, 0)) for user, texts in stored.items())
    return Killed(
        acknowledged=acknowledged,
        found=found,
        unacknowledged=sum(map(len, stored.values())) - found,
        users=len(stored),
        in_order=all(texts == said.get(user, [])[: len(texts)] for user, texts in stored.items()),
    )


def _traffic() -> Traffic:
    """More than is ever written before the end, with as many users an hour as the demo has."""
    return Traffic(1_000 * _LATEST, days=700)


def main(address: str) -> None:
    """Be the bot: write until killed, and say after each `flush` how many messages there were."""
    bot = bounded_bot(_HELD, store=WriteBehind(open_store(address), space=SPACE, sigterm="ignore"))
    for number, (user, _, text) in enumerate(_traffic(), 1):
        bot.on_message(user, text)
        if not number % _FLUSH_EVERY:
            bot.conversations.flush()  # type: ignore[attr-defined]  # the decorator has made a registry of the dict
            print(number, flush=True)
