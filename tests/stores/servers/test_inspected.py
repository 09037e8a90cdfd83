"""``hygiene inspect`` on a server."""

from __future__ import annotations

import json

import pytest

from hygiene.cli import main
from hygiene.cli.contents import restored
from hygiene.stores import SaveLog, SaveValue

pytestmark = pytest.mark.once


@pytest.mark.slow
def test_a_server_can_be_looked_into(server, tmp_path, capsys) -> None:
    """As a file can: what there is, and all of it as JSON lines. The address is shown without its password."""
    file = tmp_path / "all.jsonl"
    with server.open("hygiene") as store:
        store.save([SaveLog("seen", ("a", n), append=[store.encode({"n": b"x" * n})] * (n + 1)) for n in range(5)])
        store.save([SaveValue("others", "k", store.encode(1))])
    try:
        main(["inspect", server.url, "--space", "seen", "--limit", "2", "--json", "--export", str(file)])
    except SystemExit as ended:
        code = ended.code

    out, err = capsys.readouterr()
    found = json.loads(out)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert 0 == code
    assert f"5 entries: {file}\n" == err
    assert store.address == found["store"]
    assert [("a", 4), ("a", 3)] == [restored(entry["key"]) for entry in found["entries"]]
    assert [("seen", 5, 15)] == [(space["name"], space["entries"], space["items"]) for space in found["spaces"]]
    assert {("a", n): [{"n": b"x" * n}] * (n + 1) for n in range(5)} == {
        restored(line["key"]): restored(line["value"]) for line in lines
    }
