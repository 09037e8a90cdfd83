"""The command as it is typed: what it prints where, and with which exit code."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from hygiene.cli import main
from hygiene.cli.app import app

pytestmark = pytest.mark.once


@pytest.fixture
def log(tmp_path):
    """Ten users in turn, a minute apart, with two broken lines among them."""
    path = tmp_path / "chat.jsonl.gz"
    lines = [json.dumps({"user": f"u{n % 10}", "nick": f"n{n % 4}", "ts": 60 * n, "text": "hello"}) for n in range(400)]
    lines[7:7] = ["{broken", '{"text": "nobody"}']
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.mark.slow
def test_replay_prints_a_table_and_names_broken_lines(hygiene, log):
    """The table goes to standard output, what is to be said about the log to standard error."""
    code, out, err = hygiene("replay", log, "--maxsize", 4)

    assert 0 == code
    assert "400 messages: chat.jsonl.gz" in out
    assert "left: beyond maxsize" in out
    assert "2 of 402 lines could not be used and were left out:\n  line 8: not JSON" in err
    assert "  line 9: wanted text or a whole number in the field 'user', which is missing\n" in err


def test_what_is_odd_in_a_log_is_summed_up(hygiene, tmp_path):
    """After five broken lines the rest is a number; messages out of order are counted."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"user": 1, "ts": 50}\n' + "{\n" * 7 + '{"user": 1, "ts": 40}\n')

    code, _, err = hygiene("size", path)

    assert 0 == code
    assert "7 of 9 lines could not be used" in err
    assert "  line 6: " in err
    assert "  line 7: " not in err
    assert "  ... and 2 more\n" in err
    assert "1 message was older than one before and counted as just as late.\n" in err


@pytest.mark.slow
def test_replay_as_json_is_json_alone(hygiene, log):
    """With --json standard output is one object with the counts of both bots."""
    code, out, _ = hygiene("replay", log, "--json", "--maxsize", 4, "--idle", "5m", "--history", 3)
    found = json.loads(out)

    assert 0 == code
    assert (400, 402, 2, [8, 9]) == (
        found["messages"],
        found["lines"],
        found["skipped"],
        [broken["line"] for broken in found["first_skipped"]],
    )
    settings = tuple(found[name] for name in ("log", "key", "maxsize", "idle", "history"))
    assert (str(log), "user", 4, 300.0, 3) == settings
    # Each of ten users in turn finds no room among four. At the end the last four are 0 to 3 minutes old.
    assert (0, 400, 4, 4, {"size": 396}) == tuple(
        found["bounded"][name] for name in ("hits", "misses", "held", "max_held", "evictions")
    )
    assert (390, 10, 10, 10, {}) == tuple(
        found["plain"][name] for name in ("hits", "misses", "held", "max_held", "evictions")
    )


@pytest.mark.slow
def test_another_key_makes_other_conversations(hygiene, log):
    """--key names the field that tells conversations apart."""
    _, out, _ = hygiene("replay", log, "--json", "--key", "nick")

    assert 4 == json.loads(out)["plain"]["held"]


@pytest.mark.slow
def test_replay_writes_the_page(hygiene, log, tmp_path):
    """--html writes one file and says where; --json stays JSON."""
    page = tmp_path / "report.html"

    code, out, err = hygiene("replay", log, "--html", page, "--json")

    assert 0 == code
    assert 400 == json.loads(out)["messages"]
    assert f"Both memory curves: {page}\n" in err
    assert page.read_text().startswith("<!doctype html>")


def test_size_recommends_numbers(hygiene, log):
    """The table, the recommendation, its rule and the line to copy are printed."""
    code, out, err = hygiene("size", log)

    assert 0 == code
    assert "400 accesses, 10 keys: at best 97.5% can hit" in out
    assert 'Recommended: maxsize=10, idle="15m": 97.5% hits' in out
    assert '  @bounded_registry("conversations", maxsize=10, idle="15m")\n' in out
    assert "2 of 402 lines" in err
    assert max(map(len, out.splitlines())) <= 80


def test_size_as_json_is_json_alone(hygiene, log):
    """With --json standard output is one object with every choice."""
    code, out, _ = hygiene("size", log, "--json")
    found = json.loads(out)

    assert 0 == code
    assert (10, 900.0, 390) == tuple(found["recommended"][name] for name in ("maxsize", "idle", "hits"))
    assert {"maxsize": 5, "idle": None, "hits": 0} == {
        name: next(c for c in found["choices"] if c["maxsize"] == 5)[name] for name in ("maxsize", "idle", "hits")
    }


def test_size_reads_traces(hygiene, tmp_path):
    """A trace with one key a line needs no fields, and gets no idle limit."""
    trace = tmp_path / "trace.txt"
    trace.write_text("1\n2\n3\n" * 50)

    code, out, err = hygiene("size", trace)

    assert (0, "") == (code, err)
    assert "The log has no time, so nothing can be said about idle limits." in out
    assert '@bounded_registry("conversations", maxsize=3)' in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "missing.jsonl"], "'missing.jsonl' cannot be opened (No such file or directory). Check the path"),
        (["size", "missing.jsonl"], "'missing.jsonl' cannot be opened"),
        (["replay", "LOG", "--key", "channel"], "Fields there: user, nick, ts, text. Name the one"),
        (["replay", "LOG", "--idle", "5 parsecs"], "--idle must be positive: seconds, a timedelta, or text such as"),
        (["replay", "LOG", "--html", "no/such/page.html"], "cannot be written. Name a file in a folder that exists"),
        (["demo", "--html", "."], "cannot be written"),
        (["size", "LOG", "--key", "channel"], "wanted messages with the field 'channel'"),
    ],
)
def test_what_the_user_can_mend_is_told_in_one_sentence(hygiene, log, tmp_path, monkeypatch, arguments, message):
    """Exit code 2, nothing on standard output, and no traceback."""
    monkeypatch.chdir(tmp_path)

    code, out, err = hygiene(*(log if argument == "LOG" else argument for argument in arguments))

    assert (2, "") == (code, out)
    assert err.startswith(("hygiene: wanted ", "hygiene: --idle must"))
    assert message in err
    assert 1 == err.count("\n")


@pytest.mark.parametrize("arguments", [["--maxsize", "0"], ["--history", "0"], ["--maxsize", "many"], ["--nonsense"]])
def test_a_wrong_option_is_a_usage_error(hygiene, log, arguments):
    """What the option wants is said before anything is read."""
    code, out, err = hygiene("replay", log, *arguments)

    assert (2, "") == (code, out)
    assert arguments[0] in err


@pytest.mark.slow
def test_a_log_without_time_and_an_idle_limit_is_an_error(hygiene, tmp_path):
    """An idle limit needs to know when."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"user": "ann", "text": "hi"}\n')

    code, _, err = hygiene("replay", path, "--idle", "2h")

    assert 2 == code
    assert "wanted messages with a time, because --idle was given" in err
    assert "day and minute, or in one of ts, time, timestamp, date, created_at" in err


def test_help_names_every_command(hygiene):
    """--help shows what there is."""
    code, out, _ = hygiene("--help")

    assert 0 == code
    assert all(command in out for command in ("replay", "size", "demo", "run"))


def test_run_is_there_for_who_mounts_the_app(hygiene):
    """The command run is part of the app, too, and takes its arguments untouched."""
    with pytest.raises(SystemExit) as ended:
        app(["run", "--config", "x.toml", "missing.py", "--help"])

    assert 2 == ended.value.code


@pytest.mark.slow
def test_without_the_extra_one_line_says_what_to_install():
    """Where only the core is installed the command explains itself instead of failing with a traceback."""
    hide = (
        "import sys; sys.modules.update(typer=None, rich=None); sys.path[:0] = {!r};"
        "from hygiene.cli import main; sys.exit(main(['demo']))"
    )

    done = subprocess.run(
        [sys.executable, "-c", hide.format(sys.path)], capture_output=True, text=True, timeout=60, check=False
    )

    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr == (
        "hygiene: the command line needs typer, rich and pygal, found no typer. "
        "Install them: pip install 'hygiene[cli]'\n"
    )


def test_a_bug_of_ours_is_not_taken_for_a_missing_package(monkeypatch):
    """A module of ours that is missing is a fault to see, not something to install."""
    monkeypatch.setitem(sys.modules, "hygiene.cli.app", None)

    with pytest.raises(ModuleNotFoundError, match=r"hygiene\.cli\.app"):
        main(["demo"])
