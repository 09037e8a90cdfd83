"""Four threads for a while each, on one registry, with keys of each kind."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hygiene import Registry


@dataclass(frozen=True)
class Chat:
    """A key whose comparison is Python code."""

    user: int
    room: str


KINDS: list[Callable[[int], Any]] = [str, lambda n: (n, str(n)), lambda n: Chat(n, "room")]


def work(registry: Registry[Any, Any], kind: Callable[[int], Any], seed: int, errors: list[str]) -> None:
    """Some thousand operations."""
    draw = random.Random(seed)
    try:
        for _ in range(6_000):
            number = draw.randrange(60)
            key = kind(number)
            action = draw.random()
            if action < 0.4:
                registry[key] = number
            elif action < 0.9:
                if registry.get(key, number) != number:
                    errors.append(f"{key} had the value of another")
            elif action < 0.97:
                registry.pop(key, None)
            else:
                dict(registry)
    except Exception as error:  # noqa: BLE001 - whatever it is
        errors.append(repr(error))


sys.setswitchinterval(1e-5)
for options in ({}, {"ttl": 1000}, {"busy": lambda entry: False}, {"on_evict": lambda removal: None}):
    for kind in KINDS:
        registry: Registry[Any, Any] = Registry(maxsize=20, **options)  # type: ignore[arg-type]
        errors: list[str] = []
        threads = [threading.Thread(target=work, args=(registry, kind, seed, errors)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        registry[kind(0)] = 0
        assert not errors, errors[:3]
        assert len(registry) <= 20, len(registry)
        registry.trim(0)
        assert not registry, registry
