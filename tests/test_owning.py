"""``owns``: a class gets ``close``, ``aclose`` and ``with`` that release what its attributes hold."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import inspect
import logging
import threading
import weakref
from typing import Any

import attrs
import pydantic
import pytest

from hygiene import Registry, bounded_registry
from hygiene.owning import _records, owns


class Resource:
    def __init__(self, name, log, error=None):
        self.name, self.log, self.error = name, log, error

    def close(self):
        self.log.append(self.name)
        if self.error:
            raise self.error


class AsyncResource(Resource):
    close = None

    async def aclose(self):
        await asyncio.sleep(0)
        Resource.close(self)


class Both(Resource):
    async def aclose(self):
        self.log.append(f"async {self.name}")


@owns("first", "second")
class Bot:
    """Owns two resources, and has no method of its own that closes."""

    def __init__(self, kind=Resource, errors=(None, None)):
        self.log = []
        self.first = kind("first", self.log, errors[0])
        self.second = kind("second", self.log, errors[1])


@owns("db")
class Own:
    """Closes something itself, too."""

    def __init__(self):
        self.log = []
        self.db = Resource("db", self.log)

    def close(self):
        self.log.append("own")


def closed_by_with(bot):
    with bot:
        pass


def closed_twice(bot):
    bot.close()
    bot.close()


def closed_by_async_with(bot):
    async def main():
        async with bot:
            pass

    asyncio.run(main())


def closed_within_with(bot):
    with bot:
        bot.close()


WAYS = [
    lambda bot: bot.close(),
    lambda bot: asyncio.run(bot.aclose()),
    closed_by_with,
    closed_by_async_with,
    closed_twice,
    closed_within_with,
]


@pytest.mark.parametrize("close", WAYS)
def test_attributes_are_released_in_reverse_order_once(close):
    bot = Bot()
    close(bot)

    assert ["second", "first"] == bot.log


@pytest.mark.parametrize("close", WAYS[1:4:2])
@pytest.mark.parametrize("kind", [AsyncResource, Both])
def test_an_asynchronous_close_prefers_asynchronous_closers(close, kind):
    bot = Bot(kind)
    close(bot)

    prefix = "async " if kind is Both else ""
    assert [f"{prefix}second", f"{prefix}first"] == bot.log


def test_the_same_class_is_returned():
    class Plain:
        db = None

    assert Plain is owns("db")(Plain)


def test_the_class_s_own_close_runs_first():
    for close in WAYS[:4] + WAYS[5:]:
        bot = Own()
        close(bot)

        assert "own" == bot.log[0], close
        assert 1 == bot.log.count("db"), close
        assert "db" == bot.log[-1] or close is closed_within_with


def test_a_subclass_that_calls_super_has_everything_released_once():
    class Sub(Own):
        def close(self):
            self.log.append("before")
            super().close()
            self.log.append("after")

    closed, left = Sub(), Sub()
    closed.close()
    with left:
        pass

    assert ["before", "own", "db", "after"] == closed.log
    assert ["before", "own", "after", "db"] == left.log  # the outermost releases, when all that is written has run


def test_a_decorated_subclass_releases_its_own_attributes_first():
    @owns("cache")
    class Sub(Own):
        def __init__(self):
            super().__init__()
            self.cache = Resource("cache", self.log)

        def close(self):
            self.log.append("sub")
            super().close()

    for close in WAYS[:4]:
        bot = Sub()
        close(bot)

        assert ["sub", "own", "cache", "db"] == bot.log


def test_a_subclass_that_forgets_super_is_released_by_with():
    class Sub(Own):
        def close(self):
            self.log.append("sub")

    with Sub() as bot:
        pass

    assert ["sub", "db"] == bot.log


def test_an_own_exit_decides_about_the_exception():
    """It runs first, is told the exception, and may swallow it as before."""

    @owns("db")
    class Quiet(Own):
        def __exit__(self, kind, error, traceback):
            self.log.append(kind)
            self.close()
            return True

    with Quiet() as bot:
        raise KeyError

    assert [KeyError, "own", "db"] == bot.log


async def test_an_own_asynchronous_close_stays_one():
    @owns("db")
    class Client:
        def __init__(self):
            self.log = []
            self.db = AsyncResource("db", self.log)

        async def close(self):
            """Say goodbye."""
            self.log.append("own")

    one, two, three = Client(), Client(), Client()
    await one.close()
    await two.aclose()
    async with three:
        pass

    assert [["own", "db"]] * 3 == [one.log, two.log, three.log]
    assert inspect.iscoroutinefunction(Client.close)
    assert "Say goodbye." == Client.close.__doc__
    assert not hasattr(Client, "__exit__")


async def test_a_class_with_an_own_aclose_cannot_be_closed_synchronously():
    """Its own code could not be run, so nothing is half closed and it says what to do."""

    @owns("db")
    class Client:
        def __init__(self):
            self.log = []
            self.db = Resource("db", self.log)

        async def aclose(self):
            self.log.append("own")

    client = Client()
    with pytest.raises(TypeError, match=r"Client\.close\(\) cannot run .* Use `await aclose\(\)`"):
        client.close()
    assert [] == client.log
    assert not hasattr(client, "__enter__")

    async with client:
        pass

    assert ["own", "db"] == client.log


async def test_an_own_enter_and_exit_serve_async_with_too():
    @owns("db")
    class Old:
        def __init__(self):
            self.log = []
            self.db = AsyncResource("db", self.log)

        def __enter__(self):
            self.log.append("enter")
            return "entered"

        def __exit__(self, *exc_info):
            self.log.append("exit")

    old = Old()
    async with old as entered:
        pass

    assert "entered" == entered
    assert ["enter", "exit", "db"] == old.log


def test_what_only_aclose_can_release_is_said_and_left_for_it():
    """The others are released; nothing is skipped in silence."""
    bot = Bot(AsyncResource)
    bot.second = Resource("sync", bot.log)
    with pytest.raises(ExceptionGroup) as caught:
        bot.close()

    assert ["sync"] == bot.log
    [error] = caught.value.exceptions
    assert "AsyncResource can only be released asynchronously, so it is still open: use `await Bot.aclose()`" in str(
        error
    )
    assert ["while releasing Bot.first"] == error.__notes__

    asyncio.run(bot.aclose())

    assert ["sync", "first"] == bot.log


def test_an_awaitable_that_a_synchronous_closer_returns_is_awaited_later():
    class Odd:
        def __init__(self):
            self.closed = 0

        def close(self):
            self.closed += 1
            return Ready(self)

    class Ready:
        def __init__(self, odd):
            self.odd = odd

        def __await__(self):
            self.odd.closed += 10
            return iter(())

    bot = Bot()
    bot.first, bot.second = Odd(), None
    with pytest.raises(ExceptionGroup):
        bot.close()
    asyncio.run(bot.aclose())

    assert 11 == bot.first.closed


@pytest.mark.parametrize("close", WAYS[:4])
def test_all_releases_run_and_the_failures_come_as_one(close):
    bot = Bot(errors=(ValueError("one"), OSError("two")))
    with pytest.raises(ExceptionGroup, match="2 of the resources of Bot could not be released") as caught:
        close(bot)

    assert ["two", "one"] == [str(error) for error in caught.value.exceptions]
    assert ["while releasing Bot.second"] == caught.value.exceptions[0].__notes__


@pytest.mark.parametrize("close", WAYS[:4])
def test_a_failing_close_of_the_class_still_releases(close):
    class Bad(Own):
        def close(self):
            raise ValueError("own")

    decorated = owns("db")(Bad)
    bot = decorated()
    with pytest.raises(ValueError, match="own"):
        close(bot)

    assert ["db"] == bot.log

    bot = decorated()
    bot.db.error = OSError("db")
    with pytest.raises(ExceptionGroup, match=r"closing .*Bad failed, and 1 of its resources") as caught:
        close(bot)

    assert ["own", "db"] == [str(error) for error in caught.value.exceptions]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_exception_of_the_body_is_never_masked(asynchronous, caplog):
    """Failing releases are logged, and noted on it."""
    bot = Bot(errors=(OSError("gone"), None))

    def later():
        async def main():
            async with bot:
                raise KeyError("body")

        asyncio.run(main())

    def now():
        with bot:
            raise KeyError("body")

    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="body") as caught:
        (later if asynchronous else now)()

    assert ["while releasing Bot.first: OSError('gone')"] == caught.value.__notes__
    assert ["while releasing Bot.first failed; the exception on its way goes on"] == caplog.messages


def test_a_failing_close_does_not_mask_the_body_either(caplog):
    @owns("db")
    class Bad(Own):
        def close(self):
            raise ValueError("own")

    with pytest.raises(KeyError) as caught, Bad() as bot:
        raise KeyError

    [note] = caught.value.__notes__
    assert note.startswith("while closing")
    assert note.endswith("Bad: ValueError('own')")
    assert ["db"] == bot.log


def test_an_interrupt_comes_through_after_the_rest_was_released():
    bot = Bot(errors=(OSError("gone"), KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as caught:
        bot.close()

    assert ["second", "first"] == bot.log
    assert ["while releasing Bot.first: OSError('gone')"] == caught.value.__notes__


async def test_a_cancelled_aclose_releases_first():
    """The cancellation arrives after the releases, also if there are two."""
    begun, go = asyncio.Event(), asyncio.Event()

    class Slow(AsyncResource):
        async def aclose(self):
            begun.set()
            await go.wait()
            self.log.append(self.name)

    bot = Bot(Slow)
    task = asyncio.create_task(bot.aclose())
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ["second", "first"] == bot.log


async def test_a_cancelled_own_aclose_still_releases():
    begun = asyncio.Event()

    @owns("db")
    class Client:
        def __init__(self):
            self.log = []
            self.db = AsyncResource("db", self.log)

        async def aclose(self):
            begun.set()
            await asyncio.Event().wait()

    client = Client()
    task = asyncio.create_task(client.aclose())
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ["db"] == client.log


async def test_a_release_that_hangs_after_a_cancellation_is_given_up(monkeypatch):
    """It is named on the cancellation, and the others are still released."""
    monkeypatch.setattr("hygiene.owning.GRACE", 0.0)
    begun = asyncio.Event()

    class Hangs:
        async def aclose(self):
            await asyncio.Event().wait()

    @owns("db", "hangs")
    class Client(Own):
        def __init__(self):
            super().__init__()
            self.hangs = Hangs()

        async def aclose(self):
            begun.set()
            await asyncio.Event().wait()

    client = Client()
    task = asyncio.create_task(client.aclose())
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert ["db"] == client.log
    [note] = caught.value.__notes__
    assert "hangs timed out; it was cancelled" in note


async def test_a_resource_that_cancels_itself_is_a_failure():
    class Cancels:
        async def aclose(self):
            raise asyncio.CancelledError

    bot = Bot()
    bot.second = Cancels()
    with pytest.raises(ExceptionGroup) as caught:
        await bot.aclose()

    assert ["first"] == bot.log
    assert "Bot.second was cancelled before it was released" == str(caught.value.exceptions[0])


def test_a_property_that_raises_is_a_failure_and_the_others_are_released():
    class Odd(Bot):
        @property
        def third(self):
            raise ValueError("odd")

    bot = owns("third")(Odd)()
    with pytest.raises(ExceptionGroup) as caught:
        bot.close()

    assert ["second", "first"] == bot.log
    assert ["odd"] == [str(error) for error in caught.value.exceptions]


def test_a_plain_function_that_returns_a_coroutine_is_left_for_aclose():
    class Wrapped(Resource):
        def close(self):
            return AsyncResource.aclose(self)

    bot = Bot(Wrapped)
    with pytest.raises(ExceptionGroup, match="2 of the resources"):
        bot.close()
    assert [] == bot.log

    asyncio.run(bot.aclose())

    assert ["second", "first"] == bot.log


async def test_an_own_asynchronous_with_keeps_its_body():
    @owns("db")
    class Client(Own):
        async def __aenter__(self):
            self.log.append("enter")
            return self

        async def __aexit__(self, kind, error, traceback):
            self.log.append(kind)
            return True

    async with Client() as client:
        raise KeyError

    assert ["enter", KeyError, "db"] == client.log


def test_a_failure_in_a_with_that_swallows_its_exception_is_raised():
    @owns("db")
    class Quiet(Own):
        def __exit__(self, kind, error, traceback):
            return True

    bot = Quiet()
    bot.db.error = OSError("gone")
    with pytest.raises(ExceptionGroup), bot:
        raise KeyError


def test_a_later_resource_with_the_id_of_one_that_is_gone_is_released():
    """Ids are used again; a claim is not."""
    bot = Bot()
    bot.close()
    record = _records[id(bot)][1]
    again = Resource("again", bot.log)
    record.released[id(again)] = object(), lambda: None
    bot.first, bot.second = again, None
    bot.close()

    assert ["second", "first", "again"] == bot.log


def test_missing_and_empty_attributes_are_passed_over():
    """An object whose ``__init__`` failed half-way can be closed."""
    bot = Bot()
    bot.second = None
    del bot.first
    bot.close()

    assert [] == bot.log


def test_the_members_of_containers_are_released_last_one_first():
    bot = Bot()
    bot.first = [Resource("a", bot.log), Resource("b", bot.log)]
    bot.second = {"x": Resource("c", bot.log), "y": (Resource("d", bot.log), None)}
    bot.close()

    assert ["d", "c", "b", "a"] == bot.log


def test_a_member_is_named_in_its_failure():
    bot = Bot()
    bot.first, bot.second = {"x": [Resource("a", bot.log, OSError())]}, None
    with pytest.raises(ExceptionGroup) as caught:
        bot.close()

    assert ["while releasing Bot.first['x'][0]"] == caught.value.exceptions[0].__notes__


def test_a_container_that_can_be_closed_is_closed_itself():
    bot = Bot()
    bot.first, bot.second = None, Registry(maxsize=2, close="close")
    bot.second["a"] = Resource("a", bot.log)
    bot.close()

    assert ["a"] == bot.log


def test_a_resource_in_two_places_is_released_once():
    bot = Bot()
    bot.second = [bot.first, bot.first]
    bot.close()

    assert ["first"] == bot.log


def test_what_cannot_be_released_is_an_error():
    bot = Bot()
    bot.second = "no resource"
    with pytest.raises(ExceptionGroup) as caught:
        bot.close()

    assert ["first"] == bot.log
    assert "must have close(), aclose() or the like; found 'no resource'" in str(caught.value.exceptions[0])


def test_an_object_can_be_opened_again():
    """What is there at the next close is released then."""
    bot = Bot()
    bot.close()
    bot.first = Resource("again", bot.log)
    bot.close()

    assert ["second", "first", "again"] == bot.log


def test_a_released_resource_is_not_kept():
    """The owner may live on."""
    bot = Bot()
    gone = weakref.ref(bot.first)
    bot.close()
    bot.first = None

    assert gone() is None


@pytest.mark.slow
def test_a_closed_object_is_not_kept():
    bot = Bot()
    gone = weakref.ref(bot)
    bot.close()
    del bot
    gc.collect()

    assert gone() is None


def test_a_cached_property_is_not_made_in_order_to_close_it():
    class Lazy:
        made = 0
        log = []  # noqa: RUF012 - the test's own

        @functools.cached_property
        def client(self):
            self.made += 1
            return Resource("client", self.log)

    lazy, used = owns("client")(Lazy)(), Lazy()
    lazy.close()
    assert 0 == lazy.made

    assert used.client is not None
    used.close()

    assert ["client"] == Lazy.log


def test_many_threads_that_close_release_once():
    bots = [Bot() for _ in range(50)]
    gate = threading.Barrier(4)

    def close():
        gate.wait(10)
        for bot in bots:
            bot.close()

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert {("first", "second")} == {tuple(sorted(bot.log)) for bot in bots}


async def test_tasks_that_close_at_once_release_once():
    bot = Bot(AsyncResource)
    await asyncio.gather(*(bot.aclose() for _ in range(5)))

    assert ["first", "second"] == sorted(bot.log)


@dataclasses.dataclass
class Data:
    log: list = dataclasses.field(default_factory=list)
    db: Resource | None = None


@dataclasses.dataclass(slots=True, weakref_slot=True)
class SlottedData:
    log: list = dataclasses.field(default_factory=list)
    db: Resource | None = None


class Slotted:
    __slots__ = ("__weakref__", "db", "log")

    def __init__(self):
        self.log = []


@attrs.define
class Attrs:
    log: list = attrs.Factory(list)
    db: Resource | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    log: list = dataclasses.field(default_factory=list)
    db: list = dataclasses.field(default_factory=list)


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    log: list = []
    db: Resource | None = None


class Private(pydantic.BaseModel):
    log: list = []
    _db: Resource | None = pydantic.PrivateAttr(default=None)


@attrs.define
@owns("db")
class Above:
    log: list = attrs.Factory(list)
    db: Resource | None = None


for kind in (Data, SlottedData, Slotted, Attrs, Frozen, Model):
    owns("db")(kind)
owns("_db")(Private)


@pytest.mark.parametrize("cls", [Data, SlottedData, Slotted, Attrs, Frozen, Model, Private, Above])
def test_every_kind_of_class_is_closed(cls):
    with cls() as made:
        resource = Resource("db", made.log)
        if cls is Frozen:
            made.db.append(resource)
        else:
            setattr(made, "_db" if cls is Private else "db", resource)
    made.close()

    assert ["db"] == made.log


def test_decorators_on_one_class_add_up():
    @owns("first")
    @owns("second")
    class Twice:
        def __init__(self):
            self.log = []
            self.first, self.second = Resource("first", self.log), Resource("second", self.log)

    twice = Twice()
    twice.close()

    assert ["first", "second"] == twice.log


def test_a_name_that_the_class_never_mentions_is_refused():
    with pytest.raises(
        AttributeError, match=r"owns was asked to release Own\.dbs, .* mentions 'dbs' \(did you mean 'db'"
    ):
        owns("dbs")(Own)


@pytest.mark.parametrize(
    ("attributes", "target", "error", "message"),
    [
        ((), Own, ValueError, "owns needs the names of the attributes to release"),
        (("a b",), Own, ValueError, "takes names of attributes"),
        ((Own,), Own, TypeError, r"Call it: @owns\("),
        (("db",), len, TypeError, "owns decorates a class; found"),
        (("db",), dict, TypeError, "dict is a compiled class"),
    ],
)
def test_misuse_is_told_at_decoration(attributes, target, error, message):
    with pytest.raises(error, match=message):
        owns(*attributes)(target)


def test_a_class_without_weak_references_is_refused():
    class Bare:
        __slots__ = ("db",)

    with pytest.raises(TypeError, match=r'Add "__weakref__" to its __slots__'):
        owns("db")(Bare)

    with pytest.raises((TypeError, RuntimeError)) as caught:  # on 3.11 it is the cause of a RuntimeError

        @dataclasses.dataclass(slots=True)
        @owns("db")
        class Remade:
            db: Resource | None = None

    assert 'Add "__weakref__"' in str(caught.value.__cause__ or caught.value)


def test_the_methods_look_like_the_class_s_own():
    assert "Bot.close" == Bot.close.__qualname__
    assert "Release what this object owns; once." == Bot.close.__doc__
    assert __name__ == Bot.close.__module__


@pytest.mark.parametrize("first", ["owns", "bounded_registry"])
def test_the_members_of_a_bounded_registry_are_released(first: str) -> None:
    """The two decorators that an old class is mended with, in either order, on one attribute."""

    class Bot:
        def __init__(self) -> None:
            self.sessions: dict[int, Any] = {}
            self.totals: dict[int, int] = {}

    decorators = [owns("sessions", "totals"), bounded_registry("sessions", "totals", maxsize=3)]
    for decorate in decorators if first == "owns" else reversed(decorators):
        decorate(Bot)
    closed: list[int] = []
    with Bot() as bot:  # type: ignore[attr-defined]
        for number in range(5):
            bot.sessions[number] = type("Session", (), {"close": lambda _, n=number: closed.append(n)})()
            bot.totals[number] = number

    assert [4, 3, 2] == closed
    assert {} == bot.sessions == bot.totals
