"""Memory that gets short is noticed, told, and answered once."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene import MemoryMonitor, Registry, bounded_registry, open_store, register_cleanup
from hygiene.janitor import alive
from hygiene.memory import Shed
from hygiene.memory import monitor as module
from hygiene.memory.readings import Readings
from hygiene.testing import ManualClock
from hygiene.trend import Growth
from hygiene.writebehind import WriteBehind

MIB = 2**20
PATIENCE = 20.0
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def watch(machine: Any, clock: ManualClock) -> MemoryMonitor:
    """A monitor of the machine made of files; a test calls ``check`` when it is time to."""
    return MemoryMonitor(timer=clock, root=machine.root)


@pytest.fixture
def relieved() -> Iterator[list[str]]:
    """What the cleanups for pressure have said."""
    said: list[str] = []
    handle = register_cleanup(said.append, "relieved", on="pressure")
    yield said
    handle.cancel()


def run(code: str, *args: str, timeout: float = 55) -> subprocess.CompletedProcess[str]:
    """Run *code* in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# Levels


def test_levels_follow_the_share_of_the_limit(machine: Any, watch: MemoryMonitor) -> None:
    """80 % is a warning, 90 % is critical, and a level is left five points below where it was entered."""
    levels = []
    for machine.rss in (500, 799, 800, 760, 749, 899, 900, 851, 849, 700):
        levels.append(str(watch.check().level))

    assert ["normal", "normal", "warn", "warn", "normal", "warn", "critical", "critical", "warn", "normal"] == levels


def test_a_reading_says_what_was_found(machine: Any, watch: MemoryMonitor, clock: ManualClock) -> None:
    machine.rss = 500
    machine.write("proc/self/status", "VmSwap:\t2048 kB\n")

    reading = watch.check()

    assert 500 * MIB == reading.rss
    assert 2 * MIB == reading.swap
    assert 0.5 == reading.share
    assert "/sys/fs/cgroup/app/memory.max" == reading.limit.source  # type: ignore[union-attr]  # there is one
    assert (Growth.STEADY, 0.0, clock.now) == (reading.growth, reading.rate, reading.at)


def test_a_limit_that_is_lowered_counts_at_the_next_reading(machine: Any, watch: MemoryMonitor) -> None:
    """An operator may lower it at any time, and so may a scheduler."""
    machine.rss = 500
    before = watch.check().level
    machine.limit = 550

    assert ("normal", "critical") == (before, watch.check().level)


def test_a_limit_that_is_given_is_for_the_resident_size(machine: Any, clock: ManualClock) -> None:
    watch = MemoryMonitor("200MiB", timer=clock, root=machine.root)
    machine.rss = 170

    reading = watch.check()

    assert ("warn", 0.85, "given") == (reading.level, reading.share, reading.limit.source)  # type: ignore[union-attr]


def test_files_that_vanish_or_turn_to_nonsense_end_no_monitor(machine: Any, watch: MemoryMonitor) -> None:
    """What cannot be read now is left out, and counts again when it can."""
    machine.rss = 850
    seen = [watch.check().level]
    for text in ("max", "", "nonsense", f"{2**62}"):
        machine.write("sys/fs/cgroup/app/memory.max", text)
        seen.append(watch.check().level)
    (machine.root / "proc/self/cgroup").unlink()
    seen.append(watch.check().level)
    machine.write("proc/self/cgroup", "0::/app\n")
    machine.limit = 1000
    seen.append(watch.check().level)

    assert ["warn", "normal", "normal", "normal", "normal", "normal", "warn"] == seen


def test_waiting_for_memory_is_a_warning_if_half_of_it_is_used(machine: Any, watch: MemoryMonitor) -> None:
    """A machine on which others thrash is not helped by what this process drops."""
    machine.stall(15.0)
    machine.rss = 400
    little = watch.check().level
    machine.rss = 600
    much = watch.check().level

    assert ("normal", "warn") == (little, much)
    assert "All tasks waited for memory in 15 % of the last ten seconds" in str(watch.healthy())


def test_levels_are_told_when_they_change(machine: Any, watch: MemoryMonitor, caplog: pytest.LogCaptureFixture) -> None:
    """Once each: a warning when it gets worse, an info when it gets better."""
    caplog.set_level(logging.INFO, "hygiene")
    for machine.rss in (500, 850, 850, 400, 400):
        watch.check()
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "now (was" in record.getMessage()]

    assert [
        (
            "WARNING",
            "memory is warn now (was normal): 850.0 MiB resident, 85% of 1,000.0 MiB (/sys/fs/cgroup/app/memory.max)",
        ),
        (
            "INFO",
            "memory is normal now (was warn): 400.0 MiB resident, 40% of 1,000.0 MiB (/sys/fs/cgroup/app/memory.max)",
        ),
    ] == told


@pytest.mark.parametrize(
    "wrong",
    [
        {"warn": 0.9, "critical": 0.8},
        {"warn": 0},
        {"critical": 1.5},
        {"share": 2},
        {"stall": 0},
        {"interval": 0},
        {"cooldown": "soon"},
        {"limit": 0},
    ],
)
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="found"):
        MemoryMonitor(**wrong)


def test_one_name_to_spare_is_not_taken_for_its_letters() -> None:
    with pytest.raises(TypeError, match=r"such as \['chats'\]"):
        MemoryMonitor(spare="chats")


# Health


def test_healthy_is_true_with_the_numbers(watch: MemoryMonitor) -> None:
    health = watch.healthy()

    assert health
    assert "Memory is normal: 100.0 MiB resident, 10% of 1,000.0 MiB (/sys/fs/cgroup/app/memory.max)." == str(health)


def test_unhealthy_says_what_holds_the_memory(machine: Any, watch: MemoryMonitor) -> None:
    """The reason names the largest registries, and what to do."""
    held = Registry({n: bytes(MIB) for n in range(50)}, max_bytes="1GiB", name="attachments")
    machine.rss = 950

    health = watch.healthy()

    assert not health
    assert "critical" == health.reading.level
    assert "attachments 50.0 MiB in 50 entries" in health.reason
    assert "lower their bounds, or raise the limit" in health.reason
    assert 50 == len(held)  # to ask sheds nothing


def test_healthy_does_not_read_again_within_the_interval(
    machine: Any, watch: MemoryMonitor, clock: ManualClock
) -> None:
    watch.check()
    machine.rss = 950
    fresh = bool(watch.healthy())
    clock.advance(5)

    assert (True, False) == (fresh, bool(watch.healthy()))


def test_a_leak_is_unhealthy_long_before_the_limit(
    machine: Any, watch: MemoryMonitor, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Two hours of growth are an alarm, told once, with the hours that are left."""
    for minute in range(125):
        machine.rss = 100 + minute
        watch.check()
        clock.advance(60)
    health = watch.healthy()

    assert not health
    assert (Growth.GROWING, "normal") == (health.reading.growth, health.reading.level)
    assert "It has grown by 60.0 MiB an hour for 2 h and reaches the limit in 12.9 h" in health.reason
    assert 1 == sum("has grown by" in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_a_floor_that_rises_is_told_and_is_no_reason_to_act_yet(
    machine: Any, watch: MemoryMonitor, clock: ManualClock
) -> None:
    """Work that comes and goes hides how fast it is, and not that it is."""
    for minute in range(200):
        machine.rss = 100 + 2 * minute + 200 * (minute % 45) / 45
        watch.check()
        clock.advance(60)
        health = watch.healthy()
        if health.reading.growth is Growth.RISING:
            break

    assert health
    assert "The least of each of the last three hours is above that of the hour before" in health.reason


def test_unhealthy_by_five_minutes_is_one_line(machine: Any, watch: MemoryMonitor, clock: ManualClock) -> None:
    """What the documentation gives for "every 5 minutes if unhealthy"."""
    done: list[str] = []
    handle = register_cleanup(lambda: watch.healthy() or done.append("cleaned"), every="5m", name="clean")
    handle()
    machine.rss = 900
    clock.advance(10)
    handle()
    handle.cancel()

    assert ["cleaned"] == done


# Shedding


def test_a_quarter_of_the_bytes_goes_the_least_recently_used_first(machine: Any, watch: MemoryMonitor) -> None:
    chats = Registry({n: bytes(10_000) for n in range(100)}, max_bytes="100MiB", name="chats")
    assert chats[0]  # used last
    before = chats.stats().bytes or 0
    machine.rss = 800
    watch.check()

    assert 75 == len(chats)
    assert 0 in chats
    assert [] == [n for n in range(1, 26) if n in chats]
    assert watch.last_shed is not None
    assert before - (chats.stats().bytes or 0) == watch.last_shed.registries["chats"]


def test_a_registry_without_max_bytes_gives_the_same_share(machine: Any, watch: MemoryMonitor) -> None:
    """Its bytes are estimated from some of its values."""
    chats = Registry({n: bytes(10_000) for n in range(100)}, maxsize=1000, name="unmeasured")
    machine.rss = 800
    watch.check()

    assert 75 == len(chats)
    assert watch.last_shed is not None
    assert 25 * 10_033 == pytest.approx(watch.last_shed.registries["unmeasured"], rel=0.05)


def test_columns_that_share_one_life_are_trimmed_as_one(machine: Any, watch: MemoryMonitor) -> None:
    @bounded_registry("chats", "locks", maxsize=1000)
    class Bot:
        def __init__(self) -> None:
            self.chats: dict[int, bytes] = {n: bytes(100_000) for n in range(40)}
            self.locks: dict[int, object] = {n: object() for n in range(40)}

    bot = Bot()
    machine.rss = 800
    watch.check()

    assert 30 == len(bot.chats)
    assert list(bot.chats) == list(bot.locks)


def test_leased_and_busy_entries_stay(machine: Any, watch: MemoryMonitor) -> None:
    chats = Registry(
        {n: bytes(100_000) for n in range(8)}, max_bytes="100MiB", busy=lambda entry: entry.key in {0, 1}, name="in use"
    )
    with chats.lease(2):
        machine.rss = 800
        watch.check()

        assert [0, 1, 2, 5, 6, 7] == list(chats)


def test_what_has_no_bound_or_refuses_to_drop_is_left_alone(machine: Any, watch: MemoryMonitor) -> None:
    """Nobody has agreed to lose an entry of these."""
    plain = Registry({n: bytes(100_000) for n in range(8)})
    outbox = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100, policy="none", overflow="raise")
    machine.rss = 950
    watch.check()

    assert (8, 8) == (len(plain), len(outbox))


def test_registries_that_are_named_are_spared(machine: Any, clock: ManualClock) -> None:
    watch = MemoryMonitor(timer=clock, root=machine.root, spare=["tokens"])
    tokens = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100, name="tokens")
    others = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100, name="others")
    machine.rss = 800
    watch.check()

    assert (8, 6) == (len(tokens), len(others))


def test_a_registry_that_would_not_help_is_left_alone(machine: Any, watch: MemoryMonitor) -> None:
    """A hundred bytes here and there cost their users a miss and save nothing."""
    large = Registry({n: bytes(MIB) for n in range(16)}, maxsize=100, name="large")
    small = Registry({n: n for n in range(100)}, maxsize=100, name="small")
    machine.rss = 800
    watch.check()

    assert (12, 100) == (len(large), len(small))


def test_it_sheds_once_however_long_memory_is_short(
    machine: Any, watch: MemoryMonitor, clock: ManualClock, relieved: list[str]
) -> None:
    """The resident size does not fall when objects are freed: that is no reason to drop more."""
    chats = Registry({n: bytes(100_000) for n in range(100)}, maxsize=1000, name="kept")
    machine.rss = 850
    for _ in range(100):
        watch.check()
        clock.advance(60)

    assert 75 == len(chats)
    assert (1, 1) == (watch.sheds, len(relieved))


def test_it_sheds_again_when_memory_has_grown_and_the_cool_down_is_over(
    machine: Any, watch: MemoryMonitor, clock: ManualClock
) -> None:
    counts = []
    for machine.rss, wait in ((810, 0), (840, 10), (840, 25), (840, 100), (845, 0), (860, 0)):
        clock.advance(wait)
        watch.check()
        counts.append(watch.sheds)

    assert [1, 1, 2, 2, 2, 3] == counts


def test_a_worse_level_does_not_wait_for_the_cool_down(machine: Any, watch: MemoryMonitor, clock: ManualClock) -> None:
    counts = []
    for machine.rss in (810, 910, 700, 910, 990):
        clock.advance(1)
        watch.check()
        counts.append(watch.sheds)

    assert [1, 2, 2, 2, 3] == counts


def test_at_critical_memory_that_grows_is_shed_within_the_cool_down(
    machine: Any, watch: MemoryMonitor, clock: ManualClock
) -> None:
    """A burst that fills what was freed ends the process long before a cool-down has elapsed."""
    counts = []
    for machine.rss in (910, 915, 930, 935, 950, 950, 970):
        clock.advance(0.01)
        watch.check()
        counts.append(watch.sheds)

    assert [1, 1, 2, 2, 3, 3, 4] == counts


def test_at_critical_the_freed_bytes_are_counted_from_the_lowest_reading(
    machine: Any, watch: MemoryMonitor, clock: ManualClock
) -> None:
    """Where the allocator gives the freed memory back, the share falls first, and a burst brings it up again."""
    held = Registry({n: bytes(MIB) for n in range(400)}, max_bytes="1GiB", name="attachments")
    counts = []
    for machine.rss in (990, 890, 980, 991):  # a quarter of 400 MiB is freed; 890 + 100 is reached at the end
        clock.advance(0.01)
        watch.check()
        counts.append((watch.sheds, len(held)))

    assert [(1, 300), (1, 300), (1, 300), (2, 225)] == counts


def test_a_shedding_that_frees_nothing_is_not_repeated_by_noise(
    machine: Any, watch: MemoryMonitor, clock: ManualClock, relieved: list[str]
) -> None:
    for machine.rss in (930, 905, 935, 902, 939):
        clock.advance(0.01)
        watch.check()

    assert (1, 1) == (watch.sheds, len(relieved))


def test_pressure_is_over_when_it_has_been_normal_for_the_cool_down(
    machine: Any, watch: MemoryMonitor, clock: ManualClock
) -> None:
    for machine.rss in (810, 500, 810):
        clock.advance(40)
        watch.check()

    assert 2 == watch.sheds


def test_write_behind_is_flushed(machine: Any, watch: MemoryMonitor) -> None:
    """What waits to be saved is memory, too."""
    with open_store("sqlite::memory:") as store, WriteBehind(store, every=1000, space="chats") as behind:
        behind.put("ann", {"text": "hello"})
        assert 1 == len(behind)
        machine.rss = 800
        watch.check()

        assert 0 == len(behind)


def test_what_leaves_is_saved_first(machine: Any, watch: MemoryMonitor, tmp_path: Path) -> None:
    """With a store nothing is lost by being shed: it is loaded when it is asked for."""
    with Registry({n: {"text": "x" * 1000} for n in range(8)}, maxsize=100, store=f"sqlite:{tmp_path}/a.db") as chats:
        machine.rss = 800
        watch.check()

        assert 6 == len(chats)
        assert {"text": "x" * 1000} == chats[0]


def test_a_callback_that_raises_or_allocates_keeps_nothing_from_being_trimmed(
    machine: Any, watch: MemoryMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it start another round: what it allocates is seen at the next reading."""
    chats = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100)
    hoard: list[bytes] = []

    def allocate() -> None:
        hoard.append(bytes(16 * MIB))
        machine.rss += 100
        watch.check()

    def run_out() -> None:
        raise MemoryError

    handles = [register_cleanup(function, on="pressure") for function in (allocate, run_out)]
    machine.rss = 800
    watch.check()
    for handle in handles:
        handle.cancel()

    assert 6 == len(chats)
    assert (1, 1) == (watch.sheds, len(hoard))
    assert any("failed" in record.getMessage() for record in caplog.records)


def test_a_callback_that_hangs_does_not_keep_the_registries_waiting(
    machine: Any, watch: MemoryMonitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    chats = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100)
    go_on = threading.Event()
    handle = register_cleanup(go_on.wait, PATIENCE, on="pressure")
    machine.rss = 800
    watch.check()
    go_on.set()
    handle.cancel()

    assert 6 == len(chats)
    assert watch.last_shed is not None
    assert 1 <= watch.last_shed.callbacks
    assert any("the registries are trimmed meanwhile" in record.getMessage() for record in caplog.records)


def test_a_hook_that_raises_keeps_no_other_registry_from_being_trimmed(machine: Any, watch: MemoryMonitor) -> None:
    def fail(removal: object) -> None:
        raise RuntimeError("full")

    failing = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100, on_evict=fail)
    others = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100)
    machine.rss = 800
    watch.check()

    assert (6, 6) == (len(failing), len(others))


def test_a_registry_that_cannot_be_trimmed_keeps_no_other_from_it(
    machine: Any, watch: MemoryMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    """Its store may be out of reach; that is logged."""

    class Stuck(Registry[int, bytes]):
        def trim(self, to: int | str) -> int:
            raise ConnectionError("store is away")

    stuck = Stuck({n: bytes(200_000) for n in range(8)}, maxsize=100, name="stuck")
    others = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100)
    machine.rss = 800
    watch.check()

    assert (8, 6) == (len(stuck), len(others))
    assert any("registry 'stuck' could not be trimmed" in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_while_everything_is_leased_it_says_so_once_and_does_not_spin() -> None:
    """A process of its own, so that there is nothing else to shed."""
    done = run(
        """
        import logging
        from hygiene import MemoryMonitor, Registry
        from hygiene.testing import ManualClock

        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        clock = ManualClock()
        chats = Registry({n: bytes(100_000) for n in range(4)}, maxsize=100, name="chats")
        monitor = MemoryMonitor("1MiB", timer=clock)
        with chats.lease(0), chats.lease(1), chats.lease(2), chats.lease(3):
            for _ in range(20):
                monitor.check()
                monitor._mark = 0.0  # as if memory had grown
                clock.advance(60)
            print(len(chats), monitor.sheds)
        monitor.check()
        print(len(chats), monitor.sheds)
        """
    )

    assert "4 20\n3 21\n" == done.stdout
    assert 1 == done.stderr.count("nothing can be shed: all that the 1 registries hold is leased, busy or spared")


@pytest.mark.slow
def test_without_anything_to_shed_it_says_what_is_missing() -> None:
    done = run(
        """
        import logging
        from hygiene import MemoryMonitor

        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        monitor = MemoryMonitor("1MiB")
        monitor.check()
        print(monitor.healthy().reason.partition(". ")[2])
        """
    )

    assert 'there is no bounded registry with entries, and no register_cleanup(on="pressure")' in done.stderr
    assert "No registry holds much of it: look with hygiene.watch_growth()" in done.stdout


def test_shedding_by_hand_tells_what_went(watch: MemoryMonitor, relieved: list[str]) -> None:
    """Whatever the level; half, if asked for."""
    chats = Registry({n: bytes(100_000) for n in range(8)}, max_bytes="10MiB", name="by hand")

    shed = watch.shed(0.5)

    assert 4 == len(chats)
    assert ["relieved"] == relieved
    assert isinstance(shed, Shed)
    assert 1 <= shed.callbacks
    assert 4 <= shed.entries
    assert shed.bytes >= shed.registries["by hand"] > 400_000
    assert shed.trimmed is None

    watch.shed(1)

    assert 0 == len(chats)
    with pytest.raises(ValueError, match="from 0 to 1"):
        watch.shed(2)


def test_a_share_of_nothing_leaves_the_registries_alone(machine: Any, clock: ManualClock, relieved: list[str]) -> None:
    watch = MemoryMonitor(timer=clock, root=machine.root, share=0)
    chats = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100)
    machine.rss = 950
    watch.check()

    assert 8 == len(chats)
    assert ["relieved"] == relieved


@pytest.mark.slow
def test_collecting_and_giving_back_are_asked_for(machine: Any, clock: ManualClock) -> None:
    """Cycles are freed, and glibc gives whole pages back, if the monitor was told to."""

    class Node:
        def __init__(self) -> None:
            self.me = self

    gc.collect()
    gc.disable()
    try:
        node = weakref.ref(Node())
        MemoryMonitor(timer=clock, root=machine.root).shed()
        kept = node() is not None
        shed = MemoryMonitor(timer=clock, root=machine.root, collect=True, malloc_trim=True).shed()
        freed = node() is None
    finally:
        gc.enable()

    assert (True, True) == (kept, freed)
    assert shed.trimmed in {True, False, None}


@pytest.mark.slow
@pytest.mark.parametrize("bound", [{"maxsize": 10}, {"max_bytes": "1MiB"}], ids=["estimated", "measured"])
def test_of_thousands_of_small_registries_a_quarter_goes(watch: MemoryMonitor, bound: dict[str, Any]) -> None:
    """A dict on each of many objects: though none has four entries, a quarter of all goes, and not all."""
    many = [Registry({n: bytes(1000) for n in range(2)}, name="each", **bound) for _ in range(3000)]

    shed = watch.shed()

    left = sum(map(len, many))
    assert 1000 < 6000 - left < 2000
    assert (6000 - left) * 1033 == pytest.approx(shed.registries["each"], rel=0.1)


def test_registries_are_found_as_long_as_they_live() -> None:
    """What the shedding goes through holds nothing alive."""
    before = len(alive(Registry))
    registry: Registry[int, int] = Registry()

    assert registry in [one for one in alive(Registry) if one is registry]
    assert before + 1 == len(alive(Registry))

    del registry

    assert before == len(alive(Registry))


# Life


def wait_for(condition: Any) -> None:
    """Let other threads go on until *condition* holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        os.sched_yield()


def test_started_it_reads_and_sheds_in_the_background(machine: Any) -> None:
    chats = Registry({n: bytes(100_000) for n in range(8)}, maxsize=100)
    machine.rss = 850
    with MemoryMonitor(interval=0.01, root=machine.root) as watch:
        assert watch.running
        wait_for(lambda: watch.sheds)
        machine.rss = 500
        wait_for(lambda: watch.level == "normal")

    assert not watch.running
    assert 6 == len(chats)


def end_it(reference: weakref.ref[MemoryMonitor]) -> None:
    watch = reference()
    assert watch is not None
    wait_for(lambda: watch._last is not None)
    watch.close()
    watch.close()


@pytest.mark.slow
def test_started_it_lives_though_nobody_holds_it_and_closed_it_dies(machine: Any) -> None:
    watch = MemoryMonitor(interval=0.01, root=machine.root).start()
    assert watch is watch.start()
    reference = weakref.ref(watch)
    del watch
    gc.collect()
    end_it(reference)

    def gone() -> bool:
        gc.collect()
        return reference() is None

    wait_for(gone)


def test_closed_it_can_be_started_again(machine: Any) -> None:
    watch = MemoryMonitor(interval=0.01, root=machine.root)
    for _ in range(3):
        with watch:
            before = watch._last
            wait_for(lambda before=before: watch._last is not before)

    assert not watch.running


@pytest.mark.slow
def test_nothing_starts_at_import_or_when_it_is_made() -> None:
    done = run(
        """
        import threading
        import hygiene, hygiene.memory
        monitor = hygiene.MemoryMonitor()
        monitor.check()
        print(threading.active_count())
        """
    )

    assert "1\n" == done.stdout, done.stderr


def test_repr_shows_the_state(machine: Any, watch: MemoryMonitor) -> None:
    assert "<MemoryMonitor 'memory' normal>" == repr(watch)

    machine.rss = 850
    watch.check()

    assert (
        "<MemoryMonitor 'memory' warn, 850.0 MiB resident, 85% of 1,000.0 MiB (/sys/fs/cgroup/app/memory.max)>"
        == repr(watch)
    )


async def test_an_asynchronous_cleanup_runs_on_its_loop(machine: Any, watch: MemoryMonitor) -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def relieve() -> None:
        assert loop is asyncio.get_running_loop()
        done.set()

    handle = register_cleanup(relieve, on="pressure")
    machine.rss = 850
    await asyncio.to_thread(watch.check)
    async with asyncio.timeout(PATIENCE):
        await done.wait()
    handle.cancel()

    assert handle.runs == 1


def test_threads_that_check_at_once_shed_once(machine: Any, watch: MemoryMonitor, relieved: list[str]) -> None:
    machine.rss = 850
    start = threading.Barrier(8)

    def check() -> None:
        start.wait(PATIENCE)
        for _ in range(20):
            watch.check()

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert (1, ["relieved"]) == (watch.sheds, relieved)


# Real processes


@pytest.mark.slow
@linux
def test_a_monitor_goes_on_in_a_forked_child_with_its_own_memory() -> None:
    done = run(
        """
        import os, sys, time, warnings
        from hygiene import MemoryMonitor, Registry
        from hygiene.memory import rss

        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with a thread is what is tested
        base = rss()
        chats = Registry(maxsize=1000, name="chats")
        monitor = MemoryMonitor(base + 2**27, interval=0.01).start()
        while monitor._last is None:
            time.sleep(0)
        child = os.fork()
        if child == 0:
            assert monitor.running
            for n in range(8):
                chats[n] = b"x" * 2**24
            end = time.monotonic() + 20
            while not monitor.sheds and time.monotonic() < end:
                time.sleep(0)
            os._exit(0 if monitor.sheds and len(chats) < 8 else 1)
        status = os.waitpid(child, 0)[1]
        print(status, monitor.level, monitor.sheds, len(chats))
        """
    )

    assert "0 normal 0 0\n" == done.stdout


# Holds more and more, twice what it may have in all. Each value is small enough to come from the heap of the allocator,
# which keeps it when it is freed: the resident size does not fall.
LOAD = """
import resource, sys, threading
from hygiene import MemoryMonitor, Registry
from hygiene.memory import readings

how, group = sys.argv[1], sys.argv[2]
room = 200 * 2**20
if group == "addresses":
    size = readings._virtual() + room
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
else:
    open(group + "/cgroup.procs", "w").write("0")
chats = Registry(maxsize=10**9, name="chats")
monitor = MemoryMonitor(interval=0.01)
if how == "thread":
    monitor.start()
pause = threading.Event()
for n in range(400 * 2**20 // 20_000):
    chats[n] = b"x" * 20_000
    if how == "check" and n % 50 == 0:
        monitor.check()
    elif how == "thread" and n % 10 == 0:
        pause.wait(0.001)
monitor.close()
print(n + 1, len(chats) < n, monitor.sheds > 1)
"""


@pytest.mark.slow
@linux
def test_a_load_that_ends_a_process_without_a_monitor_is_survived_with_it() -> None:
    """Under a limit of the address space."""
    without = run(LOAD, "nothing", "addresses")
    with_it = run(LOAD, "check", "addresses")

    assert (1, True) == (without.returncode, "MemoryError" in without.stderr)
    assert (0, "20971 True True\n") == (with_it.returncode, with_it.stdout)


@pytest.fixture
def group() -> Iterator[str]:
    """A control group that may have 200 MiB, if this machine lets us make one."""
    reader = Readings()
    for unified, name in ((True, "memory.max"), (False, "memory.limit_in_bytes")):
        for above in reader._folders(unified=unified)[:1]:
            made = Path(above) / f"hygiene-{os.getpid()}"
            try:
                made.mkdir()
                (made / name).write_text(str(200 * MIB))
            except OSError:
                if made.is_dir():
                    made.rmdir()
                continue
            yield str(made)
            wait_for(lambda made=made: not (made / "cgroup.procs").read_text())
            made.rmdir()
            return
    pytest.skip("no control group with a limit can be made on this machine")


@pytest.mark.slow
@linux
@pytest.mark.parametrize("how", ["check", "thread"])
def test_a_load_that_is_killed_in_a_control_group_is_survived_with_a_monitor(group: str, how: str) -> None:
    """The kernel kills what goes beyond the limit of its group; with a monitor nothing has to."""
    without = run(LOAD, "nothing", group)
    with_it = run(LOAD, how, group)

    assert -9 == without.returncode
    assert (0, "20971 True True\n") == (with_it.returncode, with_it.stdout)
