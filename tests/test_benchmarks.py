"""The benchmark runs and says what it is asked for; what it measures is no test's business."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import sys
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import hygiene
from hygiene.stores import SQLiteStore
from hygiene.stores.protocol import SaveLog

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once

# What was promised: the start of each row that has a limit, in order.
PROMISES = {
    "registries": [
        "Registry: read hit, against cachebox LRU",
        "Registry: read hit, against dict",
        "Registry(ttl): read hit, against cachebox TTL",
        "Registry: get, against cachebox LRU",
        "Registry: in, against cachebox LRU",
        "Registry: set of an existing key, against cachebox LRU",
        "Registry: set with eviction, against cachebox LRU",
        "Registry in Python: read hit, against cachetools LRU",
        "Registry in Python: read hit, against cachetools LRU + RLock",
        "Registry(ttl) in Python: read hit, against cachetools TTL",
        "Registry in Python: set with eviction, against cachetools LRU",
        "Registry in Python: set with eviction, of objects, against cachetools LRU",
        "Registry: its ratio to a dict",
        "Registry in Python: its ratio to a dict",
        "Registry: slowest operation",
        "- without the sets at which a plain dict stalls too",
        "Registry in Python: slowest operation",
        "- without the sets at which a plain dict stalls too",
        "Registry: beyond a dict's own",
        "Registry in Python: beyond a dict's own",
        "Registry(ttl): 400 entries expire at once",
        "- with the janitor at work",
        "Registry(ttl) in Python: 400 entries expire at once",
        "- with the janitor at work",
        "Registry: get or create, Zipf, against cachebox LRU",
        "Registry: 4 threads together",
        "Registry in Python: 4 threads together",
        "reading an attribute: decorated",
    ],
    "pools": [
        "lease() and release(), against SQLAlchemy QueuePool",
        "lease() and release(), against a bare deque-and-lock hand-off",
        "with, against SQLAlchemy QueuePool",
        "with, against a bare deque-and-lock hand-off",
        "await lease() and release(), against psycopg_pool",
        "async with, against psycopg_pool",
        "Pool: longest wait, 4 threads on 2 resources, a moment each",
        "- in the calmer rounds",
        "Pool: longest wait, 4 threads on 2 resources, 64 KiB hashed each",
        "- in the calmer rounds",
    ],
    "sessions": [
        "one callback, against ExitStack with one",
        "managed_session(), opening a resource, against ExitStack with one callback",
        "managed_session(factory), against ExitStack with one callback",
    ],
    "stores": [
        "rehydrating it from the store, against a sqlite3 read of it",
        "the same of one saved whole, against a sqlite3 read of it",
        "WriteBehind: written for append, one at a time, to 20 messages of 205 bytes",
        "Registry(store): written for append, one at a time, to 20 messages of 205 bytes",
        "WriteBehind: written for append, one at a time, to 20 messages of 48 bytes",
        "Registry(store): written for append, one at a time, to 20 messages of 48 bytes",
        "100 messages in batches of 50, against sqlite3 with a commit a batch",
        "- and a save for each batch",
        "enqueue, beyond encoding: append to one conversation",
        "enqueue, beyond encoding: append to 20 conversations",
        "enqueue, beyond encoding: put of 20 values",
        "flush of 20 messages of 250 bytes: flush after a loop",
        "flush of 20 messages of 250 bytes: flush of what nobody has read",
    ],
    "memory": [
        "a reading of the resident memory",
        "sizeof: largest error, 30 made-up conversations",
        "sizeof: largest error, real conversations",
        "sizeof of dicts, against pympler.asizeof",
        "sizeof of dicts of very different lengths, against pympler.asizeof",
        "sizeof of dicts after a long prompt, against pympler.asizeof",
        "sizeof of objects with slots, against pympler.asizeof",
        "sizeof of texts, against pympler.asizeof",
        "sizeof of tool calls, against pympler.asizeof",
        "sizeof of real messages, against pympler.asizeof",
        "watch_growth, 900 objects: slowest slice",
        "watch_growth, 900 objects: at the default interval, of one core",
    ],
    "soak": [
        "with hygiene: growth of the resident memory",
        "users whose messages are not in the store",
        "- not there when a flush had acknowledged them",
        "messages after another one than the last",
        "sessions not closed",
        "resources of a pool not closed",
        "values of a registry not closed",
        "cleanups and hooks that failed",
        "the janitor's thread, of one core",
        "conversations in memory after a turn",
        "- at the end of a night",
    ],
}
COMPILED = ("Registry:", "Registry(ttl):")  # what is measured of the compiled kernel, where it was built
UNMEASURED = ("not all of it is installed", "only Linux counts them", "the real messages are not at hand")


def promises(suite: str) -> list[str]:
    """What was promised of *suite*, as far as this installation has it."""
    if suite != "registries" or hygiene.compiled:
        return PROMISES[suite]
    found, here = [], True
    for start in PROMISES[suite]:
        if not start.startswith("- "):  # which goes with the line above it
            here = not start.startswith(COMPILED)
        if here:
            found.append(start)
    return found


@pytest.fixture
def benchmarks(project_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The package, which is beside the library and not installed with it."""
    monkeypatch.syspath_prepend(str(project_root))
    import benchmarks.__main__  # noqa: PLC0415 - not on the path before
    import benchmarks.memory  # noqa: PLC0415
    import benchmarks.pools  # noqa: PLC0415
    import benchmarks.registries  # noqa: PLC0415
    import benchmarks.sessions  # noqa: PLC0415
    import benchmarks.soak  # noqa: PLC0415
    import benchmarks.stores  # noqa: PLC0415

    return benchmarks


@pytest.fixture
def tiny(benchmarks, monkeypatch: pytest.MonkeyPatch):
    """Sizes that take a second, by suite; without the contenders that are measured in processes of their own."""
    contenders = benchmarks.contenders.CONTENDERS
    for name in [name for name, contender in contenders.items() if contender.native]:
        monkeypatch.delitem(contenders, name)
    registries = benchmarks.registries.Sizes(
        rounds=2,
        operations=50,
        small=100,
        large=200,
        single=100,
        repeats=1,
        memory=(100,),
        expiring=400,
        shared=400,
        shared_rounds=1,
        trace_rounds=1,
        trace_requests=200,
    )
    pools = benchmarks.pools.Sizes(
        rounds=2, operations=10, contended_rounds=1, contended=0.01, tasks=20, acquisitions=2, crowd_rounds=1
    )
    sessions = benchmarks.sessions.Sizes(rounds=2, operations=10, async_rounds=2)
    # It takes seconds to import.
    monkeypatch.delitem(benchmarks.stores.MAKERS, "langgraph SqliteSaver")
    # Where nobody waits for a disk: a hundred stores are made.
    if os.access("/dev/shm", os.W_OK):
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    stores = benchmarks.stores.Sizes(
        rounds=2,
        calls=3,
        growing=20,
        growing_rounds=1,
        batches=2,
        batched_rounds=2,
        many=20,
        conversations=5,
        many_rounds=1,
        enqueued=20,
        enqueue_rounds=2,
    )
    memory = benchmarks.memory.Sizes(rounds=2, readings=20, messages=60, conversations=5, lines=3_000, objects=900)
    soak = benchmarks.soak.Sizes(
        seconds=0.6, turn=0.1, day=0.2, night=0.1, idle=0.05, maxsize=20, maxlen=5, threads=2, tasks=3, users=200
    )
    return {
        "registries": registries,
        "pools": pools,
        "sessions": sessions,
        "stores": stores,
        "memory": memory,
        "soak": soak,
    }


def is_rectangular(table: str) -> bool:
    """True if each line of a Markdown table has as many columns as the first."""
    return 1 == len({line.count("|") for line in table.splitlines()})


@pytest.mark.slow
@pytest.mark.parametrize("suite", PROMISES)
def test_every_promise_has_a_row(
    benchmarks, tiny, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promise is measured and printed; the JSON and the Markdown tables, which can be pasted, have the same rows."""
    file = tmp_path / "found.json"
    reports: list[Any] = []
    module = getattr(benchmarks, suite)
    run = module.run
    monkeypatch.setattr(module, "run", lambda *arguments: reports.append(run(*arguments)) or reports[-1])

    code = benchmarks.__main__.main([suite, "--json", str(file)], tiny[suite])

    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    limited = [row for row in rows if row["limit"] is not None and "difference in hits" not in row["what"]]
    assert 0 == code
    assert len(promises(suite)) == len(limited)
    for start, row in zip(promises(suite), limited, strict=True):
        assert row["what"].startswith(start)
        assert row["note"].startswith(UNMEASURED) is (row["value"] is None)
        assert row["what"] in printed
    for table in "\n".join(benchmarks.__main__.markdown(reports[0])).strip().split("\n\n"):
        assert is_rectangular(table)


def test_the_registry_hits_what_an_exact_lru_hits(benchmarks, tiny, real_data: Path) -> None:
    """On the real traces not one hit is lost or won against cachetools' LRU."""
    report = benchmarks.registries.Report()

    benchmarks.registries.traces(tiny["registries"], report)

    differences = [row.value for row in report.rows if "difference in hits" in row.what]
    bodies = len(benchmarks.contenders.REGISTRIES)
    assert [0] * bodies * len(list(real_data.glob("trace_*.txt.gz"))) == differences


def test_both_bodies_are_measured_in_one_run(benchmarks) -> None:
    """The Python kernel is measured beside the compiled one; where that is not built, it is named as absent."""
    contenders = benchmarks.contenders

    bodies = {name: kind.__mro__[1].__module__ for name, kind in contenders.REGISTRIES.items()}

    assert "hygiene.kernel.pure" == bodies["Registry in Python"]
    assert hygiene.Registry in contenders.REGISTRIES.values()
    assert hygiene.compiled is (bodies.get("Registry") == "hygiene.kernel.compiled")
    assert hygiene.compiled is ("Registry" not in contenders.ABSENT)
    assert {"Registry", "Registry(ttl)", "Registry(idle)", "Registry(on_evict)"} & set(contenders.CONTENDERS) == (
        {"Registry", "Registry(ttl)", "Registry(idle)", "Registry(on_evict)"} if hygiene.compiled else set()
    )


@pytest.mark.slow
def test_a_second_copy_of_the_library_leaves_no_trace(benchmarks) -> None:
    """Who imports the benchmarks has the library as before, and an environment that is as it was."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "hygiene"}
    environment = dict(os.environ)
    log = logging.getLogger("hygiene")
    heard = [*log.handlers, *log.filters]

    kind = benchmarks.contenders._in_python()

    after = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "hygiene"}
    assert kind is not hygiene.Registry
    assert before == after
    assert environment == dict(os.environ)
    assert heard == [*log.handlers, *log.filters]


def test_arrays_outside_python_are_counted(benchmarks) -> None:
    """What the compiled kernel has from the C library, where tracemalloc does not look, is asked of itself."""
    if not hygiene.compiled:
        pytest.skip("the compiled kernel is not built")
    contenders, entries = benchmarks.contenders, 1000

    def beside(name: str, **limits: int) -> int:
        registry = contenders.REGISTRIES[name](dict.fromkeys(range(entries)), **limits)
        return contenders.CONTENDERS[name].beside(registry)

    plain, timed = beside("Registry"), beside("Registry", ttl=60, idle=60)
    assert 40 * entries <= plain
    assert 2 * 16 * entries <= timed - plain
    assert 0 == beside("Registry in Python", ttl=60, idle=60)


def test_markdown_prints_two_tables(
    benchmarks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `--markdown` prints can be pasted into the documentation unchanged."""
    report = benchmarks.registries.Report(ratios={"read": {"dict": 1.0, "Registry": 1.1}, "write": {"dict": 1.0}})
    report.rows.append(benchmarks.registries.Row("read", 1.1, "x", 1.5))
    monkeypatch.setattr(benchmarks.registries, "run", lambda *_: report)

    benchmarks.__main__.main(["registries", "--markdown"])

    rows, times = capsys.readouterr().out.strip().split("\n\n")
    assert "| read | 1.10 x | at most 1.5 |" in rows
    assert is_rectangular(rows)
    assert is_rectangular(times)


def test_a_contender_that_is_absent_is_named(benchmarks) -> None:
    """A missing package is said, and is no error."""
    report = benchmarks.registries.Report(ratios={"read": {"dict": 1.0}}, absent={"theine": "not there"})

    text = list(benchmarks.__main__.text(report))
    table = list(benchmarks.__main__.markdown(report))

    assert "\nnot measured: theine (not there)" in text
    assert "| theine | not installed |" in table


def test_a_suite_that_does_not_exist_is_refused(benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names what there is."""
    with pytest.raises(SystemExit) as caught:
        benchmarks.__main__.main(["queues"])

    assert 2 == caught.value.code
    printed = capsys.readouterr().err
    for suite in PROMISES:
        assert suite in printed


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(0.5, False, True), (1.5, False, False), (0.5, True, False), (1.0, True, True)]
)
def test_a_limit_is_met_from_its_own_side(benchmarks, value: float, at_least: bool, met: bool) -> None:
    """Times have an upper limit, rates a lower one; the limit itself is met."""
    row = benchmarks.registries.Row("what", value, "x", 1.0, at_least=at_least)

    assert met is row.met


def test_a_package_that_is_not_there_leaves_its_contenders_out(benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be imported, or does not get through one acquisition, is named with the reason."""
    pools = benchmarks.pools
    absent: dict[str, str] = {}
    monkeypatch.setattr(pools, "ABSENT", absent)
    broken = pools.Contender(lambda size: object(), pools.with_acquire, None)

    def missing():
        raise ModuleNotFoundError("No module named 'nowhere'")

    assert {} == pools._try(missing, "nowhere", pools._trial)
    assert {} == pools._try(lambda: {"broken": broken}, "broken", pools._trial)
    assert "ModuleNotFoundError: No module named 'nowhere'" == absent["nowhere"]
    assert absent["broken"].startswith("AttributeError")
    assert pools.against({"a": [1.0]}, "a", "nowhere", "what", 0.3).value is None


def test_the_first_wait_of_a_thread_counts_too(benchmarks) -> None:
    """A thread that others starve has waited since the first resource came free."""
    pools = benchmarks.pools
    pool = pools.HandOff(pools.FEW)

    _, waits = pools.contended(pools.contend, pool.borrow, pools.count_up, 0.0)

    assert pools.THREADS == len(waits)
    assert sorted(waits) == waits
    assert min(waits) > 0


def test_a_pool_that_serves_more_than_it_has_is_found_out(benchmarks) -> None:
    """Who gives one resource to two has no time worth comparing."""
    pools = benchmarks.pools

    with pytest.raises(pools.Crowded, match="hold 2 resources"):
        pools.contended(pools.contend, contextlib.nullcontext, pools.count_up, 0.0)


def test_the_permille_is_what_all_but_one_in_a_thousand_keep_to(benchmarks) -> None:
    """Of few values it is the largest."""
    permille = benchmarks.pools.permille

    assert 999 == permille(range(1, 1001))
    assert 1998 == permille(range(1, 2001))
    assert 3 == permille([1, 2, 3])
    assert 1 == permille([1])


def test_a_wait_by_hand_is_served_in_order(benchmarks) -> None:
    """What our pools are measured against is fair, or the comparison would not be."""

    async def wait_in_line(pool, name: str, served: list[str]) -> None:
        resource = await pool.acquire()
        served.append(name)
        pool.release(resource)

    async def main() -> list[str]:
        pool = benchmarks.pools.AsyncHandOff(1)
        served: list[str] = []
        resource = await pool.acquire()
        tasks = [asyncio.create_task(wait_in_line(pool, name, served)) for name in "abc"]
        await asyncio.sleep(0)
        pool.release(resource)
        async with pool.borrow():
            served.append("the releaser")
        await asyncio.gather(*tasks)
        return served

    assert ["a", "b", "c", "the releaser"] == asyncio.run(main())


@pytest.fixture
def bench(benchmarks, monkeypatch: pytest.MonkeyPatch):
    """Our store and the standard library's, and what can be added to them; and who is absent."""
    stores = benchmarks.stores
    monkeypatch.setattr(stores, "Server", _no_server)
    monkeypatch.setattr(stores, "MAKERS", {name: stores.MAKERS[name] for name in (stores.RAW, stores.OURS)})
    return stores


def _no_server(folder):
    raise FileNotFoundError("the program redis-server is not there")


def test_a_program_that_is_not_there_is_named(bench) -> None:
    """Without a Redis server both that need it are absent, and the others are measured."""
    absent: dict[str, str] = {}

    with contextlib.closing(bench.Bench(absent)) as made:
        assert [bench.RAW, bench.OURS] == list(made.makers)

    reason = "FileNotFoundError: the program redis-server is not there"
    assert {"redis-py": reason, "WriteBehind on Redis": reason} == absent
    assert not made.folder.exists()


def test_a_store_that_gives_back_something_else_is_left_out(bench) -> None:
    """Its time would not be worth comparing."""

    class Forgetful(bench.Raw):
        def get(self, key):
            return super().get(key)[1:]

    absent: dict[str, str] = {}
    bench.MAKERS["forgetful"] = Forgetful

    with contextlib.closing(bench.Bench(absent)) as made:
        assert "forgetful" not in made.makers

    assert "LookupError: it gives back something else than was put" == absent["forgetful"]


def test_a_message_has_the_size_that_is_said(benchmarks) -> None:
    """What is written is held against that."""
    stores = benchmarks.stores

    assert stores.ITEMS * stores.LONG == stores.payload(stores.conversation(stores.ITEMS, stores.LONG))
    assert 7 * stores.SHORT == stores.payload(stores.conversation(7, stores.SHORT))


def test_bytes_are_counted_as_often_as_they_are_written(benchmarks, tmp_path: Path) -> None:
    """A page that is written twice counts twice, whether or not it has reached the disk in between."""
    stores = benchmarks.stores
    if not stores.COUNTED.exists():
        pytest.skip("only Linux counts them")
    page = b"x" * 100_000

    before = stores.written()
    for _ in range(2):
        (tmp_path / "page").write_bytes(page)

    assert 2 * len(page) <= stores.written() - before < 3 * len(page)


@pytest.mark.parametrize("suite", ["sessions", "stores"])
def test_only_a_soak_takes_as_long_as_it_is_told(benchmarks, suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another suite does not pretend to listen."""
    with pytest.raises(SystemExit) as caught:
        benchmarks.__main__.main([suite, "--minutes", "3"])

    assert 2 == caught.value.code
    assert f"--minutes and --chart are for soak; {suite} takes as long as it takes" in capsys.readouterr().err


def test_a_soak_of_no_time_is_refused(benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    """There would be nothing to tell."""
    with pytest.raises(SystemExit):
        benchmarks.__main__.main(["soak", "--minutes", "0"])

    assert "--minutes must be positive; found 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_soak_loses_nothing_and_draws_both_curves(
    benchmarks, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However small it is, nothing is lost, and the same messages go to both."""
    found, picture = tmp_path / "found.json", tmp_path / "soak.svg"

    benchmarks.__main__.main(["soak", "--json", str(found), "--chart", str(picture)], tiny["soak"])

    found = json.loads(found.read_text())
    rows = {row["what"]: row["value"] for row in found["rows"]}
    ours, plain = (found["curves"][name] for name in (benchmarks.soak.OURS, benchmarks.soak.PLAIN))
    picture = picture.read_text()
    assert 0 < rows["messages"] == ours[-1][1]
    assert [messages for _, messages, _ in ours] == [messages for _, messages, _ in plain]
    for what, value in rows.items():
        if what.startswith(("users", "- not there", "messages after", "sessions", "resources", "values", "cleanups")):
            assert 0 == value, what
    assert "<script" not in picture
    assert picture.count('class="line') == 2  # the curves, and no others


def _samples(soak, sizes: list[int], messages: int = 10):
    return [soak.Sample(float(i), (messages,), rss, 0, 0, 0, 0.0, float(i)) for i, rss in enumerate(sizes)]


def test_growth_is_that_of_the_last_half(benchmarks) -> None:
    """What a program needs to get going is no leak, and neither is a reading that stands out."""
    soak = benchmarks.soak
    warm = _samples(soak, [index * 1000 for index in range(50)] + [50_000] * 30 + [90_000] + [50_000] * 19)

    found = soak.growth(warm)

    assert 0 == found.bytes
    assert 50_000 == found.level
    assert 49 * 10 == found.messages


def test_growth_that_goes_on_is_all_of_it(benchmarks) -> None:
    """A hundred bytes a message are found as a hundred bytes a message."""
    soak = benchmarks.soak

    found = soak.growth(_samples(soak, [1_000_000 + index * 1000 for index in range(100)]))

    assert 100 == pytest.approx(found.bytes / found.messages)
    assert found.sure > 3


def test_a_percentile_is_right_to_within_a_step(benchmarks) -> None:
    """Of a thousand messages, of which ten take a second, the 99th percentile is a microsecond."""
    soak = benchmarks.soak
    actor = soak.Actor(0, soak.Sizes(users=10))
    step = 2 ** (1 / soak.STEPS)
    for nanoseconds, times in ((1_000, 990), (10**9, 10)):
        actor.latencies[int(soak.STEPS * math.log2(nanoseconds))] += times

    assert 1_000 / step < soak.percentile(actor.latencies, 0.99) < 1_000 * step
    assert 10**9 / step < soak.percentile(actor.latencies, 0.999) < 10**9 * step


def test_what_is_closed_twice_or_in_two_hands_is_found_out(benchmarks) -> None:
    """Numbers that come out even hide nothing."""
    soak = benchmarks.soak
    tally = soak.Tally()
    twice, never = soak.Counted(tally), soak.Resource(tally)
    twice.close()
    twice.close()
    never.take()
    never.take()

    assert (2, 1, 2) == (tally.opened, tally.closed, tally.faults)


def test_an_actor_misses_the_message_before(benchmarks) -> None:
    """A conversation that comes back without its last message is wrong, and so is one that begins anew."""
    soak = benchmarks.soak
    actor = soak.Actor(0, soak.Sizes(users=10))
    message = {"number": 2}

    actor.check([{"number": 0}, {"number": 1}], message)
    right = actor.wrong
    actor.check([{"number": 0}], message)
    actor.check([], message)

    assert 0 == right
    assert 2 == actor.wrong


@pytest.mark.parametrize(
    ("kept", "lost"), [([[1, 2], [0]], 0), ([[1], [0]], 1), ([[2, 1], [0]], 1), ([[0, 1, 2], [0]], 1), ([[1, 2]], 1)]
)
def test_the_file_is_held_against_what_was_written(
    benchmarks, tmp_path: Path, kept: list[list[int]], lost: int
) -> None:
    """One message that is not there, or not in its place, is a user who has lost something."""
    soak = benchmarks.soak
    actor = soak.Actor(3, soak.Sizes(users=10))
    actor.known, actor.written[0], actor.written[1] = 2, 3, 1

    with SQLiteStore(tmp_path / "soak.db") as store:
        for index, numbers in enumerate(kept):
            items = [store.encode({"number": number}) for number in numbers]
            store.save([SaveLog("conversations", actor.key(index), append=items)])

        assert lost == soak.lost_in(store, [actor], 2)


def test_the_same_is_written_without_hygiene(benchmarks, tmp_path: Path) -> None:
    """Who is told how many messages each has had writes those, in the same conversations."""
    soak = benchmarks.soak
    sizes = soak.Sizes(threads=2, tasks=2, users=50)
    worlds = [soak.Plain(sizes, tmp_path) for _ in range(2)]
    for world, orders in zip(worlds, ([(30, 0, 50, 7)], [(10, 0, 50, 0), (20, 0, 0, 7)]), strict=True):
        assert list(orders) == [world.turn(order).done for order in orders]

    first, second = (world.conversations for world in worlds)
    endings = [world.end() for world in worlds]

    assert 87 == sum(map(len, first.values()))
    assert first == second
    assert [0, 0] == [ending.counts["wrong"] for ending in endings]


def test_a_process_that_needs_too_much_gets_no_more(benchmarks) -> None:
    """The machine is worth more than the end of a curve."""
    soak = benchmarks.soak
    asked = []
    sizes = soak.Sizes(seconds=0.05, day=60.0, ceiling=1_000)

    def answer(name: str, size: int, order):
        asked.append(name)
        return soak.Sample(1.0, (5,), size, 1, 5, 0, 0.0)

    found = soak.Soak(samples={soak.OURS: [], soak.PLAIN: []})
    soak.play(sizes, found, {soak.OURS: partial(answer, soak.OURS, 1), soak.PLAIN: partial(answer, soak.PLAIN, 1_001)})

    assert [soak.OURS, soak.PLAIN, soak.OURS] == asked[:3]
    assert 1 == asked.count(soak.PLAIN)
    assert 1 == len(found.samples[soak.PLAIN])


def test_a_process_that_dies_is_no_silence(benchmarks) -> None:
    """It is said at once, and not after a time of patience."""
    soak = benchmarks.soak
    with contextlib.closing(soak.Apart("with hygiene", soak.Plain, soak.Sizes(users=10), None)) as world:
        world._process.kill()

        with pytest.raises(RuntimeError, match="the process with hygiene has ended"):
            world.ask(0.0)
