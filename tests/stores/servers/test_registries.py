"""Registries of several processes that share one store: leases, fencing, and what is stale in memory."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hygiene import History, OwnershipLost, Registry, StoreError, VersionConflict

PATIENCE = 30.0

Open = Callable[..., Registry[Any, Any]]


@pytest.fixture
def bots(server: Any, prefix: str) -> Iterator[Open]:
    """Registries as several processes would have them, each with a connection of its own."""
    opened: list[tuple[Registry[Any, Any], Any]] = []

    def bot(**limits: Any) -> Registry[Any, Any]:
        store = server.open(prefix)
        registry: Registry[Any, Any] = Registry(store=store, name="chats", **limits)
        opened.append((registry, store))
        return registry

    yield bot
    for registry, store in opened:
        try:
            registry.close()
        except StoreError:  # the test has made it so
            pass
        finally:
            store.close()


COUNT = """
import sys
from hygiene import Registry, open_store
address, prefix, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open_store(address, prefix=prefix) as store, Registry(store=store, name="chats") as chats:
    for _ in range(times):
        with chats.lease("counter", create=dict) as counter:
            counter["n"] = counter.get("n", 0) + 1
print("done")
"""


def test_four_processes_count_together(server: Any, prefix: str, elsewhere: Any, bots: Open) -> None:
    """Under the lease each sees what the last one saved: four times 100 is 400, and no update is lost."""
    processes = [elsewhere(COUNT, server.url, prefix, 100) for _ in range(4)]
    assert [b"done"] * 4 == [process.communicate(timeout=55)[0].strip() for process in processes]

    assert {"n": 400} == bots()["counter"]


async def test_a_lease_is_for_the_whole_cluster(bots: Open) -> None:
    """While one process has the entry, another one waits; then it finds what the first one saved."""
    here, there = bots(), bots()
    inside, order = asyncio.Event(), []

    async def second() -> None:
        await inside.wait()
        async with there.lease("alice", create=list) as messages:
            order.append("second")
            messages.append("from there")

    task = asyncio.create_task(second())
    async with here.lease("alice", create=list) as messages:
        inside.set()
        messages.append("from here")
        while there._keeper is None or "alice" not in there._keeper.tenures._held:  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0)  # the other one has asked
        order.append("first")
    await task

    assert ["first", "second"] == order
    async with here.lease("alice") as messages:
        assert ["from here", "from there"] == messages


async def test_leases_of_one_process_overlap(bots: Open) -> None:
    """Ten tasks of one process share the lease, and it is given back when the last of them goes."""
    here, there = bots(), bots()

    async def one(n: int) -> None:
        async with here.lease("alice", create=list) as messages:
            messages.append(n)
            await asyncio.sleep(0)

    await asyncio.gather(*map(one, range(10)))

    async with there.lease("alice") as messages:
        assert set(range(10)) == set(messages)


async def test_a_blocking_read_on_a_loop_names_the_lease(bots: Open) -> None:
    """On an event loop a read that would wait for the network is refused; the error says what to write instead."""
    here, there = bots(), bots()
    async with here.lease("alice", create=list) as messages:
        messages.append("hello")

    for read in (
        lambda: there["alice"],
        lambda: there.get("alice"),
        lambda: "alice" in there,
        lambda: there.pop("alice"),
    ):
        with pytest.raises(StoreError, match=r"async with registry\.lease\('alice'\)"):
            read()
    with pytest.raises(StoreError, match="async with"), there.lease("alice"):
        pass
    async with there.lease("alice") as found:
        assert ["hello"] == found == there["alice"]  # now it is in memory


def test_a_late_save_of_a_paused_owner_is_refused(server: Any, prefix: str, elsewhere: Any, bots: Open) -> None:
    """A process is stopped for longer than its lease lasts; its save is refused, and the new owner's data stands."""
    paused = elsewhere(
        """
import sys
import hygiene.tenure
hygiene.tenure._TTL = 0.5
from hygiene import OwnershipLost, Registry, VersionConflict, open_store
with open_store(sys.argv[1], prefix=sys.argv[2]) as store, Registry(store=store, name="chats") as chats:
    try:
        with chats.lease("alice", create=list) as messages:
            messages.append("from the owner that was stopped")
            print("inside", flush=True)
            sys.stdin.readline()
    except (OwnershipLost, VersionConflict) as error:
        print(type(error).__name__, flush=True)
    print(list(chats["alice"]), flush=True)
""",
        server.url,
        prefix,
    )
    assert b"inside" == paused.stdout.readline().strip()
    paused.send_signal(signal.SIGSTOP)
    try:
        here = bots()
        with here.lease("alice", create=list) as messages:  # waits until the other's lease is over
            messages.append("from the new owner")
    finally:
        paused.send_signal(signal.SIGCONT)
    said, _ = paused.communicate(b"\n", timeout=PATIENCE)

    assert [b"OwnershipLost", b"['from the new owner']"] == said.splitlines()
    assert ["from the new owner"] == here["alice"]


def test_without_a_lease_a_lost_update_is_an_error(bots: Open) -> None:
    """Two processes change what both have in memory: the slower one is told, and then sees what was saved."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    stale = there["alice"]
    here["alice"].append("from here")
    here.flush()

    with pytest.raises(VersionConflict):  # noqa: PT012 - at once if the hint came, else when it is saved
        stale.append("from there")
        there.flush()

    assert ["hello", "from here"] == _again(there, "alice")
    with pytest.raises(VersionConflict):
        stale.append("once more")  # what was held is out of date, and says so
    assert ["hello", "from here"] == here["alice"]


def _again(registry: Registry[Any, Any], key: Any) -> Any:
    """Look up after a conflict, which the first look-up may still tell of."""
    try:
        return registry[key]
    except VersionConflict:
        return registry[key]


def test_a_hint_drops_what_is_stale(server: Any, prefix: str, bots: Open, wait: Any) -> None:
    """What another process has saved is seen without a lease, a moment later."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    assert ["hello"] == there["alice"]

    here["alice"].append("how are you")
    here.flush()
    wait(lambda: ["hello", "how are you"] == there["alice"])

    del here["alice"]
    here.flush()
    wait(lambda: "alice" not in there)


def test_what_is_created_twice_is_a_conflict(bots: Open) -> None:
    """Two processes find nothing and create: the second is told, instead of overwriting the first."""
    here, there = bots(), bots()
    assert "alice" not in here
    assert "alice" not in there
    here["alice"] = ["from here"]
    here.flush()
    there["alice"] = ["from there"]

    with pytest.raises(VersionConflict):
        there.flush()

    assert ["from here"] == _again(there, "alice")


def test_who_changes_under_a_lost_lease_is_told(bots: Open) -> None:
    """The lease has ended without our knowledge: the save is refused, and memory has what the server has."""
    here, there = bots(), bots()
    with pytest.raises(OwnershipLost), here.lease("alice", create=list) as messages:  # noqa: PT012 - at its end
        messages.append("too late")
        keeper = here._keeper
        assert keeper is not None
        tenure = keeper.tenures._held["alice"]
        keeper.store.release("chats", "alice", tenure.token)  # what its end does
        with there.lease("alice", create=list) as fresh:
            fresh.append("in time")

    assert ["in time"] == here["alice"] == there["alice"]


async def test_a_cancelled_lease_gives_the_key_back(bots: Open) -> None:
    """Wherever a task that leases is cancelled, the next one gets the key at once."""
    here, there = bots(), bots()
    for steps in range(0, 60, 3):
        inside = asyncio.Event()

        async def one(inside: asyncio.Event = inside) -> None:
            async with here.lease("alice", create=list):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(one())
        for _ in range(steps):
            await asyncio.sleep(0)
        if steps > 30:
            await asyncio.wait_for(inside.wait(), PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with asyncio.timeout(20), there.lease("alice", create=list):
        pass


async def test_what_the_body_raised_is_what_comes_out(bots: Open) -> None:
    """A save that fails at the end of a lease does not hide the error of the body; it is noted on it."""
    here, there = bots(), bots()
    with pytest.raises(ValueError, match="the body's") as raised:  # noqa: PT012 - at the end of the lease
        async with here.lease("alice", create=list) as messages:
            messages.append("lost")
            keeper = here._keeper
            assert keeper is not None
            keeper.store.release("chats", "alice", keeper.tenures._held["alice"].token)
            async with there.lease("alice", create=list) as fresh:
                fresh.append("kept")
            raise ValueError("the body's")

    assert any("while the lease of 'alice' ended" in line for line in raised.value.__notes__)


def test_threads_share_a_lease(bots: Open) -> None:
    """Eight threads lease one key of one process, and nothing that they append is lost."""
    here, there = bots(), bots()
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for n in range(10):
                with here.lease("alice", create=list) as messages:
                    messages.append((thread * 100) + n)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert [] == errors
    with there.lease("alice") as messages:
        assert isinstance(messages, History)
        assert 80 == len(set(messages)) == len(messages)
