"""The least that is built on a kernel: what it asks for, and nothing more."""

# ruff: noqa: C901, PLC0415 - the classes are made for one body or the other

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def load_body(name: str) -> ModuleType:
    """``hygiene.kernel.pure`` or ``hygiene.kernel.compiled``; ``ImportError`` if it was not built for this Python."""
    import hygiene.kernel as package

    chosen = package.compiled  # the import of a submodule sets an attribute of this very name
    try:
        return importlib.import_module(f"hygiene.kernel.{name}")
    finally:
        package.compiled = chosen


def bare_kernels(body: ModuleType) -> tuple[type[Any], type[Any]]:
    """A class without times and one with, on this body."""
    missing = body.MISSING

    class Bare(body.Kernel):
        """A bounded dict that evicts who is oldest."""

        def _lookup(self, key: Any) -> Any:
            value = self._find(key)
            if value is missing:
                raise KeyError(key)
            return value

        def _find(self, key: Any) -> Any:
            value = dict.get(self, key, missing)
            if value is not missing:
                try:
                    body.move(self, key)
                except KeyError:  # a comparison took it out, or it went past the registry
                    return value
                if self._clocked:
                    self._stamp_use(key)
            return value

        def _has_elsewhere(self, key: Any) -> bool:
            return False

        def _put(self, key: Any, value: Any) -> Any:
            held = dict.get(self, key)  # noqa: F841 - what is overwritten dies last
            body.store(self, key, value)
            try:
                body.move(self, key)
            except KeyError:
                return value
            if self._clocked:
                self._stamp_write(key)
            if len(self) > self._bound:
                self._sweep(key)
            return value

        def _comes_back(self, value: Any) -> bool:
            return False

        def _evict_into_tail(self) -> None:
            raise AssertionError("nothing comes back here")

        def _sweep(self, newest: Any = missing) -> None:
            while len(self) > self._bound:
                key = self._step_to_free(newest, len(self))
                if key is missing or key is body.CROWDED:
                    return
                self._extract(key)

        def _settle(self, key: Any) -> None:
            pass

        def _remove(self, key: Any) -> Any:
            found = self._extract(key)
            if found is None:
                raise KeyError(key)
            return found[0]

        __iter__ = dict.__iter__
        pop = _remove

        def items(self) -> list[Any]:
            return list(dict.items(self))

        def __repr__(self) -> str:
            return repr(self.items())

    class Timed(Bare):
        __getitem__ = body.read_timed
        get = body.get_timed
        __contains__ = body.contains_timed

    return Bare, Timed


def build(
    body: ModuleType,
    *,
    bound: int = 2**40,
    timer: Any = None,
    written: bool = False,
    used: bool = False,
    uses_in_order: bool = False,
    kind: type[Any] | None = None,
) -> Any:
    """A bare kernel whose short ways are open as far as they can be."""
    bare, timed = bare_kernels(body) if kind is None else (kind, kind)
    kernel = (bare if timer is None else timed)()
    kernel._open(bound, timer, written=written, used=used)
    kernel._due = 1e300
    kernel._watched = True
    kernel._held = {}
    kernel._take_paths(
        reads=not uses_in_order or body.PARKS, misses=False, writes=True, moves=True, uses_in_order=uses_in_order
    )
    return kernel
