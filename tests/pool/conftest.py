"""What the tests of pools share: interrupts at any bytecode, and resources that notice what is done to them."""

from __future__ import annotations

import dis
import functools
import gc
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest


@functools.cache
def _handled(code: CodeType) -> frozenset[int]:
    """The offsets at which the interpreter lets a signal handler run, and so one that raises: calls and loops."""
    offsets, after = set(), False
    for instruction in dis.get_instructions(code):
        if after:
            offsets.add(instruction.offset)
        after = instruction.opname == "RESUME" or instruction.opname.startswith("CALL")
        if instruction.opname == "JUMP_BACKWARD":
            offsets.add(instruction.argval)
    return frozenset(offsets)


def _interrupted(
    outer: Callable[[], object],
    at: int,
    interrupt: Callable[[], object],
    *,
    files: Collection[str],
    anywhere: bool = True,
    spared: Collection[str] = (),
) -> bool:
    """
    Call *outer*, and *interrupt* before the bytecode number *at* in one of the *files*; whether it came to that.

    As a signal handler does, or a finalizer. With *anywhere* off, only those bytecodes count before which a signal
    handler may run, and so raise. Functions whose names are *spared* do not count, nor what they call.
    """
    left = at

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        if not left or frame.f_code.co_filename not in files:
            return None
        caller: FrameType | None = frame
        while spared and caller is not None:
            if caller.f_code.co_name in spared:
                return None
            caller = caller.f_back
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return each

    def each(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "opcode" and left and (anywhere or frame.f_lasti in _handled(frame.f_code)):
            left -= 1
            if not left:
                sys.settrace(None)  # there is nothing to look at any more, and looking takes time
                interrupt()
        return each

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        outer()
    finally:
        sys.settrace(before)
    return not left


@pytest.fixture
def cheap_collections() -> Iterator[None]:
    """Collections that look only at what the test has made, and happen when the test says so."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def interrupted() -> Iterator[Callable[..., bool]]:
    """
    Call a function and have something else happen before one of its bytecodes.

    Nothing is collected by itself meanwhile: the finalizer of what another test left has bytecodes, too.
    """
    gc.disable()
    yield _interrupted
    gc.enable()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that are switched at nearly every opportunity, so that races come up in a short test."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Connection:
    """A resource that notices a second holder, a use after it was closed, and being closed twice."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False
        self.dead = False
        self.holder: object = None

    def take(self) -> None:
        """Somebody uses it now."""
        assert not self.closed, "it was handed out after it had been closed"
        assert self.holder is None, "it has two holders"
        self.holder = threading.get_ident()

    def leave(self) -> None:
        """Nobody uses it now."""
        assert self.holder is not None
        assert not self.closed, "it was closed while it was used"
        self.holder = None

    def close(self) -> None:
        assert not self.closed, "it was closed twice"
        self.closed = True

    def __repr__(self) -> str:
        return f"c{self.number}"


class Factory:
    """Opens connections, and keeps them to look at."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []

    def __call__(self) -> Connection:
        connection = Connection(len(self.opened))
        self.opened.append(connection)
        return connection

    @property
    def closed(self) -> list[int]:
        return [connection.number for connection in self.opened if connection.closed]


@pytest.fixture
def factory() -> Factory:
    return Factory()
