"""Bytes that one simulated hour of 1,000 conversations writes to a SQLite store, by the interval between two saves.

Run it with ``python -m benchmarks.intervals``. Each conversation receives one message of 205 bytes (encoded) a minute,
at its own second of the minute. The clock is a `hygiene.testing.ManualClock`, so the hour takes a few seconds; a save
happens exactly where the writer thread would save, because the loop below calls it there. Bytes are those that the
process has passed to the operating system (``wchar`` in Linux' ``/proc/self/io``): log, pages and checkpoints, each as
often as it was written, until the store is closed.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from benchmarks.stores import LONG, conversation, payload, written
from hygiene import Registry, WriteBehind
from hygiene.stores import open_store
from hygiene.testing import ManualClock

CONVERSATIONS = 1_000
MINUTES = 60
NEVER = 10_000  # changes: more than five minutes bring, so that only the clock asks for a save


def hour(folder: Path, every: int, interval: float, minutes: int = MINUTES) -> tuple[int, int, int]:
    """Return the bytes written, the bytes of the messages, and the number of saves."""
    draw = random.Random(1)
    times = sorted(
        (60.0 * minute + second, number)
        for number, second in enumerate(draw.uniform(0, 60) for _ in range(CONVERSATIONS))
        for minute in range(minutes)
    )
    messages = conversation(len(times), LONG)
    clock = ManualClock()
    start = clock()
    before = written()
    with open_store(f"sqlite:{folder / 'chats.db'}") as store:
        writer = WriteBehind(store, every=every, interval=interval, max_pending=100_000, timer=clock)
        chats: Registry[str, list[object]] = Registry(maxsize=CONVERSATIONS, store=writer, name="chats")
        oldest: float | None = None
        unsaved = 0
        for (at, number), message in zip(times, messages, strict=True):
            if oldest is not None and oldest + interval <= at:
                clock.advance(start + oldest + interval - clock())
                writer.save_due()
                oldest, unsaved = None, 0
            clock.advance(start + at - clock())
            chats.setdefault(f"user-{number}", []).append(message)
            oldest = at if oldest is None else oldest
            unsaved += 1
            if unsaved >= every:
                writer.flush()
                oldest, unsaved = None, 0
        chats.close()
        saves = writer.stats().saves
        writer.close()
    return written() - before, payload(messages), saves


def main() -> None:
    """Print one line for each combination."""
    for every in (50, NEVER):
        for interval in (5.0, 300.0):
            with tempfile.TemporaryDirectory(prefix="hygiene-intervals-") as folder:
                bytes_, size, saves = hour(Path(folder), every, interval)
            print(
                f"every={every:<6} interval={interval:>5.0f} s: {bytes_ / 1e6:7.1f} MB, "
                f"{bytes_ / size:5.1f} times the messages ({size / 1e6:.1f} MB), {saves:,} saves"
            )


if __name__ == "__main__":
    main()
