"""Who owns an entry: leases, and tokens that make a late save fail."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.errors import OwnershipLost, VersionConflict
from hygiene.stores import Delete, SaveValue
from hygiene.stores.servers import ServerStore

PATIENCE = 30.0


def change(store: ServerStore, value: Any, base: int | None = None, key: Any = "a") -> SaveValue:
    return SaveValue("s", key, store.encode(value), base)


def value_of(store: ServerStore, key: Any = "a") -> Any:
    record = store.load("s", key)
    return None if record is None else record.value


def test_one_has_the_lease_and_each_token_is_greater_than_the_last(real: ServerStore) -> None:
    first = real.lease("s", "a")
    assert first is not None
    assert real.lease("s", "a") is None
    other = real.lease("s", "b")
    assert real.release("s", "a", first)
    assert not real.release("s", "a", first)
    second = real.lease("s", "a", owner="me")

    assert other is not None
    assert second is not None
    assert first < second
    real.renew("s", "a", second, ttl="1m")
    with pytest.raises(OwnershipLost, match=r"the lease of 'a' in 's' was wanted to renew it"):
        real.renew("s", "a", first)


def test_a_save_under_a_lease_is_saved_while_it_holds(real: ServerStore) -> None:
    token = real.lease("s", "a")
    assert token is not None
    (head,) = real.save([change(real, 1, 0)], fence={("s", "a"): token})
    assert head is not None
    assert 1 == head.version
    real.release("s", "a", token)

    with pytest.raises(OwnershipLost, match="wanted to save"):
        real.save([change(real, 2, 1)], fence={("s", "a"): token})
    with pytest.raises(OwnershipLost):
        real.save([Delete("s", "a")], fence={("s", "a"): token})
    assert 1 == value_of(real)


def test_one_lost_lease_refuses_the_whole_batch(real: ServerStore) -> None:
    """And names what it was about; entries without a lease in the batch are not saved either."""
    tokens = {("s", key): real.lease("s", key) or 0 for key in "ab"}
    assert real.release("s", "b", tokens["s", "b"])
    with pytest.raises(OwnershipLost, match="the lease of 'b' in 's'"):
        real.save([change(real, 1, key=key) for key in "abc"], fence=tokens)

    assert [None] * 3 == [value_of(real, key) for key in "abc"]


def test_the_new_owners_save_stands_and_the_old_one_is_told_why(real: ServerStore) -> None:
    """Its version does not fit either, but what it has to know is that the lease is over."""
    old = real.lease("s", "a")
    assert old is not None
    real.save([change(real, "old", 0)], fence={("s", "a"): old})
    real.release("s", "a", old)
    new = real.lease("s", "a")
    assert new is not None
    real.save([change(real, "new", 1)], fence={("s", "a"): new})

    with pytest.raises(OwnershipLost):
        real.save([change(real, "late", 1)], fence={("s", "a"): old})
    with pytest.raises(VersionConflict):
        real.save([change(real, "stale", 1)], fence={("s", "a"): new})
    with pytest.raises(VersionConflict):
        real.save([change(real, "without a lease", 1)])
    assert value_of(real) == "new"


def test_a_lease_ends_by_itself(real: ServerStore, wait: Callable[[Callable[[], object]], None]) -> None:
    """Nobody has to notice that its owner is gone."""
    first = real.lease("s", "a", ttl="50ms")
    assert first is not None
    found: list[int] = []
    wait(lambda: found.extend(filter(None, [real.lease("s", "a", ttl=60)])) or found)

    assert found[0] > first
    with pytest.raises(OwnershipLost):
        real.save([change(real, 1)], fence={("s", "a"): first})
    with pytest.raises(OwnershipLost):
        real.renew("s", "a", first)
    assert not real.release("s", "a", first)


@pytest.mark.slow
def test_a_lease_that_is_renewed_goes_on(real: ServerStore) -> None:
    token = real.lease("s", "a", ttl=0.5)
    assert token is not None
    end = time.monotonic() + 0.6
    real.renew("s", "a", token, ttl=60)
    while time.monotonic() < end:
        assert real.lease("s", "a") is None

    real.save([change(real, 1)], fence={("s", "a"): token})


OWNER = """
import sys
from hygiene.errors import OwnershipLost
from hygiene.stores import SaveValue
from hygiene.stores.postgres import PostgresStore
from hygiene.stores.redis import RedisStore

kind = RedisStore if sys.argv[1].startswith("redis") else PostgresStore
with kind(sys.argv[1], prefix=sys.argv[2]) as store:
    token = store.lease("s", "a", ttl=float(sys.argv[3]))
    print(token, flush=True)
    sys.stdin.readline()
    try:
        store.save([SaveValue("s", "a", store.encode("late"))], fence={("s", "a"): token})
    except OwnershipLost as error:
        print("refused", flush=True)
    else:
        print("saved", flush=True)
"""


@pytest.mark.slow
def test_an_owner_that_was_stopped_past_its_lease_is_refused(
    server: Any, real: ServerStore, prefix: str, elsewhere: Callable[..., Any],
    wait: Callable[[Callable[[], object]], None],
) -> None:  # fmt: skip
    """It goes on as if nothing had happened; the new owner's data stands."""
    owner = elsewhere(OWNER, server.url, prefix, 0.3)
    old = int(owner.stdout.readline())
    owner.send_signal(signal.SIGSTOP)
    found: list[int] = []
    wait(lambda: found.extend(filter(None, [real.lease("s", "a")])) or found)
    real.save([change(real, "new", 0)], fence={("s", "a"): found[0]})
    owner.stdin.write("go\n")
    owner.stdin.flush()
    owner.send_signal(signal.SIGCONT)

    assert owner.stdout.readline() == "refused\n"
    assert old < found[0]
    assert value_of(real) == "new"


def test_a_save_that_waits_in_a_stopped_server_past_its_lease_is_refused(own_redis: Any) -> None:
    """The server finds it when it goes on, and looks at the lease then."""
    with own_redis.open("t", timeout=PATIENCE) as store:
        token = store.lease("s", "a", ttl=0.2)
        end = time.monotonic() + 0.25
        failed: list[BaseException] = []

        def save() -> None:
            try:
                store.save([change(store, "late", 0)], fence={("s", "a"): token})
            except OwnershipLost as error:
                failed.append(error)

        own_redis.pause()
        thread = threading.Thread(target=save)
        thread.start()
        while time.monotonic() < end:
            thread.join(0.01)
        own_redis.resume()
        thread.join(PATIENCE)

        assert 1 == len(failed)
        assert value_of(store) is None
        assert (store.lease("s", "a") or 0) > token


def test_a_server_that_has_lost_its_data_gives_no_token_twice(own_redis: Any) -> None:
    """They follow its clock."""
    with own_redis.open("t") as store:
        old = store.lease("s", "a")
        store._client.flushall()
        new = store.lease("s", "a")

        assert new > old
        with pytest.raises(OwnershipLost):
            store.save([change(store, "late")], fence={("s", "a"): old})
