"""
Values and keys as bytes: checksummed, versioned, and equal when they come back.

A row is a CRC-32 of what follows it, one byte that says how the rest is written, and the rest. The byte stands under
the checksum, so an unknown one is a row of a newer version and not a damaged one.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Hashable, Iterable
from datetime import datetime
from typing import Any, Final, Literal, Protocol
from zlib import crc32

import msgspec

from hygiene.errors import NotStorable, StoreError

__all__ = ["NAMES", "Codec", "codec_named", "decode_key", "encode_key", "fits"]

CodecName = Literal["msgpack", "pickle"]
NAMES: Final = ("msgpack", "pickle")
"""What ``codec=`` takes."""

_MSGPACK: Final = b"\x01"
_PICKLE: Final = b"\x02"
_START: Final = 5
_TRIES: Final = 1000  # to encode a dict while another thread changes it
_SHOWN: Final = 80  # characters of a key in a message
_DATETIME: Final = 1
_FOLDED: Final = 2  # a datetime with fold=1, which ISO 8601 cannot express
# 200 is far beyond what a message needs and far below the interpreter's limit of 1,000 frames: what could be encoded
# by a caller with a short stack must be decodable by one with a long stack.
_DEEPEST: Final = 200
_ATOMS: Final = frozenset({str, int, float, bool, type(None), bytes})
_HINTS: Final[dict[type, str]] = {
    tuple: "a tuple would come back as a list; store list(value)",
    set: "a set would come back as a list; store sorted(value)",
    frozenset: "a frozenset would come back as a list; store sorted(value)",
    bytearray: "a bytearray would come back as bytes; store bytes(value)",
    int: "an int must fit in 64 bit; store str(value)",
    str: "the text has half of a surrogate pair, which UTF-8 cannot hold; clean it",
}

_pack = struct.Struct(">I").pack
_unpack = struct.Struct(">I").unpack_from
_encode = msgspec.msgpack.Encoder().encode


class Codec(Protocol):
    """How values become bytes and come back."""

    name: str

    def encode(self, value: Any, key: Hashable = None) -> bytes:
        """*value* as a row; raises `NotStorable`."""
        ...

    def decode_rows(self, rows: Iterable[tuple[int, Any]]) -> list[Any] | None:
        """
        The values in *rows*, each behind its place, or ``None`` if one does not `fit`.

        Raises `StoreError` for one that is written in a way that this codec does not read.
        """
        ...


def fits(data: object) -> bool:
    """Whether *data* is a row whose checksum is right."""
    return type(data) is bytes and len(data) > _START and _unpack(data)[0] == crc32(memoryview(data)[4:])


def _row(form: bytes, body: bytes) -> bytes:
    return _pack(crc32(body, crc32(form))) + form + body


class MessagePack:
    """Plain data, exactly: what would come back as something else is refused."""

    name = "msgpack"

    def encode(self, value: Any, key: Hashable = None) -> bytes:
        """*value* as a row."""
        tries = _TRIES
        while True:
            try:
                body = _encode(_with_dates(value) if _scan(value, 0) else value)
            except (_RefusedError, OverflowError, UnicodeEncodeError, RecursionError):
                raise _explain(value, key) from None
            except RuntimeError:  # another thread has added or removed a key at this moment
                tries -= 1
                if not tries:
                    raise
                continue
            break
        return _pack(crc32(body, _SEED)) + _MSGPACK + body

    def decode_rows(self, rows: Iterable[tuple[int, Any]]) -> list[Any] | None:
        """The values in *rows*, or ``None`` if one is damaged."""
        values = []
        for _, data in rows:  # `fits` in line: this is most of the time that a load takes
            if type(data) is not bytes or len(data) <= _START:
                return None
            rest = data[4:]
            if _unpack(data)[0] != crc32(rest):
                return None
            if rest[0] != 1:
                raise _unreadable(data, self.name)
            values.append(_decode(rest[1:]))
        return values


_SEED: Final = crc32(_MSGPACK)


class Pickle:
    """Whatever pickle takes. Whoever can write to the store can run code in the process that reads it."""

    name = "pickle"

    def encode(self, value: Any, key: Hashable = None) -> bytes:
        """*value* as a row."""
        try:
            return _row(_PICKLE, pickle.dumps(value, protocol=5))
        except Exception as error:
            raise NotStorable(
                f"the value of {key!r} must be one that pickle takes; found {type(value).__qualname__}: {error}. "
                f"Leave out what cannot be pickled"
            ) from error

    def decode_rows(self, rows: Iterable[tuple[int, Any]]) -> list[Any] | None:
        """The values in *rows*, or ``None`` if one is damaged."""
        values = []
        for _, data in rows:
            if not fits(data):
                return None
            if data[4] != _PICKLE[0]:
                raise _unreadable(data, self.name)
            values.append(pickle.loads(memoryview(data)[_START:]))  # noqa: S301 - the user asked for it by name
        return values


def decode(codec: Codec, data: bytes) -> Any:
    """The one value that *codec* made *data* of."""
    values = codec.decode_rows([(0, data)])
    if values is None:
        raise StoreError(f"an encoded value was wanted; found {len(data)} bytes that are damaged")
    return values[0]


def codec_named(name: str) -> Codec:
    """The codec that ``codec=`` asks for."""
    if name == "msgpack":
        return MessagePack()
    if name == "pickle":
        return Pickle()
    raise ValueError(
        f'codec must be "msgpack" or, if you trust whoever can write to the store, "pickle"; found {name!r}'
    )


def _unreadable(data: bytes, name: str) -> StoreError:
    return StoreError(
        f"a row that codec {name!r} can read was wanted; found one that is written in way {data[4]}. "
        f"It is of a newer version of this library, or of another codec; it was left as it is"
    )


class _RefusedError(Exception):
    """Something in the value cannot be stored; a second, slower look tells where."""


def _scan(value: Any, depth: int) -> bool:
    """Whether *value* has dates in it. On the path of each message, so it keeps no book of where it is."""
    kind = type(value)
    if kind is dict:
        dates = False
        for key, item in value.items():
            if type(key) not in _ATOMS:
                raise _RefusedError
            if type(item) not in _ATOMS:
                if depth == _DEEPEST - 1:
                    raise _RefusedError
                dates |= _scan(item, depth + 1)
        return dates
    if kind is list:
        dates = False
        for item in value:
            if type(item) not in _ATOMS:
                if depth == _DEEPEST - 1:
                    raise _RefusedError
                dates |= _scan(item, depth + 1)
        return dates
    if kind is datetime:
        if not _is_exact(value):
            raise _RefusedError
        return True
    if kind in _ATOMS:
        return False
    raise _RefusedError


def _with_dates(value: Any) -> Any:
    """*value* with its dates in a form of our own: MessagePack's would drop the offset, and the date without one."""
    kind = type(value)
    if kind is dict:
        return {key: _with_dates(item) for key, item in value.items()}
    if kind is list:
        return [_with_dates(item) for item in value]
    if kind is datetime:
        return msgspec.msgpack.Ext(_FOLDED if value.fold else _DATETIME, value.isoformat().encode())
    return value


def _is_exact(when: datetime) -> bool:
    """True if *when* comes back equal from ISO 8601, but for its fold."""
    back = datetime.fromisoformat(when.isoformat())
    # A zone without an offset would be dropped. Only the naive datetime without a zone has a place on the time line.
    return back == when and (back.tzinfo is None) is (when.tzinfo is None)


def _extension(code: int, data: memoryview) -> Any:
    if code == _DATETIME:
        return datetime.fromisoformat(bytes(data).decode())
    if code == _FOLDED:
        return datetime.fromisoformat(bytes(data).decode()).replace(fold=1)
    raise StoreError(f"a value has an extension of kind {code}, which a newer version of this library has written")


_decode: Callable[[Any], Any] = msgspec.msgpack.Decoder(ext_hook=_extension).decode


def _explain(value: Any, key: Hashable) -> NotStorable:
    """The error for a value that was refused: where it is, what was found there, what to do."""
    path, found, hint = _find(value, "", 0) or ("", value, "it changed while it was encoded; change a copy")
    where = f"value{path}" if path else "it"
    return NotStorable(
        f"the value of {_shown(key)} must be plain data (str, int, float, bool, None, bytes, datetime, list, dict); "
        f"found in {where}: {type(found).__module__}.{type(found).__qualname__}: {hint}"
    )


def _find(value: Any, path: str, depth: int) -> tuple[str, Any, str] | None:  # noqa: PLR0911 - one for each rule
    """The first thing in *value* that cannot be stored: its path, itself, and what to do."""
    kind = type(value)
    if kind in {dict, list}:
        if depth >= _DEEPEST:
            return "[...]", value, f"nested deeper than {_DEEPEST} levels, or in itself; store it flat"
        for place, item in value.items() if kind is dict else enumerate(value):
            if kind is dict and (type(place) not in _ATOMS or not _encodes(place)):
                hint = "a key inside a value must be a str, int (64 bit), float, bool, None or bytes; store str(key)"
                return path, place, hint
            if found := _find(item, f"{path}[{place!r}]", depth + 1):
                return found
        return None
    if kind is datetime:
        if _is_exact(value):
            return None
        if value.utcoffset() is None:
            return path, value, "its zone has no offset, and would be lost; store value.replace(tzinfo=None)"
        return path, value, "a time that its zone has twice or never comes back as another; store value.astimezone(UTC)"
    if kind in _ATOMS:
        return None if _encodes(value) else (path, value, _HINTS[kind])
    for base in (dict, list, str, int, float, bytes):
        if isinstance(value, base):
            return path, value, f"it would come back as a plain {base.__name__}; store {base.__name__}(value)"
    hint = _HINTS.get(
        kind, 'store plain data made from it, or open the store with codec="pickle" if you trust its file'
    )
    return path, value, hint


def _encodes(atom: Any) -> bool:
    try:
        _encode(atom)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def encode_key(key: Hashable) -> bytes:
    """
    *key* as bytes: equal keys give the same, others never do.

    As in a dict, 1, 1.0 and True are one key; it comes back as 1.

    Args:
        key: A ``str``, ``int`` (64 bit), ``float``, ``bool``, ``None``, ``bytes``, or a tuple of these. Of any length.

    Raises:
        NotStorable: it is something else.
    """
    if type(key) is not str:
        key = _plain_key(key, key)
    try:
        return _encode(key)
    except (OverflowError, UnicodeEncodeError):
        raise _bad_key(key, key) from None


def decode_key(data: bytes) -> Any:
    """The key that `encode_key` made *data* of."""
    return _as_tuples(_decode(data))


def _plain_key(key: Any, whole: Any) -> Any:
    if key is None or type(key) in {str, bytes}:
        return key
    if isinstance(key, tuple):
        return tuple([_plain_key(part, whole) for part in key])
    if isinstance(key, float) and key.is_integer() and -(2**63) <= key < 2**64:
        key = int(key)
    # A subclass that compares as its base does (an enum of strings, a boolean) finds the same entry in a dict, too.
    if isinstance(key, str) and _compares_as(str, key):
        return str.__str__(key)
    if isinstance(key, int) and _compares_as(int, key) and -(2**63) <= key < 2**64:
        return int(key)
    if isinstance(key, float) and _compares_as(float, key) and not math.isnan(key):
        return float(key)
    if isinstance(key, bytes) and _compares_as(bytes, key):
        return bytes(key)
    raise _bad_key(key, whole)


def _compares_as(base: Any, key: object) -> bool:
    kind: Any = type(key)
    return kind.__eq__ is base.__eq__ and kind.__hash__ is base.__hash__


def _bad_key(part: Any, whole: Any) -> NotStorable:
    kind = type(part)
    return NotStorable(
        f"a stored key must be a str, int (64 bit), float, bool, None, bytes or a tuple of these; "
        f"found {kind.__module__}.{kind.__qualname__} in {_shown(whole)}. "
        f"Use str(key)"
    )


def _as_tuples(key: Any) -> Any:
    return tuple([_as_tuples(part) for part in key]) if type(key) is list else key


def _shown(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
