"""A registry with a store, and processes: killed, stopped, forked, several at once. What was acknowledged is there."""

from __future__ import annotations

import inspect
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from hygiene import Registry
from hygiene.errors import VersionConflict
from hygiene.stores import SQLiteStore
from hygiene.writebehind import Rejected, WriteBehind

PATIENCE = 40.0

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

Start = Callable[..., "subprocess.Popen[str]"]
InChild = Callable[[Callable[[], object]], int]


def said(process: subprocess.Popen[str]) -> str:
    """The next line that *process* prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def stored(path: Path, space: str) -> dict[Any, Any]:
    """What is in a space of the file, once everybody has closed it."""
    with SQLiteStore(path) as store:
        assert store.report.clean, store.report
        return dict(store.items(space))


# Forks a process that chats in six conversations, of which two may be in memory, reads what it acknowledges, and kills
# it after a random number of acknowledgements and a random while. The next one goes on with what it finds.
KILLER = """
import os, random, select, sys
from hygiene import Registry
from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

path, rounds = sys.argv[1], int(sys.argv[2])
chance = random.Random(int(sys.argv[3]))
KEYS = range(6)

def write(pipe):
    store = SQLiteStore(path, check=False)
    writer = WriteBehind(store, every=7, interval=0.002, space="chats", critical=lambda key, item: item[1] % 13 == 12)
    chats = Registry(maxsize=2, store=writer)
    counts = Registry(maxsize=2, store=store, name="counts")
    while True:
        for _ in range(chance.choice([1, 1, 3, 20])):
            key = chance.choice(KEYS)
            chat = chats.setdefault(key, [])
            n = len(chat)
            chat.append([key, n])
            if n % 13 == 12:
                os.write(pipe, b"%d %d 0\\n" % (key, n + 1))  # a critical item alone
            counts.setdefault(key, {"n": 0})["n"] = n + 1  # in place: nobody is told
        chats.flush()
        counts.flush()
        acknowledged = [(key, len(chats.get(key, ())), counts.get(key, {"n": 0})["n"]) for key in KEYS]
        os.write(pipe, b"".join(b"%d %d %d\\n" % one for one in acknowledged))

known, counted = dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, 0)
for round in range(rounds):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        chance.seed(sys.argv[3] + str(round))
        os.close(reading)
        write(writing)
    os.close(writing)
    text = b""
    for _ in range(chance.randrange(8)):
        text += os.read(reading, 256)
    select.select([], [], [], chance.random() * 0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    while data := os.read(reading, 65536):
        text += data
    os.close(reading)
    for line in text.splitlines():
        key, number, count = map(int, line.split())
        known[key], counted[key] = max(known[key], number), max(counted[key], count)
    with SQLiteStore(path) as store:
        assert store.report.clean, store.report
        chats = Registry(maxsize=2, store=store, name="chats")
        counts = Registry(maxsize=2, store=store, name="counts")
        for key in KEYS:
            chat = chats.get(key, [])
            assert chat == [[key, n] for n in range(len(chat))], ("a gap, twice, or out of order", key, chat)
            assert known[key] <= len(chat), (key, known, len(chat))
            count = counts.get(key, {"n": 0})["n"]
            assert counted[key] <= count, (key, counted, count)
        chats.close()
        counts.close()
print("survived", rounds, sum(known.values()) > 0)
"""


@pytest.mark.slow
@needs_fork
def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path, elsewhere: Start) -> None:
    """
    60 times at random moments: what was there at a flush, or critical, is there.

    Each conversation in order, without a gap and nothing twice, while entries leave and come back all the time.
    """
    seed = random.randrange(2**16)
    processes = [elsewhere(KILLER, tmp_path / f"{n}.db", 20, f"{seed}{n}") for n in range(3)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]

    assert ["survived 20 True\n"] * 3 == outputs


# Each does it as a user would: read, add, put, acknowledge; and again if somebody else was faster.
COUNTER = """
import sys
from hygiene import Registry
from hygiene.errors import VersionConflict
from hygiene.stores import SQLiteStore

with SQLiteStore(sys.argv[1], timeout=40, check=False) as store:
    numbers = Registry(maxsize=4, store=store, name="numbers")
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(sys.argv[2])):
        while True:
            try:
                numbers["n"] = numbers.get("n", 0) + 1
                numbers.flush()
            except VersionConflict:
                continue
            break
    numbers.close()
"""

# The same in place: a record that is changed under a lease.
IN_PLACE = COUNTER.replace(
    """                numbers["n"] = numbers.get("n", 0) + 1
                numbers.flush()
""",
    """                with numbers.lease("n", create=lambda: {"n": 0}) as record:
                    record["n"] += 1
                numbers.flush()
""",
)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "times", "expected"), [(COUNTER, 500, 2000), (IN_PLACE, 100, {"n": 400})])
def test_four_processes_that_count_together_lose_nothing(
    path: Path, elsewhere: Start, code: str, times: int, expected: object
) -> None:
    """Each with a registry of its own: who was too late is told, reads again, and adds to what it finds."""
    processes = [elsewhere(code, path, times) for _ in range(4)]
    for process in processes:
        assert "ready" == said(process)
    for process in processes:
        tell(process, "go")
    codes = [(process.communicate(timeout=PATIENCE), process.returncode)[1] for process in processes]

    assert [0] * 4 == codes
    assert {"n": expected} == stored(path, "numbers")


# The same with conversations, in each way that there is to write one, while they leave and come back.
TALKER = """
import random, sys
from hygiene import Registry
from hygiene.errors import VersionConflict
from hygiene.stores import SQLiteStore

path, me = sys.argv[1], int(sys.argv[2])
chance = random.Random(sys.argv[3])
with SQLiteStore(path, timeout=40, check=False) as store:
    chats = Registry(maxsize=2, store=store, name="chats")
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(60):
        key, item = chance.randrange(4), [me, n]
        while True:
            try:
                way = chance.randrange(5)
                if way == 0:
                    chats.setdefault(key, []).append(item)
                elif way == 1:
                    with chats.lease(key, create=list) as chat:
                        chat += [item]
                elif way == 2:
                    chat = chats.setdefault(key, [])
                    chat.insert(chance.randrange(len(chat) + 1), item)
                elif way == 3:
                    chats[key] = [*chats.get(key, []), item]
                else:
                    chats[key] = [*chats.pop(key, []), item]
                chat = None
                if chance.random() < 0.3:
                    chats.trim(chance.randrange(2))
                chats.flush()
            except VersionConflict:
                continue
            break
    chats.close()
"""


@pytest.mark.slow
def test_four_processes_in_the_same_conversations_lose_no_message(path: Path, elsewhere: Start) -> None:
    """Whichever way they write: each message is there once, if who was too late does it again."""
    seed = random.randrange(2**16)
    processes = [elsewhere(TALKER, path, n, f"{seed}{n}") for n in range(4)]
    for process in processes:
        assert "ready" == said(process)
    for process in processes:
        tell(process, "go")
    codes = [(process.communicate(timeout=PATIENCE), process.returncode)[1] for process in processes]

    assert [0] * 4 == codes
    content = stored(path, "chats")
    assert [[me, n] for me in range(4) for n in range(60)] == sorted(item for chat in content.values() for item in chat)


# Does what it is told, one expression a line.
OTHER = """
import sys
from hygiene import Registry
from hygiene.errors import VersionConflict

with Registry(maxsize=9, store="sqlite:" + sys.argv[1], name="chats") as chats:
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            print(repr(eval(line)), flush=True)
        except VersionConflict:
            print("conflict", flush=True)
"""


@pytest.mark.slow
def test_two_processes_on_one_space_never_overwrite_each_other(path: Path, elsewhere: Start) -> None:
    """
    Who is too late is told, once; then it finds what the other has saved, and goes on from there.

    For a conversation, a value that was put and one that was changed in place, for an entry that both have made, and
    for one that the other has removed.
    """
    with Registry[str, Any](maxsize=9, store=f"sqlite:{path}", name="chats") as chats:
        chats["log"], chats["put"], chats["place"], chats["gone"] = ["one"], 1, {"n": 1}, ["one"]
        chats.flush()
        other = elsewhere(OTHER, path)
        assert "ready" == said(other)

        def there(code: str) -> str:
            tell(other, code)
            return said(other)

        assert "None" == there("chats['log'].append('theirs')")
        assert "None" == there("chats.get('put') and chats.update(put=2)")
        assert "None" == there("chats['place'].update(n=2)")
        assert "['one']" == there("chats.pop('gone')")
        assert "None" == there("chats.setdefault('both', []).append('theirs')")
        ours = dict(chats)
        assert "both" not in chats  # they have not saved it yet
        held = chats.setdefault("both", [])
        assert "None" == there("chats.flush()")

        for key, change in {
            "both": lambda: chats["both"].append("ours"),
            "log": lambda: chats["log"].append("ours"),
            "put": lambda: chats.update(put=3),
            "place": lambda: chats["place"].update(n=3),
            "gone": lambda: chats["gone"].append("ours"),
        }.items():
            change()
            with pytest.raises(VersionConflict, match=f"'{key}' was rejected.*Look it up again") as caught:
                chats.flush()
            assert [key] == [conflict[1] for conflict in caught.value.conflicts]
            chats.flush()

        assert ["log", "put", "place", "gone"] == list(ours)
        assert [] == list(chats)
        with pytest.raises(VersionConflict, match="out of date"):
            held.append("in vain")
        assert {"log": ["one", "theirs"], "put": 2, "place": {"n": 2}, "both": ["theirs"]} == {
            key: chats[key] for key in ("log", "put", "place", "both")
        }
        assert "gone" not in chats

        chats["log"].append("ours")
        chats["put"] = 3
        chats["place"]["n"] = 3
        chats.setdefault("gone", []).append("ours")
        chats.flush()

        # Now the other one is too late, and goes on, too.
        assert "None" == there("chats['log'].append('late')")
        assert "conflict" == there("chats.flush()")
        assert "['one', 'theirs', 'ours']" == there("chats['log']")
        assert "None" == there("chats['log'].append('theirs again')")
        assert "None" == there("chats.flush()")
        other.communicate(timeout=PATIENCE)
    assert 0 == other.returncode
    assert {
        "log": ["one", "theirs", "ours", "theirs again"],
        "put": 3,
        "place": {"n": 3},
        "both": ["theirs"],
        "gone": ["ours"],
    } == stored(path, "chats")


@pytest.mark.slow
def test_a_conflict_found_in_the_background_is_told_at_the_next_look_up(path: Path, elsewhere: Start) -> None:
    """Once, to whoever asks first; the next one gets what is stored."""
    with Registry[str, Any](maxsize=1, store=f"sqlite:{path}", name="chats") as chats:
        chats["log"] = ["one"]
        chats.flush()
        other = elsewhere(OTHER, path)
        assert "ready" == said(other)
        tell(other, "chats['log'].append('theirs')")
        tell(other, "chats.flush()")
        assert ["None", "None"] == [said(other), said(other)]

        chats["log"].append("ours")
        chats["another"] = 1  # the first one is to leave, so it is saved

        with pytest.raises(VersionConflict, match="'log' was rejected"):
            chats["log"]
        assert ["one", "theirs"] == chats["log"]


def test_who_is_told_of_a_conflict_at_once_is_not_told_again(path: Path) -> None:
    """A critical item and a flush say it themselves, so the next look-up gets what is stored."""
    with SQLiteStore(path) as here, SQLiteStore(path) as there:
        writer = WriteBehind(here, space="chats", critical=lambda key, value: value == "critical")
        chats: Registry[str, Any] = Registry(maxsize=4, store=writer)
        theirs: Registry[str, Any] = Registry(maxsize=4, store=there, name="chats")
        for how in ("critical", "flush"):
            chats[how] = "saved"
            chats.flush()
            theirs[how] = "theirs"
            theirs.flush()
            with pytest.raises(VersionConflict, match=f"'{how}' was rejected"):  # noqa: PT012 - either of the two
                chats[how] = how
                chats.flush()

            assert "theirs" == chats[how]
            chats.flush()
        chats.close()
        theirs.close()
        writer.close()


def test_a_flush_tells_of_every_conflict_at_once(path: Path) -> None:
    """The error lists them, so that who retries knows what was saved and what was not; each look-up names its own."""
    with SQLiteStore(path) as here, SQLiteStore(path) as there:
        chats: Registry[str, Any] = Registry(maxsize=9, store=here, name="chats")
        theirs: Registry[str, Any] = Registry(maxsize=9, store=there, name="chats")
        for key in "abcd":
            chats[key] = 1
        chats.flush()
        assert 1 == theirs["a"] == theirs["b"]
        theirs["a"], theirs["b"] = 2, 2
        del theirs["c"]
        theirs.flush()
        for key in "abcd":
            chats[key] = 3
        with pytest.raises(VersionConflict) as caught:
            chats.flush()

        assert {("a", 1, 2), ("b", 1, 2), ("c", 1, 0)} == {conflict[1:] for conflict in caught.value.conflicts}
        assert (2, 2, 3) == (chats["a"], chats["b"], chats["d"])
        assert "c" not in chats
        chats.flush()

        theirs["a"], theirs["b"] = 4, 4
        theirs.flush()
        chats["a"], chats["b"] = 5, 5
        chats.trim(0)  # in the background, as it were
        for key in "ab":
            with pytest.raises(VersionConflict, match=f"^'{key}' was rejected: version 2 .* found version 3: somebody"):
                chats[key]
            assert 4 == chats[key]
        chats.close()
        theirs.close()


def test_what_is_handed_to_on_conflict_is_out_of_memory(path: Path) -> None:
    """The next look-up gets what is stored, or what the hook has put in its place; nothing is overwritten later."""
    taken: list[Any] = []

    def merge(one: Rejected) -> None:
        taken.append(one.key)
        if one.key == "merged":
            record = here.load("chats", one.key)
            assert record is not None
            chats["merged"] = [*record.value, "ours"]

    with SQLiteStore(path) as here, SQLiteStore(path) as there:
        writer = WriteBehind(here, space="chats", on_conflict=merge)
        chats: Registry[str, Any] = Registry(maxsize=9, store=writer)
        theirs: Registry[str, Any] = Registry(maxsize=9, store=there, name="chats")
        for key in ("log", "merged"):
            chats[key] = ["one"]
        chats["value"] = {"n": 1}
        chats.flush()
        for key in ("log", "merged"):
            theirs[key].append("theirs")
        theirs["value"]["n"] = 2
        theirs.flush()
        held = chats["log"]
        for key in ("log", "merged"):
            chats[key].append("ours")
        chats["value"]["n"] = 3
        chats.flush()

        assert {"log", "merged", "value"} == set(taken)
        with pytest.raises(VersionConflict, match="out of date"):
            held.append("in vain")
        assert (["one", "theirs"], {"n": 2}) == (chats["log"], chats["value"])
        assert ["one", "theirs", "ours"] == chats["merged"]

        chats["log"].append("again")
        chats["merged"].append("again")
        chats["value"]["m"] = 4
        chats.close()
        theirs.close()
        writer.close()
    assert {
        "log": ["one", "theirs", "again"],
        "merged": ["one", "theirs", "ours", "again"],
        "value": {"n": 2, "m": 4},
    } == stored(path, "chats")


async def test_aflush_tells_of_a_conflict_once(path: Path) -> None:
    with SQLiteStore(path) as here, SQLiteStore(path) as there:
        chats: Registry[str, Any] = Registry(maxsize=4, store=here, name="chats")
        theirs: Registry[str, Any] = Registry(maxsize=4, store=there, name="chats")
        chats["a"] = ["one"]
        await chats.aflush()
        theirs["a"].append("theirs")
        await theirs.aflush()
        chats["a"].append("ours")
        with pytest.raises(VersionConflict, match="'a' was rejected"):
            await chats.aflush()

        assert ["one", "theirs"] == chats["a"]
        await chats.aflush()
        await chats.aclose()
        await theirs.aclose()


# A fork with an open store.


@pytest.fixture
def no_save_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unsaved stays so, however slow the machine is."""
    monkeypatch.setitem(inspect.unwrap(WriteBehind.__init__).__kwdefaults__, "interval", 3600.0)


@needs_fork
def test_a_forked_child_goes_on_with_the_registry(path: Path, in_child: InChild) -> None:
    """It has what was in memory, loads what was not, saves what it changes; the parent is told if it was too late."""
    with Registry[Any, Any](maxsize=2, store=f"sqlite:{path}", name="chats") as chats:
        for n in range(5):
            chats[n] = [n]
        chats.flush()

        def child() -> None:
            assert [[n] for n in range(5)] == [chats[n] for n in range(5)]
            chats[4].append("child")
            chats["child"] = {"n": 1}
            del chats[0]
            chats.close()

        assert 0 == in_child(child)
        assert {"n": 1} == chats["child"]
        assert 0 not in chats
        chats[3].append("parent")
        chats.flush()
    assert {1: [1], 2: [2], 3: [3, "parent"], 4: [4, "child"], "child": {"n": 1}} == stored(path, "chats")


@pytest.mark.usefixtures("no_save_by_the_clock")
@needs_fork
def test_what_was_unsaved_at_a_fork_is_saved_once(path: Path, in_child: InChild) -> None:
    """By the parent. A child that changes it, too, and saves first, has the parent told."""
    with Registry[Any, Any](maxsize=9, store=f"sqlite:{path}", name="chats") as chats:
        chats.setdefault("log", []).append("before")
        chats.setdefault("both", []).append("before")

        def child() -> None:
            chats.flush()
            assert [] == list(chats._keeper.store.keys("chats"))  # type: ignore[union-attr] # nothing is pending here
            chats["both"].append("child")
            chats.close()

        assert 0 == in_child(child)
        chats["log"].append("after")
        chats["both"].append("parent")
        with pytest.raises(VersionConflict, match="'both' was rejected"):
            chats.flush()

        assert ["before", "child"] == chats["both"]
    assert {"log": ["before", "after"], "both": ["before", "child"]} == stored(path, "chats")


@needs_fork
def test_what_was_changed_in_place_before_a_fork_is_the_parents(path: Path, in_child: InChild) -> None:
    """A child that flushes and closes, as a worker does at its end, saves nothing that it has not changed itself."""
    with Registry[Any, Any](maxsize=9, store=f"sqlite:{path}", name="chats") as chats:
        chats["parent"], chats["child"] = {"n": 1}, {"n": 1}
        chats.flush()
        chats["parent"]["n"] = 2

        def child() -> None:
            chats["child"]["n"] = 2
            chats.close()

        assert 0 == in_child(child)
        chats["parent"]["m"] = 3
        chats.flush()
    assert {"parent": {"n": 2, "m": 3}, "child": {"n": 2}} == stored(path, "chats")


@pytest.mark.usefixtures("no_save_by_the_clock")
@needs_fork
@pytest.mark.parametrize("change", ["edit", "trim", "append", "insert"])
def test_a_child_saves_the_whole_of_what_it_has(path: Path, change: str, in_child: InChild) -> None:
    """What it changes then is in the store as in its memory, although the parent had not saved its own changes yet."""
    with Registry[Any, Any](maxsize=9, store=f"sqlite:{path}", name="chats") as chats:
        chats["log"] = [1, 2, 3]
        chats.flush()
        {
            "edit": lambda log: log.__setitem__(1, "edited"),
            "trim": lambda log: log.__delitem__(0),
            "append": lambda log: log.append(4),
            "insert": lambda log: log.insert(1, "new"),
        }[change](chats["log"])
        expected = [*chats["log"], "child", "again"]

        def child() -> None:
            chats["log"].append("child")
            chats.flush()
            chats["log"].append("again")
            chats.close()

        assert 0 == in_child(child)
        with pytest.raises(VersionConflict, match="'log' was rejected"):
            chats.flush()

        assert expected == chats["log"]
    assert {"log": expected} == stored(path, "chats")


@pytest.mark.slow
@needs_fork
def test_a_fork_while_threads_load_and_save_leaves_no_lock_held(path: Path, in_child: InChild) -> None:
    """The child has none of these threads, and uses the registry all the same; the parent notices nothing."""
    with Registry[Any, Any](maxsize=2, store=f"sqlite:{path}", name="chats") as chats:
        stop, problems = threading.Event(), []

        def work(mine: int) -> None:
            try:
                n = 0
                while not stop.is_set():
                    chats.setdefault((mine, n % 5), []).append(n)
                    n += 1
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                problems.append(error)

        def child(number: int) -> None:
            mine = f"child {number}"
            for n in range(3):
                chats.setdefault((mine, n), []).append(n)
            chats.flush()
            assert [[n] for n in range(3)] == [chats[mine, n] for n in range(3)]

        threads = [threading.Thread(target=work, args=(mine,)) for mine in range(3)]
        for thread in threads:
            thread.start()
        codes = [in_child(lambda number=number: child(number)) for number in range(8)]  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)

        assert ([], [0] * 8) == (problems, codes)
    content = stored(path, "chats")
    assert [[n] for n in range(3)] * 8 == [content[f"child {number}", n] for number in range(8) for n in range(3)]
    for mine in range(3):
        chat = sorted(n for k in range(5) for n in content.get((mine, k), []))
        assert list(range(len(chat))) == chat


# A server that is told to stop.

SERVER = """
import socket, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from hygiene import bounded_registry
from hygiene.cleanup import install_signal_handlers
from hygiene.integrations.asgi import lifespan

path, how = sys.argv[1:]

@bounded_registry("chats", maxsize=3, idle="2h", store="sqlite:" + path)
class Bot:
    def __init__(self):
        self.chats = {}

bot = Bot()

async def say(request):
    user, number = request.path_params["user"], request.path_params["number"]
    bot.chats.setdefault(user, []).append(number)
    if how == "flush":
        await bot.chats.aflush()
    return JSONResponse(len(bot.chats[user]))

if how == "handlers":
    install_signal_handlers()
options = {"lifespan": lifespan()} if how == "lifespan" else {}
app = Starlette(routes=[Route("/{user}/{number:int}", say, methods=["POST"])], **options)
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.run(app, fd=listening.fileno(), log_level="critical")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("how", "signum", "code"),
    [
        ("lifespan", signal.SIGTERM, -signal.SIGTERM),  # uvicorn sends it on to itself in the end
        ("handlers", signal.SIGTERM, 128 + signal.SIGTERM),
        ("flush", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_what_a_server_has_answered_is_saved_when_it_is_stopped(
    path: Path, elsewhere: Start, how: str, signum: signal.Signals, code: int
) -> None:
    """In the middle of requests by many; killed the hard way, what it had flushed before it answered."""
    server = elsewhere(SERVER, path, how)
    url = f"http://127.0.0.1:{said(server)}"
    answered: dict[str, list[int]] = {f"user{n}": [] for n in range(6)}
    enough = threading.Semaphore(0)

    def chat(user: str) -> None:
        number = 0
        with httpx.Client(timeout=PATIENCE, transport=httpx.HTTPTransport(retries=3)) as client:
            while True:
                try:
                    answer = client.post(f"{url}/{user}/{number}")
                except httpx.TransportError:
                    return
                if answer.status_code != 200:
                    return
                answered[user].append(number)
                number += 1
                enough.release()

    threads = [threading.Thread(target=chat, args=(user,)) for user in answered]
    for thread in threads:
        thread.start()
    for _ in range(150 + random.randrange(50)):
        assert enough.acquire(timeout=PATIENCE)
    server.send_signal(signum)
    for thread in threads:
        thread.join(PATIENCE)
    server.communicate(timeout=PATIENCE)

    assert code == server.returncode
    content = stored(path, "Bot.chats")
    for user, numbers in answered.items():
        chat_of_user = content.get(user, [])
        assert list(range(len(chat_of_user))) == chat_of_user
        assert len(numbers) <= len(chat_of_user)
