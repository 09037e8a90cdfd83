"""Suggestions for names that do not exist: settings, attributes, keys of a file."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar, cast

__all__ = ["closest", "did_you_mean", "keywords_of", "refuse_unknown", "suggestion", "suggests"]

F = TypeVar("F", bound=Callable[..., Any])

# Names of one idea in this library and in others. Each class has one of them, and a user may try any.
_SYNONYMS = [
    line.split()
    for line in """
maxsize max_size maxlen max_len max_length max_entries max_items max_count size capacity limit maximum
max_bytes maxbytes max_memory memory_limit max_mem bytes
ttl max_age maxage expire expires expiry expiration expire_after lifetime max_lifetime time_to_live
idle max_idle idle_timeout idle_time idle_ttl time_to_idle tti
on_evict on_remove on_removal on_eviction on_delete callback on_trim
max_tokens maxtokens token_limit
default_factory default factory
timeout wait max_wait
open create factory connect
close closer destroy cleanup
timer clock
interval every period
getsizeof sizeof get_size
target module class object path cls
attribute attributes name names attr attrs
""".strip().splitlines()
]


def closest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Those of *names* that may be meant by *name*, the likeliest first."""
    known = [n for n in names if n.isidentifier() and n != name and n[:2] != "__"]
    # Without underscores and capitals first: "max_size" is "maxsize", and nothing else.
    plain = name.replace("_", "").lower()
    same = [n for n in known if n.replace("_", "").lower() == plain]
    if same:
        return same[:most]
    synonyms = [n for group in _SYNONYMS if name.lower() in group for n in group if n in known]
    near = difflib.get_close_matches(name, known, most)
    return list(dict.fromkeys([*synonyms[:1], *([] if synonyms else near)]))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error message in parentheses: names that look like *name*, if any."""
    near = closest(name, names)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def suggestion(name: str, names: Iterable[str]) -> str:
    """A sentence that begins with a blank: the name that looks most like *name*, if any."""
    near = closest(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def suggests(function: F) -> F:
    """
    Let a call of *function* with an unknown keyword say which one may be meant.

    The right call pays for one more frame; the signature and the docstring stay as they are.
    """

    @functools.wraps(function)
    def called(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except TypeError as error:
            trace = error.__traceback__
            if trace is not None and trace.tb_next is None:  # raised by the call itself, not inside
                refuse_unknown(function.__qualname__.removesuffix(".__init__"), keywords, keywords_of(function))
            raise

    return cast("F", called)


def keywords_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that *function* takes as keywords."""
    code = inspect.unwrap(function).__code__
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return names[code.co_posonlyargcount :] if names[:1] != ("self",) else names[max(1, code.co_posonlyargcount) :]


def refuse_unknown(by: str, keywords: Iterable[str], known: Collection[str]) -> None:
    """
    Refuse keywords that are not among those that are *known*.

    Raises:
        TypeError: names the first of them, and the one that may be meant.
    """
    for name in keywords:
        if name not in known:
            raise TypeError(f"{by}() got an unexpected keyword argument {name!r}.{suggestion(name, known)}") from None
