"""What a store must hold after a replay: counted from the log, and compared with what is read back from it."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hygiene.cli.logs import InputError
from hygiene.errors import NotStorable, StoreError
from hygiene.stores import SQLiteStore, Store, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SPACE", "Kept", "Ledger", "opened", "place", "size"]

SPACE = "replay.conversations"
"""Not what a bot of the user's own would be called: a replay must never add to conversations of real people."""
_SERVERS = "://"


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """
    What the store holds after a replay, read back and compared with the log: every message is there, in order.

    Args:
        address: The store, without a password.
        space: The space in it.
        messages: Messages of this replay.
        users: Whose conversations they are.
        history: Only so many of each conversation are kept, the last ones; ``None``: all.
        messages_before: Messages that were in the store already.
        returned: Conversations that were in the store already and came back when their users wrote again.
        rehydrated: How often a conversation was loaded, because it had left memory.
        saved: Changes that were saved. A message is one, and so is the beginning of a conversation.
        saves: Transactions in which they were saved.
        size: Bytes of the file; for a server, of the encoded messages.
    """

    address: str
    space: str
    messages: int
    users: int
    history: int | None
    messages_before: int
    returned: int
    rehydrated: int
    saved: int
    saves: int
    size: int

    @property
    def sentence(self) -> str:
        """What was found, for a person."""
        which = f"{self.messages:,} messages" if self.history is None else f"the last {self.history:,} messages each"
        found = f"{which} of {self.users:,} users are in the store, in order"
        if self.messages_before:
            found += (
                f", behind {self.messages_before:,} that were there before; "
                f"{self.returned:,} conversations of then came back"
            )
        return f"{found}."


class Ledger:
    """
    The messages that each conversation in a store must have, in order: what is there now, then what is added.

    It keeps a number for each text (its hash in this process) and not the text, so that a replay can be checked by a
    process that does not hold it. Two texts are taken for the same by chance once in 2**61 comparisons.

    Args:
        store: Where the conversations are; it is read here.
        history: A conversation that is added to keeps so many messages, the last ones; ``None``: all.

    Raises:
        InputError: there is something in the space that no replay has put there.
    """

    def __init__(self, store: Store, history: int | None = None) -> None:
        self._history = history
        self._told = {key: deque(map(hash, texts)) for key, texts in _conversations(store)}
        self._known = frozenset(self._told)
        self._added: set[str | int] = set()
        self.messages = 0
        self.messages_before = sum(map(len, self._told.values()))

    def add(self, key: str | int, text: str) -> None:
        """Somebody has said something."""
        if key not in self._added:
            self._added.add(key)
            self._told[key] = deque(self._told.get(key, ()), self._history)
        self._told[key].append(hash(text))
        self.messages += 1

    @property
    def users(self) -> int:
        """Conversations that were added to."""
        return len(self._added)

    @property
    def returned(self) -> int:
        """Of these, those that were there before."""
        return len(self._added & self._known)

    def differences(self, store: Store) -> list[str | int]:
        """Keys of the conversations that are not in *store* as they must be: missing, unknown, or not the same."""
        missing = dict(self._told)
        different = [key for key, texts in _conversations(store) if missing.pop(key, None) != deque(map(hash, texts))]
        return [*different, *missing]


def _conversations(store: Store) -> Iterator[tuple[str | int, list[str]]]:
    for key, texts in store.items(SPACE):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"wanted conversations of an earlier replay in the space {SPACE!r}, found something else at {key!r}. "
                "Give the replay a store of its own"
            )
        yield key, texts


@contextmanager
def opened(address: str) -> Iterator[Store]:
    """
    The store at *address*, until the block ends.

    Raises:
        InputError: it cannot be opened or used, or would end with the process.
    """
    try:
        store = open_store(address)
    except (ValueError, StoreError) as problem:
        raise InputError(f"wanted a store, found: {problem}") from problem
    with store:
        if isinstance(store, SQLiteStore) and store.path == ":memory:":
            raise InputError(
                f"wanted a store that other processes see, found {address!r}, which each has for itself. "
                "Name a file: sqlite:chats.db"
            )
        try:
            yield store
        except (StoreError, NotStorable) as problem:
            raise InputError(f"wanted to keep conversations in {place(address)}, found: {problem}") from problem


def place(address: str) -> str:
    """*address* without what may be a password."""
    scheme, server, rest = address.partition(_SERVERS)
    return f"{scheme}{server}{rest.rpartition('@')[2]}" if server else address


def size(store: Store) -> int:
    """Bytes of the file with the log beside it; for a server, of what is encoded in the space."""
    if not isinstance(store, SQLiteStore):
        return store.nbytes(SPACE)
    found = 0
    for suffix in ("", "-wal"):
        with suppress(FileNotFoundError):  # the log is gone when nobody has the store open
            found += Path(store.path + suffix).stat().st_size
    return found
