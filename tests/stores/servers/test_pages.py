"""The pages about servers do what they show: their blocks run here, against real servers."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import psycopg
import pytest

pytestmark = pytest.mark.once

PAGES = {
    "several-bots-one-redis.md": '"redis://localhost:6379/0"',
    "sqlite-to-postgres.md": '"postgresql://bot@db.example.com/chats"',
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def redis_address(own_redis):
    return own_redis.url


@pytest.fixture
def postgres_address(postgres_server, prefix):
    """A database with nothing in it."""
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE page_{prefix}")
    return postgres_server.url.rpartition("/")[0] + f"/page_{prefix}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("server", ["redis", "postgres"])
def test_a_page_runs(page, server, project_root, request, tmp_path, monkeypatch):
    """Every block runs, top to bottom, on the server that the page is about, and as well on the other."""
    address = request.getfixturevalue(f"{server}_address")
    path = project_root / "docs" / "how-to" / page
    text = path.read_text()
    assert 1 == text.count(PAGES[page])
    text = text.replace(PAGES[page], repr(address))
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    del module.__spec__  # since 3.15 a traceback asks a module that has one for its loader
    monkeypatch.setitem(sys.modules, "page", module)

    for block in BLOCK.finditer(text):
        lines = text.count("\n", 0, block.start(1))  # so that an error names the line of the page
        exec(compile("\n" * lines + block[1], str(path), "exec"), vars(module))

    assert len(vars(module)) > 10
