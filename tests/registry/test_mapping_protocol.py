"""A registry passes the tests that CPython has for its own dict."""

from __future__ import annotations

from typing import Any

import pytest

from hygiene.registry import Registry

mapping_tests = pytest.importorskip("test.mapping_tests", reason="this Python came without its own tests")


# Registries with times are of a class of their own; CPython's tests ask for exact classes.
WithTimes = type(Registry(ttl=1))


class PlainRegistry(Registry[Any, Any]):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, maxsize=10_000)


class UnboundedRegistry(Registry[Any, Any]):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries)


class TimedRegistry(WithTimes):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, ttl=3600, idle=3600)


class ToldRegistry(WithTimes):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, maxsize=10_000, on_evict=lambda removal: None)


class WeighedRegistry(Registry[Any, Any]):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, max_bytes="1GiB", getsizeof=lambda value: 1)


class BusyRegistry(Registry[Any, Any]):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, maxsize=10_000, busy=lambda entry: entry.key == "1")


class FrequencyRegistry(Registry[Any, Any]):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, maxsize=10_000, policy="lfu")


class RefusingRegistry(Registry[Any, Any]):
    def __init__(self, source: Any = (), /, **entries: Any) -> None:
        super().__init__(dict(source) | entries, maxsize=10_000, policy="none", overflow="raise")


class Basics(mapping_tests.BasicTestMappingProtocol):
    type2test = PlainRegistry


class Protocol(mapping_tests.TestMappingProtocol):
    type2test = PlainRegistry


class Plain(mapping_tests.TestHashMappingProtocol):
    type2test = PlainRegistry


class Unbounded(mapping_tests.TestHashMappingProtocol):
    type2test = UnboundedRegistry


class Weighed(mapping_tests.TestHashMappingProtocol):
    type2test = WeighedRegistry


class Busy(mapping_tests.TestHashMappingProtocol):
    type2test = BusyRegistry


class Frequency(mapping_tests.TestHashMappingProtocol):
    type2test = FrequencyRegistry


class Refusing(mapping_tests.TestHashMappingProtocol):
    type2test = RefusingRegistry


class Timed(mapping_tests.TestHashMappingProtocol):
    type2test = TimedRegistry


class Told(mapping_tests.TestHashMappingProtocol):
    type2test = ToldRegistry
