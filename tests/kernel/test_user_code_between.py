"""
Code of the user's that runs where one does not expect it: memory stays whole, and values are true.

Each is a program of its own, since what goes wrong here takes the process along. `tools/sanitize.py` runs them with
memory checked; without that, a fault may go unseen.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import hygiene

PROGRAMS = {
    "a class gets its __eq__ when instances of it are keys already, and it inserts": """
        from hygiene import Registry
        class K: pass
        k, armed, r = K(), [], Registry()
        r[k] = "k"
        def meddle(self, other):
            if armed and armed.pop() == 1:
                for i in range(7): r[f"e{i}"] = i
            return False
        K.__eq__, K.__hash__ = meddle, object.__hash__
        armed += [1, 2]  # the nodes are compared first, then the dict's keys
        r[object.__hash__(k)] = "an int with the same hash"
        for i in range(100): r[i, i] = i
        assert len(list(r)) == 109
        r.clear()
        """,
    "a class gets its __eq__ when instances of it are keys already, and it goes past the registry": """
        from hygiene import Registry
        class K: pass
        k, armed, r = K(), [], Registry()
        r[k], r["a"] = "k", ["freed"]
        def meddle(self, other):
            if armed and armed.pop() == 1:
                dict.__setitem__(r, "a", "new")
            return False
        K.__eq__, K.__hash__ = meddle, object.__hash__
        armed += [1, 2]
        r[object.__hash__(k)] = "an int with the same hash"
        assert r["a"] == "new"
        """,
    "a module that is a key gets another class": """
        import types
        from hygiene import Registry
        armed, r, m = [], Registry(), types.ModuleType("m")
        class M(types.ModuleType):
            __hash__ = types.ModuleType.__hash__
            def __eq__(self, other):
                if armed and armed.pop() == 1:
                    for i in range(7): r[f"e{i}"] = i
                return False
        r[m] = 1
        m.__class__ = M
        armed += [1, 2]
        r[object.__hash__(m)] = 2
        for i in range(100): r[i, i] = i
        assert len(list(r)) == 109
        """,
    "python -b warns of a comparison, and who shows the warning writes": """
        import warnings
        from hygiene import Registry
        r, shown = Registry(), []
        def show(*arguments, **named):
            shown.append(1)
            if len(shown) == 2:
                for i in range(7): r[f"e{i}"] = i
        warnings.showwarning = show
        warnings.simplefilter("always")
        r[b"a"], r["a"] = 1, 2  # of the same hash
        for i in range(100): r[i, i] = i
        assert len(list(r)) == 109
        """,
    "a key that only the order still knew dies with the registry, and asks for it": """
        import weakref
        from hygiene import Registry
        found = []
        class Key:
            def __del__(self): found.append(reference())
        r = Registry()
        r[Key()] = 1
        dict.clear(r)
        reference = weakref.ref(r)
        del r
        assert all(one is None or not one for one in found), found
        for one in found:
            if one is not None: one["x"] = 1
        """,
    "what dies with the registry uses its order": """
        from hygiene import Registry
        from hygiene.kernel import LinkedOrder
        class Last:
            def __del__(self):
                try: self.order.touch("a")
                except ReferenceError: pass
        class R(Registry): __slots__ = ("last",)
        r = R()
        r["a"], r.last = 1, Last()
        r.last.order = LinkedOrder(r)
        del r
        """,
    "a comparison empties the registry while an entry is moved to the end": """
        from hygiene import Registry
        armed = 0
        class K:
            def __hash__(self): return 7
            def __eq__(self, other):
                global armed
                if armed:
                    armed -= 1
                    if not armed: r.clear()
                return self is other
        for at in range(1, 12):
            armed, r, a, b = 0, Registry(), K(), K()
            for i in range(100_000, 103_000): r[i] = i
            r[a], r[b] = 1, 2
            armed = at
            try: r.move_to_end(b)
            except KeyError: pass
            armed = 0
            assert len(list(r)) == len(r)
        """,
    "a hash goes past the registry while an entry is moved to the end": """
        from hygiene import Registry
        armed = 0
        class K:
            def __hash__(self):
                global armed
                armed -= 1
                if armed == 0: dict.__setitem__(r, "a", "new")
                return 7
        for at in range(1, 12):
            armed, r, k = 0, Registry(), K()
            r["a"], r[k] = ["freed"], 1
            armed = at
            r.move_to_end(k)
            if armed > 0: break
            assert r["a"] == "new"
        assert at > 1
        """,
    "a key's hash changes": """
        from hygiene import Registry
        class K:
            h = 1
            def __hash__(self): return self.h
        for h in range(2, 64):
            r, k = Registry(), K()
            model = {}
            for entries in (r, model):
                k.h = 1
                entries[k] = "one"
                k.h = h
                entries[k] = "two"
                k.h = 1
                del entries[k]
                k.h = h
                entries[k] = "three"
            assert list(model.values()) == list(r.values()) == [r[k]]
        """,
    "the clock is a method of the registry, and the two are collected": """
        import gc, time
        from hygiene import Registry
        class R(Registry):
            def __init__(self): super().__init__(ttl=10, timer=self.now)
            def now(self): return time.monotonic()
        R()["a"] = 1
        gc.collect()
        gc.collect()
        assert not [one for one in gc.get_objects() if isinstance(one, R)]
        """,
    "a key that is missing is None, a tuple or a KeyError": """
        from hygiene import Registry
        r = Registry()
        for key in (None, KeyError("x"), (1, 2), (), "a", 5):
            try: r[key]
            except KeyError as error: assert len(error.args) == 1 and error.args[0] is key, (key, error.args)
        """,
}


# An OrderedDict of CPython does not survive this, and the kernel in Python is one.
COMPILED = {"a comparison empties the registry while an entry is moved to the end"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(
            claim, marks=pytest.mark.skipif(claim in COMPILED and not hygiene.compiled, reason="CPython crashes")
        )
        for claim in PROGRAMS
    ],
)
def test_memory_stays_whole_and_values_true_when(claim: str) -> None:
    """Whatever a key, a value or a clock does when it is asked, the registry is sound afterwards."""
    ended = subprocess.run(
        [sys.executable, "-b", "-X", "faulthandler", "-c", textwrap.dedent(PROGRAMS[claim])],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (0, "") == (ended.returncode, ended.stderr)
