"""
Leases that hold for a whole cluster: while this process has a key, no other process is meant to change it.

Theory of operation
===================

**One tenure for a process.** Whoever leases a key here first takes the server's lease; those who come meanwhile share
it, as leases of one registry overlap; the last to go saves the entry and gives it back. Between tasks of one process
nothing is excluded: that is what a lock is for.

**A token** comes with the lease, and each save of the entry has to show it. A process that was stopped for longer than
its lease lasts finds its save refused (`OwnershipLost`), whatever it believes.

**Threads.** A task waits for the server in threads that are kept for this, and not in those of its event loop: all of
these may be waiting for this very lease to be given back.

**Renewal** is the janitor's charge, three times as often as needed, in a thread aside, because the server may hang. Who
misses it has lost the lease, and is told when it saves.

**Fresh.** The entry was perhaps in memory before the lease was taken. Then its version is compared with the server's,
and what is older leaves memory.
"""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hygiene.closing import Shield, note, running_loop
from hygiene.errors import OwnershipLost, StoreError, VersionConflict
from hygiene.janitor import aside, janitor, survive_fork
from hygiene.logs import logger

if TYPE_CHECKING:
    from hygiene.keeping import Keeper

__all__ = ["Tenure", "Tenures"]


T = TypeVar("T")

_TTL: Final = 30.0  # seconds: longer than a pause of a virtual machine, shorter than patience
_FIRST_WAIT: Final = 0.01  # seconds between two attempts at a lease that somebody has, growing ...
_LAST_WAIT: Final = 0.5  # ... up to this
_GRACE: Final = 10.0  # seconds that a cancelled task has to save and to give back
_THREADS: Final = 32  # that wait for a server at once; each for some milliseconds, while it is well


class Tenure:
    """One key that this process has, or is about to have."""

    __slots__ = ("ended", "ending", "fresh", "ready", "token", "users")

    def __init__(self) -> None:
        self.users = 1
        self.token: int | None = None
        self.ending = False
        self.fresh = False  # what is known of it is from the server, and from after it was had
        self.ready = _promise()  # that it is had, or that it could not be
        self.ended = _promise()  # that it was given back


def _promise() -> futures.Future[None]:
    promise: futures.Future[None] = futures.Future()
    promise.set_running_or_notify_cancel()  # so that a task which is cancelled cannot cancel it
    return promise


class Tenures:
    """
    The keys of one registry that this process has leased from all others.

    Args:
        keeper: Of the registry, with a store that has leases.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._store: Any = keeper.store
        self._space = keeper.space
        self._begin_anew()
        survive_fork(self)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Any, Tenure] = {}
        self._watched = False

    def _after_fork(self) -> None:
        for key in self._held:
            # The leases are the parent's. No lock: whoever held the writer's was left behind.
            self._keeper.writer._fences.pop(key, None)
        self._begin_anew()

    def has(self, key: Any) -> bool:
        """Whether this process has *key*, and knows what the server has."""
        tenure = self._held.get(key)
        return tenure is not None and tenure.fresh

    # Coming in

    def enter(self, key: Any) -> Tenure:
        """Take *key*, waiting for whoever has it, and bring the entry up to date; returns what `leave` takes."""
        if running_loop() is not None:
            raise StoreError(
                f"to lease {key!r} from other processes would block the event loop: use `async with` for the lease"
            )
        while True:
            tenure, mine = self._board(key)
            if not mine:
                futures.wait([tenure.ended if tenure.ending else tenure.ready])
                if tenure.token is not None and not tenure.ending and self._join(key, tenure):
                    return tenure
                continue
            try:
                pause = _FIRST_WAIT
                while (token := self._take(key)) is None:
                    time.sleep(_jittered(pause))
                    pause = min(2 * pause, _LAST_WAIT)
                self._begin(key, tenure, token)
                self._refresh(key, tenure)
            except BaseException:
                self._abort(key, tenure)
                self._return(key, tenure)
                raise
            self._start(tenure)
            return tenure

    async def aenter(self, key: Any) -> Tenure:
        """As `enter`; the loop goes on meanwhile."""
        while True:
            tenure, mine = self._board(key)
            if not mine:
                await asyncio.wait([asyncio.wrap_future(tenure.ended if tenure.ending else tenure.ready)])
                if tenure.token is not None and not tenure.ending and self._join(key, tenure):
                    return tenure
                continue
            try:
                pause = _FIRST_WAIT
                # What is cancelled here may still be granted there.
                while (token := await _off_loop(lambda: self._take(key), lambda token: self._undo(key, token))) is None:
                    await asyncio.sleep(_jittered(pause))
                    pause = min(2 * pause, _LAST_WAIT)
                self._begin(key, tenure, token)
                await _off_loop(functools.partial(self._refresh, key, tenure))
            except BaseException:
                self._abort(key, tenure)
                if tenure.token is not None:
                    aside(functools.partial(self._return, key, tenure), "lease-return")
                else:
                    self._return(key, tenure)
                raise
            self._start(tenure)
            return tenure

    def _board(self, key: Any) -> tuple[Tenure, bool]:
        with self._lock:
            tenure = self._held.get(key)
            if tenure is not None:
                return tenure, False
            tenure = self._held[key] = Tenure()
            return tenure, True

    def _join(self, key: Any, tenure: Tenure) -> bool:
        with self._lock:
            if self._held.get(key) is not tenure or tenure.ending:
                return False
            tenure.users += 1
            return True

    def _take(self, key: Any) -> int | None:
        self._keeper._check_open()  # it may have been closed while somebody waited
        token: int | None = self._store.lease(self._space, key, ttl=_TTL)
        return token

    def _undo(self, key: Any, token: int | None) -> None:
        if token is not None:
            aside(lambda: self._give_back(key, token), "lease-return")

    def _begin(self, key: Any, tenure: Tenure, token: int) -> None:
        self._keeper.writer.fence(key, token)
        tenure.token = token
        with self._lock:
            watched, self._watched = self._watched, True
        if not watched:
            janitor.watch(self, _TTL / 3)

    def _start(self, tenure: Tenure) -> None:
        tenure.ready.set_result(None)

    def _abort(self, key: Any, tenure: Tenure) -> None:
        """Nobody has it after all; who waits tries for himself."""
        with self._lock:
            tenure.ending = True
            tenure.fresh = False
        self._keeper.writer.fence(key, None)
        tenure.ready.set_result(None)

    def _refresh(self, key: Any, tenure: Tenure) -> None:
        """Let go of what is in memory if it is older than what the server has, and load."""
        keeper = self._keeper
        if key in keeper.writer:
            try:
                keeper.writer.save(key)  # changed before the lease: it is saved under it, or is a conflict
            except (VersionConflict, OwnershipLost) as failed:
                keeper.lost(key, failed)  # said once: who tries again gets what is stored
                raise
        keeper.refresh([key])
        with self._lock:
            tenure.fresh = not tenure.ending  # it may have been cancelled meanwhile
        keeper.fetch_if_missing(key)

    # Going

    def leave(self, key: Any, tenure: Tenure, error: BaseException | None) -> None:
        """Save *key*, and give it back if nobody else here has it. *error* is what ended the lease, if any."""
        if self._is_last(key, tenure):
            self._end(key, tenure, error)

    def _end(self, key: Any, tenure: Tenure, error: BaseException | None) -> None:
        try:
            self._keeper.writer.save(key)
        except StoreError as failed:
            self._failed(key, failed, error)
        finally:
            self._return(key, tenure)

    async def aleave(self, key: Any, tenure: Tenure, error: BaseException | None) -> None:
        """As `leave`; the loop goes on meanwhile, and a cancellation waits until it is done."""
        if not self._is_last(key, tenure):
            return
        shield = Shield(_GRACE)
        if isinstance(error, GeneratorExit):
            # Perhaps the task was dropped with its loop, and then nothing can be awaited: so it is begun before.
            ending = _in_thread(lambda: self._end(key, tenure, error))
            if running_loop() is not None:
                await shield.run(asyncio.wrap_future(ending), f"giving {key!r} back", leave=True)
                shield.deliver()
            return
        try:
            await shield.run(self._keeper.writer.asave(key), f"saving {key!r}")
        except (StoreError, TimeoutError) as failed:
            self._failed(key, failed, error)
        finally:
            try:
                await shield.run(_off_loop(lambda: self._return(key, tenure)), f"giving {key!r} back", leave=True)
            except TimeoutError:
                logger.warning(
                    "giving back the lease of %r takes longer than its grace",
                    key,
                    extra={"event_name": "lease.return_late", "space": self._space},
                )
            shield.deliver()

    def _is_last(self, key: Any, tenure: Tenure) -> bool:
        """One user less of *key*; says whether its tenure is to end. A forked child has none, nor who was closed."""
        with self._lock:
            tenure.users -= 1
            if tenure.users or tenure.ending or self._held.get(key) is not tenure:
                return False
            tenure.ending = True
            return True

    def end(self) -> None:
        """Give back everything: the registry was closed, and nothing of it will be saved any more."""
        with self._lock:
            held = [(key, tenure) for key, tenure in self._held.items() if tenure.ready.done() and not tenure.ending]
            for _, tenure in held:
                tenure.ending = True
        for key, tenure in held:
            self._return(key, tenure)

    async def aend(self) -> None:
        """As `end`; the loop goes on meanwhile."""
        if self._held:
            await _off_loop(self.end)

    def _failed(self, key: Any, failed: Exception, error: BaseException | None) -> None:
        if isinstance(failed, (VersionConflict, OwnershipLost)):
            self._keeper.lost(key, failed)
        if error is None:
            raise failed
        note(error, f"while the lease of {key!r} ended: {failed}")

    def _return(self, key: Any, tenure: Tenure) -> None:
        try:
            if tenure.token is not None:
                self._keeper.writer.fence(key, None)
                self._give_back(key, tenure.token)
        finally:
            with self._lock:
                if self._held.get(key) is tenure:
                    del self._held[key]
            tenure.ended.set_result(None)

    def _give_back(self, key: Any, token: int) -> None:
        try:
            self._store.release(self._space, key, token)
        except StoreError as failed:
            # It ends by itself when its time is over; others wait so long.
            logger.warning(
                "the lease of %r could not be given back: %s",
                key,
                failed,
                extra={"event_name": "lease.not_returned", "space": self._space, "of": self},
            )

    # Renewal

    def _visit(self) -> float | None:
        """Renew what is held. Called by the janitor."""
        with self._lock:
            held = [(key, tenure.token) for key, tenure in self._held.items() if tenure.token and not tenure.ending]
            self._watched = bool(held)
        if not held:
            return None
        aside(lambda: self._renew(held), "lease-renewal")
        return _TTL / 3

    def _renew(self, held: list[tuple[Any, int]]) -> None:
        for key, token in held:
            try:
                self._store.renew(self._space, key, token, ttl=_TTL)
            except OwnershipLost as lost:
                logger.warning(
                    "the lease of %r is lost; what is changed under it will be refused: %s",
                    key,
                    lost,
                    extra={"event_name": "lease.lost", "space": self._space, "of": self},
                )
            except StoreError as failed:
                logger.warning(
                    "the lease of %r could not be renewed and may end: %s",
                    key,
                    failed,
                    extra={"event_name": "lease.not_renewed", "space": self._space, "of": self},
                )


def _jittered(pause: float) -> float:
    # Half of it at random: processes that wait for one key must not ask together for ever.
    return pause * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class _Crew:
    """Threads in which tasks wait for the server; none is started before it is needed."""

    def __init__(self) -> None:
        self._after_fork()
        survive_fork(self)

    def _after_fork(self) -> None:
        self.pool = futures.ThreadPoolExecutor(_THREADS, "hygiene-lease")


_crew = _Crew()


def _in_thread(function: Callable[[], T]) -> futures.Future[T]:
    try:
        return _crew.pool.submit(function)
    except RuntimeError:  # the interpreter is on its way out
        outcome: futures.Future[T] = futures.Future()
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)
        return outcome


async def _off_loop(function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """Call *function* in a thread. If the task is cancelled meanwhile, *undo* is called with what it returns."""
    outcome = _in_thread(function)
    try:
        return await asyncio.shield(asyncio.wrap_future(outcome))
    except (asyncio.CancelledError, GeneratorExit):
        if undo is not None:
            # Called in that thread: the loop may be gone by then.
            outcome.add_done_callback(lambda done: _undone(done, undo))
        raise


def _undone(done: futures.Future[T], undo: Callable[[T], object]) -> None:
    if done.exception() is None:
        undo(done.result())
