"""`hygiene watch` is Python that says what grows: the program notices nothing of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

# Grows until the watcher, who is asked as the program's own threads could ask it, has found out.
LEAK = """
    import gc, sys, threading
    from hygiene.memory.growth import GrowthWatch

    class Bot:
        def __init__(self):
            self.chats = {}

    def main(then=None):
        bot = Bot()
        (growth,) = [thing for thing in gc.get_objects() if isinstance(thing, GrowthWatch)]
        pause = threading.Event()
        for _ in range(2000):
            for n in range(20):
                bot.chats[len(bot.chats)] = n
            pause.wait(0.01)
            if any(grower.path.endswith("bot.chats") for grower in growth.growers()):
                growth.close()  # on a busy machine the next reading comes when our variables are gone
                break
        if then:
            then()
        return len(bot.chats)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a module that leaks when its `main` is called."""
    write(tmp_path, "leak.py", LEAK)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def start(folder, *arguments):
    """Starts this interpreter in *folder*, with this checkout on its path."""
    path = os.pathsep.join([*filter(None, sys.path), str(folder)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def watch(folder, *arguments):
    return python(folder, "-m", "hygiene", "watch", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["app.py", "--every", "x"],
        ["--interval", "50ms", "app", "--every", "x"],
        ["--interval=50ms", "--every=1h", "-m", "app", "--every", "x"],
        ["-mapp", "--every", "x"],
        ["--", "package", "--every", "x"],
    ],
)
def test_what_grows_is_told_at_the_end_with_the_line_that_bounds_it(folder, arguments):
    """A script or a module, by its path or its name; its arguments are its own."""
    source = "import leak, sys\nif leak.main() > 50: print(sys.argv[1:], __name__)\nraise SystemExit(7)"
    write(folder, "app.py", source)
    write(folder, "package/__init__.py", "")
    write(folder, "package/__main__.py", source)

    done = watch(folder, *arguments)

    assert ("['--every', 'x'] __main__\n", 7) == (done.stdout, done.returncode)
    assert "hygiene: at the end, " in done.stderr
    assert "main: bot.chats: " in done.stderr
    assert re.search(r'@bounded_registry\("chats", maxsize=\d+\)  # above class Bot\n', done.stderr)


@pytest.mark.slow
def test_what_grows_is_told_in_between(folder):
    """A service has no end: it is told every so often."""
    write(
        folder,
        "app.py",
        """
        import leak, sys
        class Tee:
            def __init__(self, stream): self.stream, self.text = stream, ""
            def write(self, text):
                self.text += text
                self.stream.write(text)
            def flush(self): self.stream.flush()
        tee = sys.stderr = Tee(sys.stderr)
        def wait():
            pause = leak.threading.Event()
            for _ in range(2000):
                if "hygiene: after" in tee.text: break
                pause.wait(0.01)
        leak.main(wait)
        """,
    )

    done = watch(folder, "--interval", "50ms", "--every", "100ms", "app.py")

    assert 0 == done.returncode
    assert "hygiene: after " in done.stderr
    assert "grow" in done.stderr.split("bot.chats")[0]


REPORT = """
    import os, sys
    print(sys.argv, os.path.relpath(sys.path[0] or "."), __name__, __file__ and os.path.basename(__file__), __package__,
          __spec__ and __spec__.name, sys.modules["__main__"].__dict__ is globals(), sorted(globals()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["inner/app.py", "-h"], ["-m", "inner.app", "--", "x"], ["-m", "inner", "a"]])
def test_the_program_sees_what_python_shows_it(folder, arguments):
    """Arguments, path, name and module of the program are those it has without us."""
    for name in ("inner/app.py", "inner/__main__.py"):
        write(folder, name, REPORT)
    write(folder, "inner/__init__.py", "")
    expected = python(folder, *arguments)

    done = watch(folder, *arguments)

    assert (expected.stdout, 0) == (done.stdout, done.returncode)
    assert "__main__" in expected.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('no')", 1),
        ("int('x')", 1),
        ("", 0),
        ("import os; os._exit(9)", 9),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); signal.pause()", -signal.SIGTERM),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_exit_codes_and_signals_pass(folder, source, expected):
    """The program ends as it would without us."""
    write(folder, "app.py", source)
    plain = python(folder, "app.py")

    done = watch(folder, "app.py")

    assert expected == plain.returncode
    assert expected == done.returncode
    assert ("hygiene: at the end, " in done.stderr) == (expected not in {9, -signal.SIGKILL})


@pytest.mark.slow
def test_sigterm_ends_with_a_report(folder):
    """A container that is stopped says what grew, once, before it dies of the signal."""
    write(
        folder,
        "app.py",
        """
        import leak
        def ready():
            print("ready", flush=True)
            leak.threading.Event().wait(60)
        leak.main(ready)
        """,
    )
    process = start(folder, "-m", "hygiene", "watch", "--interval", "50ms", "app.py")
    try:
        assert "ready\n" == process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(60)

    assert -signal.SIGTERM == process.returncode
    assert 1 == err.count("hygiene: at the end, ")
    assert "bot.chats" in err


@pytest.mark.slow
def test_a_program_that_takes_sigterm_for_itself_has_it(folder):
    """Its handler is called, not ours."""
    write(
        folder,
        "app.py",
        """
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        """,
    )

    done = watch(folder, "app.py")

    assert 5 == done.returncode
    assert 1 == done.stderr.count("hygiene: ")


@pytest.mark.slow
def test_a_short_program_is_told_that_it_was_short(folder):
    """Nothing found is not the same as nothing there."""
    write(folder, "app.py", "print('done')")

    done = watch(folder, "app.py")

    assert "done\n" == done.stdout
    assert "too few to tell what grows" in done.stderr


@pytest.mark.slow
def test_a_program_that_does_not_grow_is_told_so(folder):
    """In one line."""
    write(
        folder,
        "app.py",
        """
        import gc, threading
        from hygiene.memory.growth import GrowthWatch
        (growth,) = [thing for thing in gc.get_objects() if isinstance(thing, GrowthWatch)]
        pause = threading.Event()
        for _ in range(2000):
            if growth.readings >= 6: break
            pause.wait(0.01)
        """,
    )

    done = watch(folder, "--interval", "10ms", "app.py")

    assert (0, "") == (done.returncode, done.stdout)
    assert "hygiene: at the end, nothing kept growing in " in done.stderr


@pytest.mark.slow
def test_a_forked_child_is_silent(folder):
    """One program, one report."""
    write(
        folder,
        "app.py",
        """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            sys.exit(0)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )

    done = watch(folder, "app.py")

    assert (0, 1) == (done.returncode, done.stderr.count("hygiene: "))


@pytest.mark.slow
def test_a_closed_standard_error_does_no_harm(folder):
    """There is nobody to tell."""
    write(folder, "app.py", "import sys; sys.stderr.close(); sys.stderr = None; raise SystemExit(3)")

    assert (3, "") == (watch(folder, "app.py").returncode, watch(folder, "app.py").stderr)


@pytest.mark.slow
def test_the_command_line_stays_out_of_the_program(folder):
    """A watched service does not carry the memory of typer and rich."""
    write(folder, "app.py", "import sys; print({'typer', 'rich', 'pygal', 'click'} & set(sys.modules))")

    assert "set()\n" == watch(folder, "app.py").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted a script or a module to run, found none"),
        (["missing.py"], "'missing.py' cannot be read (No such file or directory). Check the path"),
        (["missing"], "found no 'missing'"),
        (["-m"], "wanted a script or a module to run, found none"),
        (["-m", "sys"], "found none in 'sys' (built-in). Name a module written in Python"),
        (["--every"], "wanted a time after --every"),
        (["--interval", "soon", "app.py"], "--interval must be positive"),
        (["--interval=0", "app.py"], "--interval must be positive"),
        (["--verbose", "app.py"], "wanted --interval, --every or -m before the program, found '--verbose'"),
        (["."], "wanted a __main__.py to run, found none in '.'"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_sentence(folder, arguments, message):
    """A wrong call ends with exit code 2, a message and no traceback."""
    write(folder, "app.py", "print('ran')")

    done = watch(folder, *arguments)

    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("hygiene: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_help_is_printed(folder):
    """--help before the program is ours."""
    done = watch(folder, "--help")

    assert 0 == done.returncode
    assert done.stdout.startswith("usage: hygiene watch [--interval TIME] [--every TIME] SCRIPT [ARGS...]\n")


@pytest.mark.slow
def test_the_command_is_listed(folder):
    """`hygiene --help` knows it."""
    done = python(folder, "-m", "hygiene", "--help")

    assert "watch" in done.stdout
