"""Real signals: a timer whose handler raises, over thousands of operations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import itertools, logging, random, signal, threading
from hygiene import History, Registry

logging.disable(logging.CRITICAL)
draw = random.Random(7)


class Timeout(BaseException):
    pass


def expired(*_):
    raise Timeout


signal.signal(signal.SIGALRM, expired)
told, closed = {}, {}
kinds = [
    Registry(maxsize=20),
    Registry(maxsize=20, policy="lfu"),
    Registry(maxsize=20, policy="importance", importance=lambda entry: 1.0),
    Registry(maxsize=20, busy=lambda entry: False, on_evict=lambda removal: told.update({removal.value[0]: 1})),
    Registry(max_bytes=2000, getsizeof=lambda value: 100, idle=60),
]
history = History(maxlen=20, on_trim=lambda items: None)
kinds[-1][0] = [0]  # which starts the janitor
serial = itertools.count()


def work():
    while True:
        registry, key = draw.choice(kinds), draw.randrange(60)
        match draw.randrange(6):
            case 0 | 1:
                registry[key] = [next(serial)]
            case 2:
                registry.get(key)
            case 3:
                registry.pop(key, None)
            case 4:
                with registry.lease(key, create=lambda: [next(serial)]):
                    registry[draw.randrange(60)] = [next(serial)]
            case 5:
                history.append(key)


rounds = 0
for _ in range(400):
    try:
        try:  # again and again, since an exception in a finalizer is lost
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, 0.002), 0.05)
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Timeout:
        rounds += 1


def check():
    for registry in kinds:
        for number in range(100):
            registry[number % 60] = [number]
            with registry.lease(number % 60):
                pass
        assert len(registry) == 20, (registry._limits.policy, len(registry))
        assert registry.stats().leased == 0
    history.extend(range(40))
    assert len(history) == 20
    print(rounds)


other = threading.Thread(target=check, daemon=True)
other.start()
other.join(30)
assert not other.is_alive(), "another thread hangs"
"""


@pytest.mark.slow
@pytest.mark.parametrize("pure", ["0", "1"])
def test_registries_survive_a_timer_that_raises(pure):
    """A job's timeout that raises at any moment leaves bounds, leases and locks as they should be."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "HYGIENE_PURE": pure},
    )

    assert ("400\n", "") == (done.stdout, done.stderr)
