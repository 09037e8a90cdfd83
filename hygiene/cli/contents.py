"""What is in a store: its entries without their content, and all of it as JSON lines. Nothing here changes a store."""

from __future__ import annotations

import heapq
import json
import math
import os
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from hygiene.cli.logs import InputError
from hygiene.errors import NotStorable, StoreError, StoreUnavailable
from hygiene.stores import Head, Store, open_store

__all__ = [
    "Contents",
    "Entry",
    "Exported",
    "Quarantine",
    "Space",
    "export",
    "look",
    "opened",
    "restored",
    "shown",
    "told",
]


_SHOWN = 60  # characters of a key


class Entry(msgspec.Struct, frozen=True):
    """An entry without its content."""

    space: str
    key: Any
    """As `told` says it."""
    kind: str
    version: int
    items: int
    bytes: int
    """Size of the encoded content."""
    saved_at: float
    """Seconds since 1970."""
    age: float
    """Seconds since it was saved; 0 if the clock of who saved it is ahead."""
    expire_at: float | None


class Space(msgspec.Struct):
    """The sums of a space."""

    name: str
    entries: int = 0
    items: int = 0
    bytes: int = 0


class Quarantine(msgspec.Struct, frozen=True):
    """A row that recovery has taken out of service."""

    space: str | None
    key: Any
    sequence: int | None
    problem: str
    found_at: float
    bytes: int


class Contents(msgspec.Struct, frozen=True):
    """What a look at a store has found."""

    store: str
    entries: list[Entry]
    """The largest, the largest first."""
    spaces: list[Space]
    quarantine: list[Quarantine]
    """The newest, the newest first."""
    quarantined: int
    """How many there are in quarantine in all."""
    damaged: list[str]
    """What does not fit and is not in quarantine yet; of a file only, since on a server nobody has looked for it."""


class Exported(msgspec.Struct, frozen=True):
    """What an export has written."""

    entries: int
    left_out: list[str]
    """Why an entry is not in it, one sentence for each."""


@contextmanager
def opened(address: str, codec: str = "msgpack") -> Iterator[Store]:
    """
    The store at *address*, or in the file of that name; what a user can mend is an `InputError`.

    A file is only looked at: see ``read_only`` of `SQLiteStore`. A server's store is opened as it always is.
    """
    if ":" not in address or os.path.exists(address):  # noqa: PTH110 - a Path raises where a name cannot be one
        address = f"sqlite:{address}"
    if address.lower().startswith("sqlite:"):
        _check_is_database(address[len("sqlite:") :])
    options = {"read_only": True} if address.partition(":")[0].lower() == "sqlite" else {}
    try:
        store = open_store(address, codec=codec, **options)
    except (StoreError, ValueError) as problem:
        raise InputError(str(problem)) from problem
    with store:
        try:
            yield store
        except StoreError as problem:
            raise InputError(str(problem)) from problem


def _check_is_database(path: str) -> None:
    """
    Refuse a file that cannot be a store before the store refuses it.

    A program that opens its own store is advised to restore or delete a truncated file. Here, a person may have named
    any file of theirs, and must not be advised to delete it.
    """
    if os.path.isdir(path):  # noqa: PTH112 - a Path raises where a name cannot be one
        raise InputError(f"'{path}' is a folder. Name the file of a store")
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - as above
            beginning = file.read(16)
    except (OSError, ValueError):
        return  # the store says why
    if beginning != b"SQLite format 3\x00":
        found = "not a SQLite database" if beginning else "empty"
        raise InputError(f"'{path}' is {found}, so it is not a store. Name the file of a store")


def look(store: Store, space: str | None = None, limit: int = 20) -> Contents:
    """
    The largest entries, the sums of each space, and the quarantine.

    Args:
        store: Any.
        space: Only this one; the quarantine too.
        limit: Of entries and of rows in quarantine.

    Raises:
        InputError: there is nothing in *space*.
    """
    spaces = {name: Space(name) for name in _spaces(store, space)}
    now = time.time()

    def heads() -> Iterator[Head]:
        for name, sums in spaces.items():
            for head in store.heads(name):
                sums.entries += 1
                sums.items += head.count
                sums.bytes += head.bytes
                yield head

    largest = heapq.nlargest(limit, heads(), key=lambda head: head.bytes)
    rows: list[Quarantine] = []
    count = 0
    # Not in the protocol: it is for operators, and a store of somebody else's may have none.
    for row in getattr(store, "quarantine", lambda: ())():
        if space is not None and row.space != space:
            continue
        count += 1
        size = len(row.data) if isinstance(row.data, (bytes, str)) else 0
        rows.append(Quarantine(row.space, told(row.key), row.sequence, row.problem, row.found_at, size))
        del rows[:-limit]
    report = getattr(store, "report", None)
    return Contents(
        store=getattr(store, "path", None) or getattr(store, "address", None) or repr(store),
        entries=[
            Entry(
                head.space,
                told(head.key),
                head.kind,
                head.version,
                head.count,
                head.bytes,
                head.saved_at,
                max(0.0, now - head.saved_at),
                head.expire_at,
            )
            for head in largest
        ],
        spaces=list(spaces.values()),
        quarantine=rows[::-1],
        quarantined=count,
        damaged=[
            row.problem if row.space is None else f"{row.problem}: {shown(row.key)} in {row.space!r}"
            for row in (report.bad if report is not None else ())
            if space is None or row.space in {space, None}
        ],
    )


def _spaces(store: Store, space: str | None) -> list[str]:
    found = store.spaces()
    if space is None:
        return found
    if space not in found:
        known = ", ".join(map(repr, found)) or "none"
        raise InputError(f"wanted a space of the store, found no entries in {space!r}. There are: {known}")
    return [space]


def export(store: Store, file: str, space: str | None = None) -> Exported:
    """
    Write every entry as a line of JSON.

    Args:
        store: Any.
        file: A new one. Until it is complete it has another name, so that no half of an export is taken for a whole.
        space: Only this one.

    Raises:
        InputError: the file is there, or cannot be written; or a value, which pickle made, has no form in JSON.
    """
    whole = Path(file)
    if whole.exists():
        # It may be the store itself.
        raise InputError(f"wanted a new file for the export, found that '{file}' exists. Delete it or name another")
    part = whole.with_name(f"{whole.name}.part")
    try:
        with part.open("w", encoding="utf-8") as lines:
            done = _write(store, lines, space)
            lines.flush()
            os.fsync(lines.fileno())
        part.replace(whole)
    except OSError as problem:
        raise InputError(
            f"wanted to write the export to '{file}', found that it cannot be done: {problem.strerror}. "
            f"Name a file in a folder that exists and has room"
        ) from problem
    finally:
        part.unlink(missing_ok=True)
    return done


def _write(store: Store, lines: IO[str], space: str | None) -> Exported:
    count = 0
    left_out: list[str] = []
    for name in _spaces(store, space):
        for key in store.keys(name):
            try:
                record = store.load(name, key)
            except StoreUnavailable:
                raise
            except StoreError as problem:  # this one is damaged, the others need not be
                left_out.append(str(problem))
                continue
            if record is None:
                continue  # deleted, or over, since its key was read
            head = record.head
            try:
                line = {
                    "space": name,
                    "key": told(key),
                    "kind": head.kind,
                    "value": told(record.value),
                    "version": head.version,
                    "saved_at": head.saved_at,
                    "expire_at": head.expire_at,
                }
            except NotStorable as problem:
                left_out.append(f"{shown(key)} of {name!r} has no form in JSON: {problem}")
                continue
            text = json.dumps(line, ensure_ascii=False, allow_nan=False)
            # Half of a surrogate pair, which pickle takes, is not UTF-8.
            lines.write((text if _is_utf8(text) else json.dumps(line, allow_nan=False)) + "\n")
            count += 1
    return Exported(count, left_out)


def shown(key: Any) -> str:
    """*key* for a message: a long one is cut."""
    text = repr(key)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def told(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """
    *value* as JSON can say it, so that `restored` gives it back.

    What JSON knows stands for itself. The rest is an object with one name that begins with a dollar: ``$bytes``
    (base64), ``$datetime`` (ISO 8601, with ``$fold`` beside it if its fold is 1), ``$float`` (nan, inf, -inf),
    ``$tuple``, and ``$dict``, pairs of key and value, for one with keys that are no text, or that begin with a dollar
    themselves.

    Raises:
        NotStorable: it is something else, as only pickle can store it.
    """
    kind = type(value)
    if value is None or kind in {str, int, bool}:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [told(item) for item in value]
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: told(item) for key, item in value.items()}
        return {"$dict": [[told(key), told(item)] for key, item in value.items()]}
    if kind is tuple:
        return {"$tuple": [told(item) for item in value]}
    if kind is bytes:
        return {"$bytes": b64encode(value).decode()}
    if kind is datetime:
        return {"$datetime": value.isoformat(), **({"$fold": 1} if value.fold else {})}
    raise NotStorable(f"plain data was wanted; found {kind.__module__}.{kind.__qualname__}")


def restored(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """What `told` was given, from what `json.loads` made of it."""
    if type(value) is list:
        return [restored(item) for item in value]
    if type(value) is not dict:
        return value
    match value:
        case {"$bytes": str(text)}:
            return b64decode(text)
        case {"$datetime": str(text)}:
            return datetime.fromisoformat(text).replace(fold=value.get("$fold", 0))
        case {"$float": str(text)}:
            return float(text)
        case {"$tuple": list(items)}:
            return tuple([restored(item) for item in items])
        case {"$dict": list(pairs)}:
            return {restored(key): restored(item) for key, item in pairs}
        case _:
            return {key: restored(item) for key, item in value.items()}
