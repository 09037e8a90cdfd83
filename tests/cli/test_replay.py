"""A replay counts what an independent model counts, and shows it so that a person can read it."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter, OrderedDict
from datetime import date
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from xml.etree import ElementTree as ET

import msgspec
import psutil
import pytest

from hygiene.cli import app as commands
from hygiene.cli import kill as killing
from hygiene.cli import main
from hygiene.cli import replay as replaying
from hygiene.cli.html import page
from hygiene.cli.kill import Killed, kill
from hygiene.cli.ledger import SPACE, Ledger, place
from hygiene.cli.logs import InputError
from hygiene.cli.replay import Job, Outcome, compare, replay, work
from hygiene.cli.traffic import Traffic
from hygiene.stores import Delete, SaveLog, SaveValue, open_store

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent.parent


def model(messages, maxsize, idle=None):
    """What a bounded bot does, in twenty lines that know nothing of it: an LRU as one writes it by hand."""
    last_use: OrderedDict[object, float] = OrderedDict()
    hits = most = 0
    evictions: Counter[str] = Counter()
    now = 0.0
    for user, when in messages:
        now = max(now, when)
        while idle is not None and last_use and now - next(iter(last_use.values())) >= idle:
            last_use.popitem(last=False)
            evictions["idle"] += 1
        hits += user in last_use
        last_use[user] = now
        last_use.move_to_end(user)
        if len(last_use) > maxsize:
            last_use.popitem(last=False)
            evictions["size"] += 1
        most = max(most, len(last_use))
    return hits, len(last_use), most, dict(evictions)


def counted(run):
    assert run.messages == run.hits + run.misses

    return run.hits, run.held, run.max_held, run.evictions


@pytest.fixture
def chat(tmp_path):
    """A log of 3,000 messages by 200 users with pauses, and its (user, seconds) pairs."""
    random = Random(3)
    path, pairs, now = tmp_path / "chat.jsonl", [], 0.0
    with path.open("w") as out:
        for _ in range(3_000):
            now += random.choice([1, 1, 1, 20, 20, 900])
            user = f"u{int(random.paretovariate(0.6)) % 200}"
            pairs.append((user, now))
            out.write(json.dumps({"user": user, "ts": now, "text": "x" * random.randrange(200)}) + "\n")
    return path, pairs


@pytest.fixture
def address(tmp_path):
    """A store that is not there yet."""
    return f"sqlite:{tmp_path / 'chats.db'}"


@pytest.fixture
def here(monkeypatch):
    """Lets both bots work in this process, which is faster."""
    monkeypatch.setattr(replaying, "replay", lambda job, *rest: work(job))


def said(path):
    """What each user of a log said, in order."""
    texts: dict[object, list[str]] = {}
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as log:
        for line in log:
            record = msgspec.json.decode(line)
            texts.setdefault(record["user"], []).append(record["text"])
    return texts


def check_memory(expected, run):
    """
    Memory holds what it holds without a store.

    Exactly: the bot's own thread waits until what has to leave is saved, so that nobody else evicts beside it.
    """
    hits, held, most, evictions = expected
    assert (hits, held, most, evictions) == (run.hits, run.held, run.max_held, run.evictions)


def stored(address):
    with open_store(address) as store:
        return dict(store.items(SPACE))


@pytest.mark.parametrize(("maxsize", "idle"), [(10, None), (50, 1_800.0), (5, 600.0), (1, 20.0), (1_000, 3_600.0)])
def test_bounded_counts_equal_the_model(chat, maxsize, idle):
    """Hits, conversations held and evictions by cause are those of an LRU written by hand."""
    path, pairs = chat
    expected = model(pairs, maxsize, idle)
    # The end of the log is the model's end too: what is over by then has left.
    run = work(Job(path=str(path), maxsize=maxsize, idle=idle)).run

    assert expected == counted(run)


def test_the_plain_bot_keeps_everyone(chat):
    """As it is, the bot misses each user once and drops nothing."""
    path, pairs = chat
    users = len({user for user, _ in pairs})

    run = work(Job(path=str(path))).run

    assert (len(pairs) - users, users, users, {}) == counted(run)


@pytest.mark.slow
def test_both_bots_run_in_processes_of_their_own(chat):
    """The comparison of two processes is that of two bots in this one."""
    path, pairs = chat
    told = []

    comparison = compare(Job(path=str(path), maxsize=20, idle=600.0, history=5), lambda *news: told.append(news))

    assert model(pairs, 20, 600.0) == counted(comparison.bounded)
    assert len({user for user, _ in pairs}) == comparison.plain.held
    assert (3_000, 0, 0) == (comparison.messages, comparison.skipped, comparison.out_of_order)
    for run in (comparison.plain, comparison.bounded):
        assert 0 < run.start_rss <= run.peak_rss
        assert run.final_rss <= run.peak_rss
        assert (0, 3_000) == (run.curve[0].messages, run.curve[-1].messages)


@pytest.mark.slow
def test_history_bounds_each_conversation(tmp_path):
    """With --history a conversation holds the last messages only, as far as the bot's own code goes."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"user": "ann", "text": "x" * 2_000 + str(n)}) + "\n" for n in range(15_000)))
    whole, trimmed = (replay(Job(path=str(path), maxsize=5, history=history)).run for history in (None, 2))

    # 30 MB of text against none to speak of: half of it is a wide margin.
    assert whole.peak_rss - trimmed.peak_rss > 15_000_000


@pytest.mark.slow
def test_the_demo_grows_as_it_is_and_not_bounded():
    """The demo makes its point: the plain bot's memory grows severalfold, the bounded one's stays."""
    comparison = compare(commands.DEMO)
    plain, bounded = comparison.plain, comparison.bounded

    assert model([(user, when) for user, when, _ in Traffic()], 500, 8 * 3_600.0) == counted(bounded)
    assert {"size", "idle"} == set(bounded.evictions)
    assert plain.peak_rss - plain.start_rss > 3 * (bounded.peak_rss - bounded.start_rss)
    assert plain.held > 10 * bounded.max_held


def test_the_demo_makes_the_same_traffic_each_time():
    """Two people who run the demo see the same counts."""
    first, second = Traffic(500), Traffic(500)

    assert list(first) == list(second)
    assert (500, 1.0) == (first.messages, first.progress)
    assert list(first) != list(Traffic(500, seed=1))


def test_a_long_run_keeps_an_even_curve(chat, monkeypatch):
    """However long the log, the curve has a few hundred points at even distances and both ends."""
    monkeypatch.setattr(replaying, "_BATCH", 2)
    monkeypatch.setattr(replaying, "_SAMPLES", 40)
    path, _ = chat

    curve = work(Job(path=str(path))).run.curve
    steps = [right.messages - left.messages for left, right in pairwise(curve)]

    assert 20 <= len(curve) <= 41
    assert 1 == len(set(steps[:-1]))
    assert 3_000 == curve[-1].messages


def test_progress_is_told(chat, monkeypatch):
    """The progress grows towards one."""
    monkeypatch.setattr(replaying, "_PROGRESS_EVERY", 0.0)
    path, _ = chat
    told = []

    replaying.work(Job(path=str(path)), told.append)

    assert sorted(told) == told
    assert 0 < told[0] <= told[-1] == 1.0


@pytest.mark.slow
def test_an_error_in_the_log_comes_out_of_the_process(tmp_path):
    """What a worker finds wrong with the log is raised here as what it is."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"who": 1}')

    with pytest.raises(InputError, match="wanted messages with the field 'user'"):
        replay(Job(path=str(path)))


def test_an_interrupted_replay_leaves_no_process_behind(chat, monkeypatch):
    """Whoever stops a replay, the process that did the work is ended with it."""
    path, _ = chat
    monkeypatch.setattr(replaying, "_BOOT", "import time; print('{}', flush=True); time.sleep(600)")
    before = psutil.Process().children()  # the servers of other tests
    started = []

    def interrupt(progress):
        started.extend(child for child in psutil.Process().children() if child not in before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(Job(path=str(path)), interrupt)

    assert 1 == len(started)
    assert not started[0].is_running()


def test_a_worker_that_is_killed_is_told(chat, monkeypatch):
    """A process that ends without an answer is reported with how and where, not waited for."""
    path, _ = chat
    monkeypatch.setattr(replaying, "_BOOT", "import os; os.kill(os.getpid(), 9)")

    with pytest.raises(InputError, match="its process was ended by signal 9 after 0% of it"):
        replay(Job(path=str(path)))


@pytest.mark.slow
def test_a_log_that_grows_meanwhile_is_refused(chat, monkeypatch):
    """A comparison of different messages would compare nothing."""
    path, _ = chat
    original = replay

    def replay_and_write(job: Job, *rest: object) -> Outcome:
        outcome = original(job)
        with path.open("a") as log:
            log.write('{"user": "late", "ts": 9e9}\n')
        return outcome

    monkeypatch.setattr(replaying, "replay", replay_and_write)
    with pytest.raises(InputError, match=r"found 3,000 messages first and 3,001 then .* Replay a copy"):
        compare(Job(path=str(path), maxsize=5))


def test_a_comparison_needs_a_bound():
    """Two unbounded bots are not a comparison."""
    with pytest.raises(ValueError, match="needs a bounded bot"):
        compare(Job(path=None))


@pytest.mark.slow
@pytest.mark.parametrize("timed", [True, False])
def test_the_page_is_whole_and_for_a_phone(chat, timed):
    """The page fits a phone, loads nothing, runs nothing, and holds both curves and the table."""
    path, _ = chat
    comparison = compare(Job(path=str(path), maxsize=20, idle=7_200.0 if timed else None, history=9))
    comparison = msgspec.structs.replace(comparison, has_time=timed)

    html = page(comparison, commands._rows(comparison), "<chat>.jsonl", ["What it <means>."])

    assert "<p>What it &lt;means&gt;.</p>" in html

    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html
    assert "at most 20 conversations, at most 9 messages in each" in html
    assert timed == ("none unused for 2h" in html)
    assert "&lt;chat&gt;.jsonl" in html
    assert "<td>20</td>" in html
    for outside in ("<script", "<link", "<img", "<?xml", "src=", "href=", "@import", "url(", "//fonts"):
        assert outside not in html
    pictures = [part.partition("</svg>")[0] + "</svg>" for part in html.split("<svg ")[1:]]
    curves = [ET.fromstring("<svg " + picture).iter("{http://www.w3.org/2000/svg}path") for picture in pictures]
    assert [2, 2] == [sum("reactive" in line.get("class", "") for line in lines) for lines in curves]


@pytest.mark.slow
def test_the_table_shows_both_bots(chat, capsys, monkeypatch):
    """The table names every number of both bots, and the line to copy stands below it."""
    monkeypatch.setenv("COLUMNS", "80")
    path, pairs = chat
    comparison = compare(Job(path=str(path), maxsize=5, idle=600.0, history=8))
    hits, _, _, evictions = model(pairs, 5, 600.0)

    commands._show(comparison, as_json=False, html=None, source="chat.jsonl")
    out = capsys.readouterr().out

    cells = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    rows = {name: bounded for _, name, _, bounded, _ in cells}
    assert f"{hits:,}" == rows["hits"]
    assert f"{evictions['idle']:,}" == rows["left: idle too long"]
    assert f"{evictions['size']:,}" == rows["left: beyond maxsize"]
    assert (
        "  from functools import partial\n"
        "  from hygiene import History, bounded_registry\n\n"
        '  @bounded_registry("conversations", maxsize=5, idle="10m", values=partial(History, maxlen=8))\n'
    ) in out
    assert max(len(line) for line in out.splitlines() if "@" not in line) <= 80


@pytest.mark.slow
def test_real_traffic_equals_the_model(real_data):
    """On 221,056 real messages the bounded bot counts what the model counts, and never holds more than asked."""
    path = real_data / "irc_messages.jsonl.gz"
    with gzip.open(path) as log:
        records = [msgspec.json.decode(line) for line in log]
    days = {day: 86_400.0 * date.fromisoformat(day).toordinal() for day in {record["day"] for record in records}}
    pairs = [(record["user"], days[record["day"]] + 60.0 * record["minute"]) for record in records]
    expected = model(pairs, 500, 7_200.0)
    expected_without_idle = model(pairs, 500)

    comparison = compare(Job(path=str(path), maxsize=500, idle=7_200.0))
    without_idle = work(Job(path=str(path), maxsize=500)).run

    assert expected == counted(comparison.bounded)
    assert expected_without_idle == counted(without_idle)
    assert (221_056, 17_777) == (comparison.plain.messages, comparison.plain.held)
    assert 500 >= comparison.bounded.max_held
    assert comparison.bounded.peak_rss < comparison.plain.peak_rss


# With a store


@pytest.mark.slow
@pytest.mark.parametrize(("maxsize", "idle"), [(10, None), (50, 1_800.0), (1, 20.0), (1_000, None)])
def test_every_message_is_in_the_store_in_order(chat, address, here, maxsize, idle):
    """With a store nothing is lost, and memory holds what it would hold without."""
    path, pairs = chat
    texts = said(path)
    expected = model(pairs, maxsize, idle)

    comparison = compare(Job(path=str(path), maxsize=maxsize, idle=idle, store=address))
    kept, run = comparison.kept, comparison.bounded

    assert texts == stored(address)
    check_memory(expected, run)
    # Whoever is not new and not held comes back from the store, and nobody else does.
    assert run.misses - len(texts) == run.rehydrated == kept.rehydrated
    assert (address, 3_000, len(texts), 0, 0) == (
        kept.address,
        kept.messages,
        kept.users,
        kept.messages_before,
        kept.returned,
    )
    assert kept.saved >= 3_000 > kept.saves > 0
    assert kept.size == Path(address.partition(":")[2]).stat().st_size
    assert kept.sentence == f"3,000 messages of {len(texts)} users are in the store, in order."
    assert (0, 0, 0) == (comparison.plain.rehydrated, comparison.plain.saved, comparison.plain.saves)


@pytest.mark.slow
def test_a_second_replay_goes_on_where_the_first_has_ended(chat, address):
    """The same messages again stand behind the first ones, and every conversation comes back."""
    path, pairs = chat
    texts = said(path)
    first = compare(Job(path=str(path), maxsize=20, store=address)).bounded

    second = compare(Job(path=str(path), maxsize=20, store=address))

    assert {user: own * 2 for user, own in texts.items()} == stored(address)
    check_memory(model(pairs, 20), second.bounded)
    assert first.misses == first.rehydrated + len(texts)
    assert second.bounded.misses == second.bounded.rehydrated
    assert (3_000, 3_000, len(texts)) == (second.kept.messages, second.kept.messages_before, second.kept.returned)
    assert second.kept.sentence == (
        f"3,000 messages of {len(texts)} users are in the store, in order, behind 3,000 that were there before; "
        f"{len(texts)} conversations of then came back."
    )


@pytest.mark.slow
def test_a_store_keeps_as_many_messages_as_history_says(chat, tmp_path, address, here):
    """With --history, what a conversation drops leaves the store, too; who says nothing keeps what he had."""
    path, _ = chat
    texts = said(path)
    compare(Job(path=str(path), maxsize=20, store=address))
    late = tmp_path / "late.jsonl"
    late.write_text(
        json.dumps({"user": "u1", "text": "late"}) + "\n" + json.dumps({"user": "new", "text": "hi"}) + "\n"
    )

    kept = compare(Job(path=str(late), maxsize=20, history=5, store=address)).kept

    assert {**texts, "u1": [*texts["u1"][-4:], "late"], "new": ["hi"]} == stored(address)
    assert kept.sentence == (
        "the last 5 messages each of 2 users are in the store, in order, behind 3,000 that were there before; "
        "1 conversations of then came back."
    )


def test_users_with_numbers_for_names_are_kept_apart(tmp_path, address, here):
    """A user 1 and a user "1" are two, in the store as in memory."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"user": user, "text": f"{user!r}"}) + "\n" for user in (1, "1", 2, 1, "1", 3)))

    compare(Job(path=str(path), maxsize=1, store=address))

    assert {1: ["1", "1"], "1": ["'1'", "'1'"], 2: ["2"], 3: ["3"]} == stored(address)


def _append(store, key, text):
    store.save([SaveLog(SPACE, key, append=[store.encode(text)])])


@pytest.mark.slow
@pytest.mark.parametrize(
    "meddle",
    [
        lambda store: store.save([Delete(SPACE, "u1")]),
        lambda store: _append(store, "u1", "more"),
        lambda store: _append(store, "stranger", "hello"),
        lambda store: store.save([SaveLog(SPACE, "u1", drop=[(1, 2)])]),
        lambda store: store.save([SaveLog(SPACE, "u1", put={0: store.encode("what nobody has said")})]),
    ],
    ids=["deleted", "appended", "strange", "gap", "edited"],
)
def test_what_is_not_as_it_was_said_is_found(chat, address, meddle, monkeypatch):
    """The store is read back and compared: a message too few, too many or changed is an error that names where."""
    path, _ = chat

    def work_and_meddle(job: Job, *rest: object) -> Outcome:
        outcome = work(job)
        if job.store is not None:
            with open_store(job.store) as store:
                meddle(store)
        return outcome

    monkeypatch.setattr(replaying, "replay", work_and_meddle)
    with pytest.raises(InputError, match=r"found 1 conversations that differ, the first of them '(u1|stranger)'"):
        compare(Job(path=str(path), maxsize=20, store=address))


def test_the_ledger_tells_order():
    """The same messages in another order are not the same conversation."""
    with open_store("sqlite::memory:") as store:
        ledger = Ledger(store)
        for text in ("one", "two"):
            ledger.add("ann", text)
        missing = ledger.differences(store)
        for text in ("two", "one"):
            _append(store, "ann", text)
        turned = ledger.differences(store)
        store.save([SaveLog(SPACE, "ann", append=[store.encode(text) for text in ("one", "two")], replace=True)])
        same = ledger.differences(store)

    assert (["ann"], ["ann"], []) == (missing, turned, same)


def told(capsys, *arguments):
    """Exit code and standard error of the command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("sqlite::memory:", "wanted a store that other processes see, found 'sqlite::memory:'"),
        ("chats.db", "a store wants an address such as sqlite:chats.db; found 'chats.db'"),
        ("sqlite:/no/such/folder/chats.db", "wanted a store, found: "),
        ("redis://me:secret@127.0.0.1:1/0", "wanted a store, found: "),
    ],
)
def test_a_store_that_cannot_be_used_is_told_at_once(chat, capsys, address, problem):
    """A wrong address is found before any work, in one sentence, without the password in it."""
    path, _ = chat

    code, err = told(capsys, "replay", path, "--store", address)

    assert 2 == code
    assert err.startswith("hygiene: ")
    assert problem in err
    assert "secret" not in err
    assert "Traceback" not in err


def test_what_is_not_a_replays_own_is_left_alone(chat, capsys, address):
    """A space that holds something else is refused before anything is written to it."""
    path, _ = chat
    with open_store(address) as store:
        store.save([SaveValue(SPACE, "u1", store.encode({"language": "en"}))])

    code, err = told(capsys, "replay", path, "--store", address)

    assert 2 == code
    assert f"wanted conversations of an earlier replay in the space '{SPACE}', found something else at 'u1'" in err
    assert {"u1": {"language": "en"}} == stored(address)


@pytest.mark.slow
def test_what_the_store_refuses_is_told(tmp_path, capsys, address):
    """A user that no store can name ends the replay with a sentence, not with a traceback."""
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"user": 2**64 + 1, "text": "hi"}) + "\n")

    code, err = told(capsys, "replay", path, "--store", address)

    assert 2 == code
    assert f"hygiene: wanted to keep conversations in {address}, found: " in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_full_disk_is_told(tmp_path, address):
    """A store that cannot grow ends the replay with one sentence that says why."""
    path = tmp_path / "log.jsonl"  # of more messages than may wait to be saved, so that nobody waits for the disk
    path.write_text("".join(json.dumps({"user": n % 50, "text": "hello"}) + "\n" for n in range(12_000)))

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "hygiene", "replay", str(path), "--maxsize", "20", "--store", address]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, preexec_fn=limit_files, cwd=ROOT, check=False
    )

    assert 2 == done.returncode
    assert "" == done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("hygiene: ")]
    assert 1 == len(told)
    assert f"hygiene: wanted to keep conversations in {address}, found: " in told[0]
    assert "Traceback" not in done.stderr


def test_a_password_is_not_shown():
    """What is printed of an address can be shown to anybody."""
    assert "sqlite:chats@home.db" == place("sqlite:chats@home.db")
    assert "redis://host:6379/0" == place("redis://me:p@ss@host:6379/0")
    assert "postgresql://host/db" == place("postgresql://host/db")


@pytest.mark.slow
def test_the_store_is_shown(chat, capsys, address, here, tmp_path, monkeypatch):
    """Table, JSON and page tell what came back, what was saved, and how large it is."""
    monkeypatch.setenv("COLUMNS", "80")
    path, _ = chat
    comparison = compare(Job(path=str(path), maxsize=5, store=address))
    kept = comparison.kept

    commands._show(comparison, as_json=False, html=None, source="chat.jsonl")
    table = capsys.readouterr().out
    commands._show(comparison, as_json=True, html=str(tmp_path / "page.html"), source="chat.jsonl")
    shown = json.loads(capsys.readouterr().out)
    html = (tmp_path / "page.html").read_text()

    cells = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "│" in line]
    rows = {name: bounded for _, name, _, bounded, _ in cells}
    assert f"{kept.rehydrated:,}" == rows["came back from the store"]
    assert f"{kept.saved:,}" == rows["saved to the store"]
    assert f"{kept.saves:,}" == rows["in transactions"]
    assert f"{kept.size / 2**20:.1f} MiB" == rows["size of the store"]
    assert f'  @bounded_registry("conversations", maxsize=5, store="{address}")\n' in table
    assert "Nothing is lost: 3,000 messages of" in " ".join(table.split())
    assert msgspec.to_builtins(kept) == shown["kept"]
    assert f"<p>Nothing is lost: {kept.sentence}</p>" in html
    assert f"and everything in {address}" in html
    assert "any other starts or loads one" in html


@pytest.mark.slow
@pytest.mark.timeout(240)  # 221,056 messages, each saved and read back: under coverage, on a busy machine, minutes
def test_real_traffic_is_kept_whole(real_data, address, tmp_path):
    """All 221,056 real messages are in the store, in order, and a second run finds the conversations again."""
    path = real_data / "irc_messages.jsonl.gz"
    texts = said(path)
    part = tmp_path / "part.jsonl"
    with gzip.open(path) as log:
        part.write_bytes(b"".join(islice(log, 20_000)))
    again = said(part)

    first = compare(Job(path=str(path), maxsize=200, store=address))
    after_first = stored(address)
    second = compare(Job(path=str(part), maxsize=200, store=address))

    assert texts == after_first
    assert {user: own + again.get(user, []) for user, own in texts.items()} == stored(address)
    assert (221_056, 17_777, 0) == (first.kept.messages, first.kept.users, first.kept.returned)
    assert (20_000, 221_056, len(again)) == (second.kept.messages, second.kept.messages_before, second.kept.returned)
    assert 200 == first.bounded.max_held
    assert first.bounded.rehydrated == first.bounded.misses - 17_777
    assert second.bounded.rehydrated == second.bounded.misses


# A bot that is killed


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_the_bot_is_killed():
    """Whatever flush() has returned for is in the store after kill -9, in order; nothing is left behind."""
    before = psutil.Process().children()
    told = []

    killed = kill(told.append)

    assert killed.whole
    assert 1_000 <= killed.acknowledged == killed.found
    assert 0 <= killed.unacknowledged <= killing._FLUSH_EVERY
    assert 0 < killed.users < killed.found
    assert sorted(told) == told
    assert 1.0 == told[-1]
    assert before == psutil.Process().children()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda texts: None, (300, 0, True)),
        (lambda texts: texts.pop(), (299, 0, True)),
        (lambda texts: texts.clear(), (293, 0, True)),
        (lambda texts: texts.reverse(), (300, 0, False)),
        (lambda texts: texts.pop(0), (299, 0, False)),
        (lambda texts: texts.append("from nowhere"), (300, 1, False)),
    ],
    ids=["nothing", "last", "all", "turned", "gap", "strange"],
)
def test_a_loss_would_be_seen(damage, expected):
    """The demo does not say that nothing is lost where something is."""
    stored: dict[object, list[str]] = {}
    for user, _, text in islice(killing._traffic(), 300):
        stored.setdefault(user, []).append(text)
    victim = max(stored, key=lambda user: len(stored[user]))
    assert 7 == len(stored[victim])
    damage(stored[victim])

    killed = killing._compare(300, stored)

    assert expected == (killed.found, killed.unacknowledged, killed.in_order)
    assert (expected == (300, 0, True)) == killed.whole
    assert killed.in_order == ("NOT IN ORDER" not in killed.sentence)


def test_a_bot_that_ends_by_itself_proves_nothing(monkeypatch):
    """If the bot fails before it is killed, that is told."""
    monkeypatch.setattr(replaying, "_BOOT", "print(75); print(150); print(22, end=''); raise SystemExit(3)")

    with pytest.raises(InputError, match=r"it ended by itself after 150, with exit code 3"):
        kill()


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path, monkeypatch):
    """Whoever stops the demo, the bot is ended and its folder removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = psutil.Process().children()

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kill(interrupt)

    assert before == psutil.Process().children()
    assert [] == list(tmp_path.iterdir())


def test_the_demo_without_room_for_files_says_so(tmp_path, monkeypatch):
    """A missing folder for temporary files is something the user can mend."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    with pytest.raises(InputError, match=r"wanted a folder for temporary files, found: .* Set TMPDIR"):
        kill()


@pytest.mark.parametrize("lost", [0, 1])
def test_the_demo_shows_the_kill(capsys, monkeypatch, here, tmp_path, lost):
    """Text, JSON and page tell of it, in 80 columns; if anything were lost, the exit code would say so."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(commands, "DEMO", Job(path=str(tmp_path / "log.jsonl"), maxsize=1))
    (tmp_path / "log.jsonl").write_text('{"user": 1, "text": "hi"}\n' * 20)
    killed = Killed(acknowledged=1_500, found=1_500 - lost, unacknowledged=7, users=9, in_order=True)
    monkeypatch.setattr(commands, "kill", lambda on_progress: killed)

    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    table = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended_again:
        main(["demo", "--json", "--html", str(tmp_path / "page.html")])
    shown = json.loads(capsys.readouterr().out)

    said = f"killed after 1,500 acknowledged messages; {1_500 - lost:,} found, in order, and 7 more that were saved"
    assert said in " ".join(table.split())
    assert max(len(line) for line in table.splitlines() if "@" not in line) <= 80
    assert msgspec.to_builtins(killed) == shown["killed"]
    assert said in (tmp_path / "page.html").read_text()
    assert (lost, lost) == (ended.value.code, ended_again.value.code)
