"""Values and keys as bytes: equal when they come back, or refused when they are put in."""

from __future__ import annotations

import dataclasses
import enum
import math
import pickle
import re
import time
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from datetime import time as clock
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene.errors import HygieneError, NotStorable, StoreError
from hygiene.stores import decode_key, encode_key
from hygiene.stores.codec import Codec, codec_named, decode, fits

MSGPACK = codec_named("msgpack")
PICKLE = codec_named("pickle")

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
)
DATES = st.one_of(
    st.datetimes(),
    st.datetimes(timezones=st.just(UTC)),
    st.datetimes(timezones=st.just(timezone(timedelta(hours=5, minutes=45)))),
)
VALUES = st.recursive(
    ATOMS | DATES, lambda v: st.lists(v, max_size=4) | st.dictionaries(ATOMS, v, max_size=4), max_leaves=12
)
KEYS = st.recursive(ATOMS, lambda key: st.lists(key, max_size=3).map(tuple), max_leaves=5)


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Message:
    text: str


class Shouting(str):
    """A string that is equal to others than its characters say."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.upper() == other.upper()

    def __hash__(self) -> int:
        return hash(self.upper())


def back(value: Any, codec: Codec = MSGPACK) -> Any:
    """*value* after a round trip."""
    values = codec.decode_rows([(0, codec.encode(value))])
    assert values is not None
    return values[0]


def shape(value: Any) -> Any:
    """The types in *value*, which ``==`` does not tell apart: 1, 1.0 and True."""
    if type(value) is dict:
        return [(type(key), shape(item)) for key, item in value.items()]
    return [shape(item) for item in value] if type(value) is list else type(value)


@pytest.mark.slow
@given(VALUES)
def test_what_is_taken_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    """Also what ``==`` does not see: a 1 is no 1.0, and keys keep their order."""
    found = back(value)

    assert value == found
    assert shape(value) == shape(found)


def test_a_time_keeps_its_offset_and_a_naive_one_stays_naive() -> None:
    times = [datetime(2024, 5, 1, 12, 30, 1, 5), datetime(2024, 5, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))]  # noqa: DTZ001
    found = back(times)

    assert times == found
    assert [None, timedelta(hours=2)] == [time.utcoffset() for time in found]


@given(DATES)
def test_a_time_keeps_its_fold(when: datetime) -> None:
    """Without it, a naive one in the hour that a clock shows twice is another instant, which ``==`` does not see."""
    found = back([when, {"at": when}])

    assert [when.fold, when.fold] == [found[0].fold, found[1]["at"].fold]
    assert [when.isoformat()] * 2 == [found[0].isoformat(), found[1]["at"].isoformat()]


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone of this process cannot be set")
@pytest.mark.parametrize("codec", [MSGPACK, PICKLE], ids=["msgpack", "pickle"])
def test_a_naive_time_of_the_hour_that_comes_twice_is_the_same_instant(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two it is, and also the one that a clock skips in spring."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        hours = [datetime(2020, 10, 25, 2, 30), datetime(2020, 3, 29, 2, 30)]  # noqa: DTZ001
        times = [hour.replace(fold=fold) for hour in hours for fold in (0, 1)]
        found = [back(when, codec).timestamp() for when in times]

        assert 4 == len({when.timestamp() for when in times})
        assert [when.timestamp() for when in times] == found
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_fold_that_means_nothing_is_kept() -> None:
    """At an hour that comes once, and with an offset, it changes no instant."""
    times = [
        datetime(2024, 5, 1, 12, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=UTC),
    ]
    found = back(times)

    assert times == found
    assert [1, 1] == [when.fold for when in found]


def test_a_row_with_a_fold_is_refused_by_name_where_it_is_not_known() -> None:
    """A version that does not know it must not take it for the other hour: it is an extension of another kind."""
    plain, folded = (MSGPACK.encode(datetime(2020, 10, 25, 2, 30, fold=fold)) for fold in (0, 1))  # noqa: DTZ001

    assert [1, 2] == [msgspec.msgpack.decode(row[5:]).code for row in (plain, folded)]


class Nowhere(tzinfo):
    """A zone that does not know where it is."""

    def utcoffset(self, when: datetime | None) -> None: ...


class Moment(datetime):
    """A datetime as pandas and freezegun have them."""


@pytest.mark.parametrize(
    ("when", "what"),
    [
        (datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")), "astimezone(UTC)"),
        (datetime(2024, 3, 31, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")), "astimezone(UTC)"),
        (datetime(2024, 5, 1, tzinfo=Nowhere()), "replace(tzinfo=None)"),
        (Moment(2024, 5, 1, fold=1, tzinfo=UTC), "Moment"),
        (clock(2, 30, fold=1), "datetime.time"),
        (clock(2, 30, fold=1, tzinfo=UTC), "datetime.time"),
    ],
    ids=["twice", "never", "no offset", "subclass", "time", "time with a zone"],
)
def test_a_time_that_would_be_another_is_refused(when: Any, what: str) -> None:
    with pytest.raises(NotStorable, match=re.escape(what)):
        MSGPACK.encode({"at": [when]})


@pytest.mark.parametrize("key", [datetime(2020, 10, 25, 2, 30, fold=1), clock(2, 30, fold=1)], ids=["date", "time"])  # noqa: DTZ001
def test_a_time_is_no_key(key: Any) -> None:
    """Neither of an entry nor inside of one, so nothing can be found under another hour."""
    with pytest.raises(NotStorable):
        encode_key(key)
    with pytest.raises(NotStorable, match=r"store str\(key\)"):
        MSGPACK.encode({key: 1})


def test_not_a_number_comes_back_as_such() -> None:
    """It is not equal to itself, and a conversation shall not be refused because a score in it is missing."""
    assert math.isnan(back({"score": math.nan})["score"])


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        ((1, 2), "it", "store list(value)"),
        ({"a": {1}}, "value['a']", "store sorted(value)"),
        ({"a": [1, frozenset()]}, "value['a'][1]", "store sorted(value)"),
        ([bytearray(b"x")], "value[0]", "store bytes(value)"),
        ({"n": 2**64}, "value['n']", "64 bit"),
        ({"n": [-(2**63) - 1]}, "value['n'][0]", "64 bit"),
        ({"t": "\ud800"}, "value['t']", "surrogate"),
        ({"m": Message("x")}, "value['m']", 'codec="pickle"'),
        ({"m": date(2024, 1, 1)}, "value['m']", "datetime.date"),
        ({"m": Decimal(1)}, "value['m']", "decimal.Decimal"),
        ({"m": UUID(int=1)}, "value['m']", "uuid.UUID"),
        ({"c": Colour.RED}, "value['c']", "store str(value)"),
        ([OrderedDict()], "value[0]", "store dict(value)"),
        ({"a": {(1, 2): 3}}, "value['a']", "store str(key)"),
        ({"a": {2**64: 3}}, "value['a']", "store str(key)"),
        ({Colour.RED: 1}, "it", "store str(key)"),
        ([object()], "value[0]", "builtins.object"),
    ],
)
def test_what_would_come_back_as_something_else_is_refused(value: Any, where: str, what: str) -> None:
    """The error names the key, the place inside the value and the type, and says what to do."""
    with pytest.raises(NotStorable) as caught:
        MSGPACK.encode(value, key=("user", 7))

    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, HygieneError)
    assert "the value of ('user', 7)" in str(caught.value)
    assert f"found in {where}: " in str(caught.value)
    assert what in str(caught.value)


def test_a_time_that_its_zone_has_twice_is_refused() -> None:
    """In the night when the clocks go back, with an offset alone it would be equal to nothing."""
    with pytest.raises(NotStorable, match=r"value\['at'\].*astimezone\(UTC\)"):
        MSGPACK.encode({"at": datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))})


def test_what_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(NotStorable, match="in itself"):
        MSGPACK.encode(value)


def test_what_was_taken_from_a_short_stack_is_given_back_on_a_long_one() -> None:
    """The depth is bounded, so that a load deep in a program does not fail on what a save at its top took."""
    value: Any = 0
    for _ in range(200):
        value = [value]
    data = MSGPACK.encode(value)

    def deep(frames: int) -> Any:
        return deep(frames - 1) if frames else MSGPACK.decode_rows([(0, data)])

    assert [value] == deep(500)
    with pytest.raises(NotStorable, match="deeper than 200"):
        MSGPACK.encode([value])


@pytest.mark.parametrize("codec", [MSGPACK, PICKLE])
def test_any_flipped_bit_shows(codec: Codec) -> None:
    data = codec.encode({"role": "user", "content": "hello"})
    assert fits(data)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8

        assert not fits(bytes(flipped))
        assert codec.decode_rows([(0, bytes(flipped))]) is None


@pytest.mark.parametrize("row", [None, 1, 1.5, "text", b"", b"\0\0\0\0", b"12345"])
@pytest.mark.parametrize("codec", [MSGPACK, PICKLE])
def test_what_is_no_row_does_not_fit(codec: Codec, row: Any) -> None:
    assert not fits(row)
    assert codec.decode_rows([(0, row)]) is None


def test_pickle_takes_objects_and_has_to_be_asked_for() -> None:
    assert {"m": Message("x"), "t": (1, 2)} == back({"m": Message("x"), "t": (1, 2)}, PICKLE)
    with pytest.raises(NotStorable, match="function"):
        PICKLE.encode(lambda: None, key="k")
    with pytest.raises(ValueError, match="yaml"):
        codec_named("yaml")


def test_a_pickle_is_never_loaded_by_the_codec_that_was_not_asked_for_it() -> None:
    """Its bytes may be anybody's; and the other way round it is a mistake, too."""
    with pytest.raises(StoreError, match="another codec"):
        MSGPACK.decode_rows([(0, PICKLE.encode(1))])
    with pytest.raises(StoreError, match="another codec"):
        PICKLE.decode_rows([(0, MSGPACK.encode(1))])


@pytest.mark.slow
@given(KEYS)
def test_a_key_comes_back_equal(key: Any) -> None:
    assert key == decode_key(encode_key(key))
    assert hash(key) == hash(decode_key(encode_key(key)))


@pytest.mark.slow
@given(KEYS, KEYS)
def test_keys_are_one_exactly_where_they_are_in_a_dict(one: Any, other: Any) -> None:
    assert (one == other) == (encode_key(one) == encode_key(other))


@pytest.mark.parametrize(
    ("key", "plain"),
    [(True, 1), (2.0, 2), (-0.0, 0), (Colour.RED, "red"), (Level.LOW, 1), ((True, (Colour.RED,)), (1, ("red",)))],
)
def test_equal_keys_of_other_types_are_one(key: Any, plain: Any) -> None:
    assert encode_key(plain) == encode_key(key)


@pytest.mark.parametrize("key", ["\0'\"\n;--", "x" * 1_000_000, b"\xff\0", (), ("a", ("b",)), None, 2**64 - 1])
def test_odd_keys_are_ordinary(key: Any) -> None:
    assert key == decode_key(encode_key(key))


@pytest.mark.parametrize(
    "key",
    [
        2**64,
        -(2**63) - 1,
        math.nan,
        "\ud800",
        frozenset(),
        object(),
        UUID(int=1),
        Shouting("a"),
        ("a", [1]),
        (b"", 2**70),
    ],
)
def test_a_key_that_could_not_be_found_again_is_refused(key: Any) -> None:
    with pytest.raises(NotStorable, match="a stored key must be"):
        encode_key(key)


def test_the_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(NotStorable("no")))

    assert "no" == str(error)


@pytest.mark.parametrize("codec", [MSGPACK, PICKLE])
def test_one_value_can_be_read_without_its_store(codec: Codec) -> None:
    """What waits to be saved is read as it will be."""
    data = codec.encode({"role": "user"})

    assert {"role": "user"} == decode(codec, data)
    with pytest.raises(StoreError, match="bytes that are damaged"):
        decode(codec, data[:-1])
