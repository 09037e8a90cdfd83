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

**A file** is leased in the same way (`FileTenures`), with three differences. Its locks cost microseconds, so they are
taken on the event loop and in the thread of the caller. As long as no other process has the file open, a lease whose
block has ended is kept: while its changes are unsaved, so that they are saved with others, and for some seconds after
its last use. The janitor checks whether another process has come. And because a waiter polls, a caller that comes after
it lets it go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hygiene.closing import Shield, note, running_loop
from hygiene.errors import OwnershipLost, StoreError, VersionConflict
from hygiene.janitor import aside, janitor, survive_fork
from hygiene.logs import logger
from hygiene.waits import Deadline

if TYPE_CHECKING:
    from hygiene.keeping import Keeper
    from hygiene.writebehind import WriteBehind

__all__ = ["FileTenures", "Tenure", "Tenures"]


T = TypeVar("T")

_TTL: Final = 30.0  # seconds: longer than a pause of a virtual machine, shorter than patience
_FIRST_WAIT: Final = 0.01  # seconds between two attempts at a lease that somebody has, growing ...
_LAST_WAIT: Final = 0.5  # ... up to this
_GRACE: Final = 10.0  # seconds that a cancelled task has to save and to give back
_LAST_FILE_WAIT: Final = 0.02  # seconds, the same for a file: a lock costs the kernel little
_YIELD: Final = 0.02  # seconds that a caller gives to those who have waited for a file's lease before it
_NEWS: Final = 0.03  # seconds between two checks whether another process has opened the file, while a lease is kept
_KEPT: Final = 5.0  # seconds after its last use that a lease of a file is kept: the interval in which changes are saved
_BRIEF: Final = 0.1  # seconds that an event loop may be blocked while another thread gives a lease back
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

    def enter(self, key: Any, deadline: Deadline | None = None) -> Tenure:
        """Take *key*, waiting for whoever has it, and bring the entry up to date; returns what `leave` takes."""
        self._refuse_loop(key)
        while True:
            tenure, mine = self._board(key)
            if not mine:
                promise = tenure.ended if tenure.ending else tenure.ready
                if not (tenure.ready.done() and self._may_join(tenure)):
                    self._await_other(key, promise, None if deadline is None else deadline.left())
                    _check(deadline, key, promise)
                if self._may_join(tenure) and self._join(key, tenure):
                    return tenure
                continue
            try:
                pause = 0.0
                while (token := self._take(key)) is None:
                    _check(deadline, key)
                    pause = self._next_pause(key, pause)
                    time.sleep(_until(deadline, pause))
                self._begin(key, tenure, token)
                self._refresh(key, tenure)
            except BaseException:
                self._abort(key, tenure)
                self._return(key, tenure)
                raise
            self._start(tenure)
            return tenure

    async def aenter(self, key: Any, deadline: Deadline | None = None) -> Tenure:
        """As `enter`; the loop goes on meanwhile."""
        while True:
            tenure, mine = self._board(key)
            if not mine:
                promise = tenure.ended if tenure.ending else tenure.ready
                if not (tenure.ready.done() and self._may_join(tenure)):
                    left = None if deadline is None else deadline.left()
                    await asyncio.wait([asyncio.wrap_future(promise)], timeout=left)
                    _check(deadline, key, promise)
                if self._may_join(tenure) and self._join(key, tenure):
                    return tenure
                continue
            try:
                pause = 0.0
                while (token := await self._atake(key)) is None:
                    _check(deadline, key)
                    pause = self._next_pause(key, pause, blocks=False)
                    await asyncio.sleep(_until(deadline, pause))
                self._begin(key, tenure, token)
                await self._arefresh(key, tenure)
            except BaseException:
                self._abort(key, tenure)
                if tenure.token is not None:
                    aside(functools.partial(self._return, key, tenure), "lease-return")
                else:
                    self._return(key, tenure)
                raise
            self._start(tenure)
            return tenure

    # Where a server and a file differ

    def _refuse_loop(self, key: Any) -> None:
        if running_loop() is not None:
            raise StoreError(
                f"to lease {key!r} from other processes would block the event loop: use `async with` for the lease"
            )

    def _await_other(
        self,
        key: Any,  # noqa: ARG002 - a file names it
        promise: futures.Future[None],
        timeout: float | None,
    ) -> None:
        """Wait for another thread or task of this process."""
        futures.wait([promise], timeout)

    def _next_pause(self, key: Any, pause: float, *, blocks: bool = True) -> float:  # noqa: ARG002 - a file looks at them
        """Seconds to sleep before the next attempt; *pause*: before the last one, at first 0."""
        return min(2 * pause, _LAST_WAIT) or _FIRST_WAIT

    async def _atake(self, key: Any) -> int | None:
        # What is cancelled here may still be granted there.
        return await _off_loop(lambda: self._take(key), lambda token: self._undo(key, token))

    async def _arefresh(self, key: Any, tenure: Tenure) -> None:
        await _off_loop(functools.partial(self._refresh, key, tenure))

    def _is_idle(self, key: Any) -> bool:  # noqa: ARG002 - a file looks at it
        """Whether to give the lease back is so quick that a loop need not be spared."""
        return False

    def _board(self, key: Any) -> tuple[Tenure, bool]:
        with self._lock:
            tenure = self._held.get(key)
            if tenure is not None:
                return tenure, False
            tenure = self._held[key] = Tenure()
            return tenure, True

    @staticmethod
    def _may_join(tenure: Tenure) -> bool:
        return tenure.token is not None and not tenure.ending

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
        if self._is_idle(key):
            self._return(key, tenure)
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


class FileTenures(Tenures):
    """
    The keys of one registry that this process has leased from all others that use the same file.

    Args:
        keeper: The keeper of the registry; its `SQLiteStore` has leases.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._kept: dict[Any, tuple[Tenure, float]] = {}  # without a user; since when
        super().__init__(keeper)
        # The store outlives the registry, and would keep its leases.
        abandon = weakref.finalize(self, _release_kept, keeper.writer, keeper.store, keeper.space, self._kept)
        abandon.atexit = False

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._waits: set[Any] = set()  # keys for which other processes see that this one waits
        self._kept.clear()
        self._alone = False  # no other process had the file open at the last check
        self._polls = _Polls(self)

    # Coming in

    def _refuse_loop(self, key: Any) -> None:
        """Do nothing: mostly nothing has to be waited for."""

    def _await_other(self, key: Any, promise: futures.Future[None], timeout: float | None) -> None:
        if running_loop() is None:
            futures.wait([promise], timeout)
            return
        brief = _BRIEF if timeout is None else min(_BRIEF, timeout)
        if not futures.wait([promise], brief).done and brief == _BRIEF:
            super()._refuse_loop(key)

    def _next_pause(self, key: Any, pause: float, *, blocks: bool = True) -> float:
        if blocks and pause >= _LAST_FILE_WAIT:  # on a loop, a lease that is being given back is waited for
            super()._refuse_loop(key)
        return min(2 * pause, _LAST_FILE_WAIT) or (_YIELD if self._store.is_awaited(self._space, key) else _FIRST_WAIT)

    def _take(self, key: Any) -> int | None:
        store = self._store
        if key in self._waits or not store.shared or not store.is_awaited(self._space, key):
            token = super()._take(key)
            if token is not None:
                return token
        if key not in self._waits:
            self._waits.add(key)
            store.wait_for(self._space, key, waits=True)
        return None

    async def _atake(self, key: Any) -> int | None:
        return self._take(key)

    def _stop_waiting(self, key: Any) -> None:
        if key in self._waits:
            self._waits.discard(key)
            with contextlib.suppress(StoreError):  # it was closed, and then no lock is left
                self._store.wait_for(self._space, key, waits=False)

    def _begin(self, key: Any, tenure: Tenure, token: int) -> None:
        self._stop_waiting(key)
        super()._begin(key, tenure, token)

    def _abort(self, key: Any, tenure: Tenure) -> None:
        self._stop_waiting(key)
        super()._abort(key, tenure)

    def _is_current(self, key: Any) -> bool:
        """Whether what is in memory, and any unsaved changes of it, build upon the version that the store has."""
        head = self._keeper.writer._heads.get(key, self)
        version = 0 if head is None else getattr(head, "version", None)
        return version is not None and [version] == self._store.versions(self._space, [key])

    def _refresh(self, key: Any, tenure: Tenure) -> None:
        if not self._is_current(key):
            super()._refresh(key, tenure)
            return
        # Unsaved changes need not be saved now: they will be, under this lease.
        tenure.fresh = True
        self._keeper.fetch_if_missing(key)

    async def _arefresh(self, key: Any, tenure: Tenure) -> None:
        if key in self._keeper.writer and not self._is_current(key):
            await super()._arefresh(key, tenure)
        else:
            self._refresh(key, tenure)

    # Going

    def leave(self, key: Any, tenure: Tenure, error: BaseException | None) -> None:
        """As for a server; on an event loop, changes are saved in another thread."""
        if not self._is_last(key, tenure):
            return
        if running_loop() is None or self._is_idle(key):
            self._end(key, tenure, error)
        else:
            aside(functools.partial(self._end_all, [(key, tenure)]), "lease-return")

    def _is_idle(self, key: Any) -> bool:
        return key not in self._keeper.writer

    def _is_last(self, key: Any, tenure: Tenure) -> bool:
        if tenure.users == 1 and not self._polls.running:
            self._alone = not self._store.shared
        with self._lock:
            if (
                self._alone
                and tenure.users == 1
                and not tenure.ending
                and self._held.get(key) is tenure
                and key not in self._keeper.writer._rejected
                and not self._keeper.closed
            ):
                tenure.users = 0
                self._kept[key] = tenure, time.monotonic()
                kept = True
            else:
                kept = False
        if kept:
            self._polls.begin()
            return False
        return super()._is_last(key, tenure)

    def _join(self, key: Any, tenure: Tenure) -> bool:
        with self._lock:
            if self._held.get(key) is not tenure or tenure.ending:
                return False
            self._kept.pop(key, None)
            tenure.users += 1
            return True

    def end(self) -> None:
        """Give back everything, kept leases included."""
        with self._lock:
            self._kept.clear()  # so that the janitor does not give them back, too
        super().end()

    def drop_kept(self) -> None:
        """Give back the kept leases; their changes are saved later, by another registry."""
        with self._lock:
            kept = [(key, tenure) for key, (tenure, _) in self._kept.items()]
            for _, tenure in kept:
                tenure.ending = True
            self._kept.clear()
        for key, tenure in kept:
            self._return(key, tenure)

    def end_kept(self) -> bool:
        """Give back what need not be kept, and everything if another process has come; return whether some is left."""
        keeper, writer = self._keeper, self._keeper.writer
        registry = keeper._registry()
        try:
            self._alone = not self._store.shared
        except StoreError:
            self._alone = False
        late = time.monotonic() - _KEPT
        saved: list[tuple[Any, Tenure]] = []
        rest: list[tuple[Any, Tenure]] = []
        with self._lock:
            for key, (tenure, since) in list(self._kept.items()):
                unsaved = key in writer._pending or key in writer._saving
                used = since > late and registry is not None and dict.__contains__(registry, key)
                if self._alone and (unsaved or used):
                    continue
                tenure.ending = True
                del self._kept[key]
                (rest if unsaved else saved).append((key, tenure))
        for key, tenure in saved:
            self._return(key, tenure)
        if rest:
            aside(functools.partial(self._end_all, rest), "lease-return")
        return bool(self._kept)

    def _end_all(self, ending: list[tuple[Any, Tenure]]) -> None:
        for key, tenure in ending:
            try:
                self._end(key, tenure, None)
            except StoreError as failed:
                logger.warning(
                    "the changes of %r could not be saved before its lease was given back: %s",
                    key,
                    failed,
                    extra={"event_name": "lease.not_saved", "space": self._space, "of": self},
                )


def _release_kept(writer: WriteBehind, store: Any, space: str, kept: dict[Any, tuple[Tenure, float]]) -> None:
    """Give back the kept leases of a registry that was collected. Called by the collector, anywhere."""
    if kept and not store.closed:
        aside(lambda: _save_and_release(writer, store, space, kept), "lease-return")


def _save_and_release(writer: WriteBehind, store: Any, space: str, kept: dict[Any, tuple[Tenure, float]]) -> None:
    with contextlib.suppress(StoreError):  # logged by the writer, which goes on trying
        writer.flush(_GRACE)
    for key, (tenure, _) in kept.items():
        writer.fence(key, None)
        if tenure.token is not None:
            with contextlib.suppress(StoreError):  # it was closed, and has no leases any more
                store.release(space, key, tenure.token)


class _Polls:
    """Checks of kept leases, by the janitor, as long as there are any."""

    def __init__(self, tenures: FileTenures) -> None:
        self._tenures = weakref.ref(tenures)
        self.running = False

    def begin(self) -> None:
        if not self.running:
            self.running = True
            janitor.watch(self, _NEWS)

    def _visit(self) -> float | None:
        tenures = self._tenures()
        if tenures is not None:
            self.running = False  # before the check: a lease that is kept from now on begins them again
            if tenures.end_kept() and not self.running:
                self.running = True
                return _NEWS
        return None


def _check(deadline: Deadline | None, key: Any, promise: futures.Future[None] | None = None) -> None:
    """Raise if it is too late to wait any longer, for another process or for *promise*."""
    if deadline is None or deadline.left():
        return
    if promise is None:
        raise deadline.missed(key, "another process holds it")
    if not promise.done():
        raise deadline.missed(key, "another caller still acquires it")


def _until(deadline: Deadline | None, pause: float) -> float:
    return _jittered(pause) if deadline is None else min(_jittered(pause), deadline.left())


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
