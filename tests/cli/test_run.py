"""`hygiene run` is Python with guards: the script sees nothing of us but its bounds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile

import pytest

SHOP = """
    carts = {}

    class Shop:
        def __init__(self):
            self.orders = {}
"""
GUARDS = """
    [[guard]]
    target = "shop:Shop"
    attributes = ["orders"]
    maxsize = 3
"""
FILL = "import shop; s = shop.Shop(); [s.orders.setdefault(n, []) for n in range(10)]; print(list(s.orders))"


@pytest.fixture
def folder(tmp_path):
    """A folder with a leaking module, the guards that bound it, and a way to write more."""
    write(tmp_path, "shop.py", SHOP)
    write(tmp_path, "hygiene.toml", GUARDS)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def python(folder, *arguments, **environment):
    """Runs this interpreter in *folder*, with this checkout on its path."""
    path = os.pathsep.join([*filter(None, sys.path), str(folder)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run(folder, *arguments):
    return python(folder, "-m", "hygiene", "run", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["app.py"],
        ["--config", "hygiene.toml", "app.py"],
        ["--config=hygiene.toml", "--", "app.py"],
        ["-m", "app"],
        ["-mapp"],
    ],
)
def test_a_script_is_bounded_from_outside(folder, arguments):
    """Not a line of the script or its modules is changed, and its dict stays within the bound."""
    write(folder, "app.py", FILL)

    done = run(folder, *arguments)

    assert ("[7, 8, 9]\n", "", 0) == (done.stdout, done.stderr, done.returncode)


REPORT = """
    import os, sys, shop
    print(sys.argv, os.path.relpath(sys.path[0] or "."), __name__, __file__ and os.path.basename(__file__), __package__,
          __spec__ and __spec__.name, sys.modules["__main__"].__dict__ is globals(), __doc__, __builtins__.__name__,
          type(__loader__).__name__, sorted(globals()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["inner/app.py", "--config", "x", "-m", "--help", "--", "-v"],
        ["-m", "inner.app", "--config", "x", "--help", "-h"],
        ["-m", "inner", "a", "b"],
        ["inner", "--help"],
        ["packed.zip", "-m"],
        ["link.py"],
    ],
)
def test_the_script_sees_what_python_shows_it(folder, arguments):
    """Arguments, path, name and module of the script are those it has without us; none of its options is eaten."""
    for name in ("inner/app.py", "inner/__main__.py"):
        write(folder, name, REPORT)
    write(folder, "inner/__init__.py", "")
    with zipfile.ZipFile(folder / "packed.zip", "w") as packed:
        packed.write(folder / "inner/app.py", "__main__.py")
    (folder / "link.py").symlink_to("inner/app.py")
    expected = python(folder, *arguments)

    done = run(folder, *arguments)

    assert (expected.stdout, expected.stderr, 0) == (done.stdout, done.stderr, done.returncode)
    assert "__main__" in expected.stdout


@pytest.mark.slow
def test_a_safe_path_stays_safe(folder):
    """With -P Python does not look for modules beside the script, and neither do we."""
    write(folder, "app.py", "import os, sys; print(os.path.dirname(os.path.abspath(__file__)) in sys.path[:1])")

    done = python(folder, "-P", "-m", "hygiene", "run", "app.py")

    assert ("False\n", 0) == (done.stdout, done.returncode)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('no')", 1),
        ("int('x')", 1),
        ("", 0),
        ("import os; os._exit(9)", 9),
    ],
)
def test_exit_codes_pass(folder, source, expected):
    """A script ends with its own exit code."""
    write(folder, "app.py", source)

    assert expected == run(folder, "app.py").returncode


@pytest.mark.slow
def test_an_error_in_the_script_is_its_own(folder):
    """A script that fails shows its traceback: that is no error of ours to put in a sentence."""
    write(folder, "app.py", "def f():\n    raise KeyError('lost')\nf()")

    done = run(folder, "app.py")

    assert 1 == done.returncode
    assert "app.py\", line 2, in f\n    raise KeyError('lost')" in done.stderr
    assert "KeyError: 'lost'\n" in done.stderr


@pytest.mark.slow
def test_threads_that_outlive_the_last_line_keep_their_main(folder):
    """A thread still running after the script's end finds its classes in __main__, as pickle looks for them there."""
    write(
        folder,
        "app.py",
        """
        import pickle, threading
        class Point: x = 3
        def work():
            threading.main_thread().join(timeout=30)
            print(pickle.loads(pickle.dumps(Point())).x)
        threading.Thread(target=work).start()
        """,
    )

    done = run(folder, "app.py")

    assert ("3\n", 0) == (done.stdout, done.returncode)


@pytest.mark.slow
def test_the_command_line_stays_out_of_the_script(folder):
    """A guarded service does not carry the memory of typer and rich, and runs where they are not installed."""
    write(folder, "app.py", "import sys; print({'typer', 'rich', 'pygal', 'click'} & set(sys.modules))")

    assert "set()\n" == run(folder, "app.py").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guards", "arguments", "message"),
    [
        (GUARDS, [], "wanted a script or a module to run, found none"),
        (GUARDS, ["missing.py"], "'missing.py' cannot be read (No such file or directory). Check the path"),
        (GUARDS, ["-m", "missing"], "found no 'missing'"),
        (GUARDS, ["-m", "sys"], "found none in 'sys' (built-in). Name a module written in Python"),
        (GUARDS, ["-m", "missing.part"], "'missing.part' cannot be imported"),
        (GUARDS, ["--config"], "wanted a file after --config"),
        (GUARDS, ["--verbose", "app.py"], "wanted --config or -m before the script, found '--verbose'"),
        (GUARDS, ["."], "wanted a __main__.py to run, found none in '.'"),
        (GUARDS, ["--config", "missing.toml", "app.py"], "missing.toml"),
        ("[[guard]\n", ["app.py"], "hygiene.toml"),
        (GUARDS.replace("maxsize = 3", "maxsize = 0"), ["app.py"], "maxsize"),
        (GUARDS.replace("shop:Shop", "shop:Shoe"), ["app.py"], "Shoe"),
        (GUARDS.replace("shop:Shop", "shopp:Shop"), ["app.py"], "shopp"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_sentence(folder, guards, arguments, message):
    """A wrong call, a missing script and a broken guard end with exit code 2, a message and no traceback."""
    write(folder, "hygiene.toml", guards)
    write(folder, "app.py", "import shop; print('ran')")

    done = run(folder, *arguments)

    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("hygiene: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_help_is_printed(folder):
    """--help before the script is ours."""
    done = run(folder, "--help")

    assert (0, "usage: hygiene run [--config FILE] SCRIPT [ARGS...]") == (done.returncode, done.stdout.splitlines()[0])


@pytest.mark.slow
def test_a_guard_that_found_nothing_is_told_at_the_end(folder):
    """A module that is never imported, or a class that never comes up, is most often a typing error."""
    write(folder, "hygiene.toml", GUARDS.replace("shop:Shop", "__main__:Bott"))
    write(folder, "app.py", "raise SystemExit(4)")

    done = run(folder, "app.py")

    assert 4 == done.returncode
    assert "hygiene: wanted to bound orders of __main__:Bott, found that nothing of that name came up\n" == done.stderr


@pytest.mark.slow
def test_a_class_of_the_script_itself_is_bounded(folder):
    """A guard may name a class in the script: it is applied as soon as the class exists."""
    write(folder, "hygiene.toml", GUARDS.replace("shop:Shop", "__main__:Bot"))
    write(
        folder,
        "app.py",
        """
        class Bot:
            def __init__(self):
                self.orders = {}
        bot = Bot()
        for n in range(10):
            bot.orders[n] = n
        print(list(bot.orders))
        """,
    )

    done = run(folder, "app.py")

    assert ("[7, 8, 9]\n", "") == (done.stdout, done.stderr)
