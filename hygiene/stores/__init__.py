"""
Where conversations are kept while they are not in memory.

A store holds *entries*, each in a *space* (one for each registry, such as ``"conversations"``) under its key. It is
synchronous and thread-safe: one thread saves, many may load. Everything it does is in the protocol `Store`; a registry
knows no more of it than that.

Theory of operation
===================

**Two kinds of entry.** A *value* is saved whole. A *log* is a list that mostly grows at its end: each item is a row of
its own with a sequence number that it keeps for life, so that a conversation is never written anew because of one
message. What leaves a log leaves holes; the head of the log says which sequence numbers it has, so that a hole is told
from a loss.

**Encoded once, by the caller.** `Store.encode` makes bytes of a value, in the thread that has the value in hand, and
refuses there what would come back as something else. From then on it is bytes, which nobody can change while they
wait to be saved. `Store.load` gives values.

**Versions.** Each entry has a version, and each save says on which version it builds: 0, the entry must not exist; a
number, it must be that one; ``None``, whatever is there. A save that was built on another version than the one found
changes nothing and is an error (`VersionConflict`): no update is ever lost in silence. A key that is deleted and comes
back goes on counting, so that an old version never fits again by chance.

**Group commit.** `Store.save` takes the changes of many entries, of any spaces, and saves all of them or none. How far
they have got when it returns is the choice of the caller: ``sync=False`` survives the end of the process, ``sync=True``
that of the machine.

**Damage.** Each row carries a checksum, against bit rot and not against attackers. What does not fit is moved into
quarantine and reported, the rest is served. Where the structure of a file itself is broken, opening it is an error,
and the file is left as it is.
"""

from __future__ import annotations

from hygiene.stores.codec import NAMES, decode_key, encode_key
from hygiene.stores.opening import open_store
from hygiene.stores.protocol import (
    BadRow,
    Change,
    Delete,
    Head,
    Kind,
    Record,
    RecoveryReport,
    SaveLog,
    SaveValue,
    Store,
)
from hygiene.stores.sqlite import Quarantined, SQLiteStore

__all__ = [
    "NAMES",
    "BadRow",
    "Change",
    "Delete",
    "Head",
    "Kind",
    "Quarantined",
    "Record",
    "RecoveryReport",
    "SQLiteStore",
    "SaveLog",
    "SaveValue",
    "Store",
    "decode_key",
    "encode_key",
    "open_store",
]
