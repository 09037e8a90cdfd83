"""
Where a registry keeps its entries: one interface, two bodies.

A `Kernel` is a dict whose entries have an order beside that of insertion (who was used last), times of writing and of
use, and leases. `hygiene.kernel.pure` is Python on top of ``OrderedDict``. `hygiene.kernel.compiled` is C by way of
Cython, and is there if a wheel had it or a compiler was at hand when the package was built; then it is taken. Both do
the same, and everything above the kernel is one Python code for both.

Set ``HYGIENE_PURE=1`` in the environment before the first import to have Python; `hygiene.compiled` says which it is.
On a build of Python without the GIL it is always Python, whose every step takes the lock there.

The interface
=============

What the kernel asks of who is built on it (a `Registry`), and calls where the short way ends:

- ``_lookup(key)``: the value, or what ``r[key]`` raises; ``_find(key)``: the value, counted as a hit, or `MISSING`;
- ``_put(key, value)``, ``_remove(key)``: the general ways of writing and of deleting;
- ``_sweep(newest)``: evict down to the bound, but not *newest*; ``_settle(key)``: drop what is due;
- ``_comes_back(value)``, ``_evict_into_tail()``: evicted values that somebody holds;
- ``_has_elsewhere(key)``: whether a look-up finds a key that is not here.

What it is told, as attributes: ``_due`` (a lower bound of the next expiry), ``_watched`` (whether the janitor knows of
it), ``_held`` (times of what was in use when they were over), ``_tail`` (evicted values that are referenced, see
`hygiene.tail`), ``_keeper`` (where else to look), ``_asking`` (threads inside the user's *busy*), ``_mortal`` (whether
a value's end may run code; for the body in Python). It keeps ``_leases`` itself, and the registry counts in it.

What it has: `_open` (once, before anything else), `_take_paths` (which short ways are open), `_keep_times` (times for
entries that had none), ``__getitem__``, ``get``,
``__contains__``, ``__setitem__`` and ``__delitem__``, times, leases, and the vocabulary.

The vocabulary, atomic under the GIL unless comparing a key runs Python code (`is_atomic`):

- ``store(r, key, value)``: put in; a new key is the most recent one, an old one keeps its place;
- ``take(r, key, default)``, ``take_oldest(r, last=False)``: out of everything;
- ``move(r, key)``: most recent from now on; ``KeyError`` if it is not there;
- ``oldest(r)``: the least recent key, or `MISSING`; ``by_recency(r)``: all of them, least recent first.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from hygiene.kernel.pure import INTERFACE
from hygiene.logs import logger

__all__ = [
    "ATOMIC",
    "CROWDED",
    "FRAMES",
    "MISSING",
    "PARKS",
    "STATE",
    "STRONG",
    "Kernel",
    "LinkedOrder",
    "by_recency",
    "compiled",
    "contains_timed",
    "get_timed",
    "is_atomic",
    "move",
    "oldest",
    "quicken",
    "read_timed",
    "store",
    "take",
    "take_oldest",
]


def _choose() -> bool:
    """Whether the compiled body is wanted, and there."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        logger.warning(
            "this Python runs without the GIL: registries take locks instead, pools, histories and stores are not safe "
            "in threads; PYTHON_GIL=1 in the environment turns it on",
            extra={"event_name": "kernel.no_gil"},
        )
        return False
    if os.environ.get("HYGIENE_PURE", "0") not in {"", "0"}:
        return False
    try:
        body = importlib.import_module("hygiene.kernel.compiled")
    except ModuleNotFoundError:  # it was not built, and who built the package was told
        return False
    except (ImportError, RuntimeError, ValueError) as error:  # for another Python, or all watchers of dicts are taken
        reason = str(error)
    else:
        if getattr(body, "INTERFACE", 0) == INTERFACE:
            return True
        reason = "it was built from an older version of the package; install it again"
    logger.warning(
        "the compiled kernel cannot be used, so registries run in Python: %s",
        reason,
        extra={"event_name": "kernel.not_loaded"},
    )
    return False


compiled = _choose()
"""Whether registries run on the compiled kernel."""

if TYPE_CHECKING or not compiled:
    from hygiene.kernel.pure import (
        ATOMIC,
        CROWDED,
        FRAMES,
        MISSING,
        PARKS,
        STATE,
        STRONG,
        Kernel,
        LinkedOrder,
        by_recency,
        contains_timed,
        get_timed,
        is_atomic,
        move,
        oldest,
        quicken,
        read_timed,
        store,
        take,
        take_oldest,
    )
else:
    from hygiene.kernel.compiled import (
        ATOMIC,
        CROWDED,
        FRAMES,
        MISSING,
        PARKS,
        STATE,
        STRONG,
        Kernel,
        LinkedOrder,
        by_recency,
        contains_timed,
        get_timed,
        is_atomic,
        move,
        oldest,
        quicken,
        read_timed,
        store,
        take,
        take_oldest,
    )
