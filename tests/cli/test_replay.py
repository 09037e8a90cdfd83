"""A replay counts what an independent model counts, and shows it so that a person can read it."""

from __future__ import annotations

import gzip
import json
from collections import Counter, OrderedDict
from datetime import date
from itertools import pairwise
from random import Random
from xml.etree import ElementTree as ET

import msgspec
import psutil
import pytest

from hygiene.cli import app as commands
from hygiene.cli import replay as replaying
from hygiene.cli.html import page
from hygiene.cli.logs import InputError
from hygiene.cli.replay import Job, Outcome, compare, replay, work
from hygiene.cli.traffic import Traffic


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


def test_history_bounds_each_conversation(tmp_path):
    """With --history a conversation holds the last messages only, as far as the bot's own code goes."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"user": "ann", "text": "x" * 2_000 + str(n)}) + "\n" for n in range(15_000)))
    whole, trimmed = (replay(Job(path=str(path), maxsize=5, history=history)).run for history in (None, 2))

    # 30 MB of text against none to speak of: half of it is a wide margin.
    assert whole.peak_rss - trimmed.peak_rss > 15_000_000


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


@pytest.mark.parametrize("timed", [True, False])
def test_the_page_is_whole_and_for_a_phone(chat, timed):
    """The page fits a phone, loads nothing, runs nothing, and holds both curves and the table."""
    path, _ = chat
    comparison = compare(Job(path=str(path), maxsize=20, idle=7_200.0 if timed else None, history=9))
    comparison = msgspec.structs.replace(comparison, has_time=timed)

    html = page(comparison, commands._rows(comparison), "<chat>.jsonl")

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
