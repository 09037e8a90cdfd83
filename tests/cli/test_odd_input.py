"""Wrong files, odd terminals and hostile names: one clear line, no traceback, nothing raw on the terminal."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hygiene as package
from hygiene import Registry
from hygiene.cli import contents, logs
from hygiene.cli.logs import Log

pytestmark = pytest.mark.once

HOSTILE = "ann\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x7f"
USERS = [{"user": f"u{n % 3}", "text": "hello", "ts": 60 * n} for n in range(30)]


def control_characters(text):
    return sorted({one for one in text if (ord(one) < 32 and one != "\n") or 127 <= ord(one) < 160 or one == "\u202e"})


def write_log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def in_terminal():
    """Runs the command in a process of its own, as a shell does; returns the exit code, its output and its errors."""

    def run(*arguments, **options):
        done = subprocess.run(
            [sys.executable, "-m", "hygiene", *map(str, arguments)],
            stderr=subprocess.PIPE,
            check=False,
            timeout=50,
            **{"stdout": subprocess.PIPE, **options},
        )
        return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()

    return run


@pytest.fixture
def hostile_store(tmp_path):
    path = tmp_path / "chats.db"
    with Registry(maxsize=10, store=f"sqlite:{path}", name=HOSTILE) as chats:
        chats[HOSTILE] = ["hello"]
        chats["x" * 50 + HOSTILE] = {"a": 1}
    return path


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_inspect_prints_no_control_character_of_a_store(hygiene, hostile_store, arguments):
    code, out, err = hygiene("inspect", hostile_store, *arguments)

    assert (0, []) == (code, control_characters(out + err))
    assert "\\x1b]0;owned" in out or "\\u001b]0;owned" in out


def test_json_says_the_same_with_its_control_characters_escaped(hygiene, hostile_store):
    _, out, _ = hygiene("inspect", hostile_store, "--json")

    assert HOSTILE in {entry["space"] for entry in json.loads(out)["entries"]}


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_size_prints_no_control_character_of_a_log(hygiene, tmp_path, arguments):
    """Neither of a broken line, nor of the file's name."""
    path = write_log(tmp_path / f"log{HOSTILE}.jsonl", [*USERS, {"user": [HOSTILE]}, {HOSTILE: 1}])

    code, out, err = hygiene("size", path, *arguments)

    assert (0, []) == (code, control_characters(out + err))


def test_an_error_prints_no_control_character_of_a_file_name(hygiene, tmp_path):
    code, out, err = hygiene("size", tmp_path / HOSTILE)

    assert (2, []) == (code, control_characters(out + err))


def test_replay_prints_no_control_character_of_a_log(hygiene, tmp_path):
    path = write_log(tmp_path / f"log{HOSTILE}.jsonl", [*USERS, {"user": [HOSTILE]}])

    code, out, err = hygiene("replay", path)

    assert (0, []) == (code, control_characters(out + err))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"user,text\nann,hello\nbob,hi\n", "a table with comma-separated columns"),
        (b"user\ttext\nann\thello\n", "a table with tab-separated columns"),
        (b"a;b\nc;d\n", "a table with semicolon-separated columns"),
        (b"Dear reader, this is\nno log of messages\nbut a letter\n", "a text with several words in a line"),
        (b'127.0.0.1 - - [1/Jan/2026] "GET /"\n', "a text with several words in a line"),
        (bytes(range(256)), "a binary file"),
        (b"import os\n\n\nprint(os.name)\n", "No key occurs twice in the 4 lines of"),
        (b"hello\n", "No key occurs twice in the 1 line of"),
        (b"", "is empty"),
    ],
)
def test_size_recommends_nothing_for_a_file_that_is_no_log(hygiene, tmp_path, content, expected):
    """Recommending maxsize=1 for a letter would be worse than an error."""
    (tmp_path / "file").write_bytes(content)

    code, out, err = hygiene("size", tmp_path / "file")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert expected in err


@pytest.mark.parametrize("command", ["size", "replay", "inspect"])
def test_a_folder_gets_one_line(hygiene, tmp_path, command):
    code, out, err = hygiene(command, tmp_path)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert "older" in err or "directory" in err


@pytest.mark.parametrize("content", [b"print('hello')\n", b"x" * 5_000, b"", b"SQLite"])
def test_inspect_does_not_advise_to_delete_a_file_that_is_no_store(hygiene, tmp_path, content):
    """A person may have named any file: a program, or a photograph."""
    path = tmp_path / "bot.py"
    path.write_bytes(content)

    code, _, err = hygiene("inspect", path)

    assert (2, 1) == (code, err.count("\n"))
    assert "is not a store" in err
    assert "delete" not in err
    assert content == path.read_bytes()


def test_a_program_is_not_advised_to_delete_a_short_file_that_is_no_database(tmp_path):
    (tmp_path / "bot.py").write_text("print('hello')\n")

    with pytest.raises(package.StoreError) as caught:
        Registry(maxsize=1, store=f"sqlite:{tmp_path}/bot.py")

    assert "is not a SQLite database" in str(caught.value)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_line_that_is_too_long_is_skipped(tmp_path, monkeypatch, compressed):
    """A small compressed file may hold gigabytes in one line; what follows is read."""
    monkeypatch.setattr(logs, "LONGEST_LINE", 1_000)
    lines = [json.dumps({"user": "a", "text": "x" * size}) + "\n" for size in (10, 5_000, 20, 974, 975)]
    assert [1_000, 1_001] == [len(line) for line in lines[3:]]
    content = "".join(lines).encode()
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(content) if compressed else content)

    log = Log(path)
    read = [len(message.text) for message in log]

    assert ([10, 20, 974], 5) == (read, log.lines)
    assert [2, 5] == [one.line for one in log.first_skipped]


@pytest.mark.slow
def test_a_line_of_a_gigabyte_does_not_take_the_memory(tmp_path, in_terminal):
    path = tmp_path / "log.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"user": "u", "text": "x"}\n{"user": "u", "text": "y"}\n{"user": "u", "text": "')
        for _ in range(100):
            file.write(b"a" * 10_000_000)
    most = 700 << 20

    code, out, err = in_terminal("size", path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)))

    assert (0, True) == (code, "2 accesses, 1 key" in out)
    assert "line 3: longer than 16 MiB" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["size", "--version", "inspect"])
def test_a_full_disk_is_one_line(tmp_path, in_terminal, command):
    """``hygiene size log > /dev/full``: the output is lost, which is said, and the exit code is not 0."""
    with Registry(maxsize=10, store=f"sqlite:{tmp_path}/chats.db", name="chats") as chats:
        chats["ann"] = ["hello"]
    file = {"size": write_log(tmp_path / "log", USERS), "inspect": tmp_path / "chats.db"}.get(command)
    with Path("/dev/full").open("wb") as full:
        code, _, err = in_terminal(command, *([file] if file else []), stdout=full)

    assert (1, "hygiene: error: cannot write the output: No space left on device.\n") == (code, err)


@pytest.mark.slow
def test_a_pipe_that_is_closed_early_ends_quietly(tmp_path, in_terminal):
    """``hygiene size log | head -1``."""
    read, written = os.pipe()
    os.close(read)
    code, _, err = in_terminal("size", write_log(tmp_path / "log", USERS), stdout=written)
    os.close(written)

    assert (1, "") == (code, err)


@pytest.mark.slow
def test_a_narrow_ascii_terminal_gets_all_of_it(tmp_path, in_terminal):
    """Forty columns, and an encoding without box-drawing characters."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "PYTHONUTF8": "0"}
    path = write_log(tmp_path / "lög.jsonl", [*USERS, {"user": None}])
    for command in ("size", "replay"):
        code, out, err = in_terminal(command, path, env=environment)

        assert 0 == code
        assert (out + err).isascii()
        assert "Traceback" not in err
        if command == "size":
            assert 40 >= max(map(len, out.partition("from hygiene")[0].splitlines()))


def test_version_names_the_kernel(hygiene):
    code, out, err = hygiene("--version")

    kernel = "compiled kernel" if package.compiled else "kernel in Python"
    assert (0, "") == (code, err)
    assert out.startswith(f"hygiene {package.__version__} ({kernel}, Python ")


def test_numbers_are_for_people(hygiene, tmp_path):
    """One access is no "1 accesses"."""
    code, out, _ = hygiene("size", write_log(tmp_path / "log", [{"user": "a"}, {"user": "a"}]))

    assert 0 == code
    assert "2 accesses, 1 key: at best 50.0% can hit" in out
    assert "with at most 1 entry," in out


def test_a_store_is_named_by_path_or_address(hostile_store):
    """A file in the current folder, or an address: both are opened."""
    with contents.opened(str(hostile_store)), contents.opened(f"sqlite:{hostile_store}"):
        pass
