"""Text for a terminal: nothing in it changes the terminal, and numbers are easy to read."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene.text import json_printable, per_time, plural, printable


@given(st.text(st.characters(codec=None)))
def test_nothing_printable_changes_the_terminal(text: str) -> None:
    """No control character, no line separator, no change of direction, no half of a pair is left."""
    for shown in (printable(text), printable(text, lines=True).replace("\n", "").replace("\t", "")):
        assert not {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(one) for one in shown}
        assert not {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"} & {
            unicodedata.bidirectional(one) for one in shown
        }


@given(st.text())
def test_text_without_control_characters_stays(text: str) -> None:
    if text.isprintable():
        assert text == printable(text) or any(unicodedata.category(one) == "Cf" for one in text)


@given(st.text())
def test_json_means_the_same(text: str) -> None:
    shown = json_printable(json.dumps({"name": text}, ensure_ascii=False))

    assert {"name": text} == json.loads(shown)
    assert not {"\x7f", "\x9b", "\x1b"} & set(shown)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (18_800.4, "+18,800 a second"),
        (3, "+3 a second"),
        (3.24, "+3.2 a second"),
        (0.2, "+12 a minute"),
        (0.01, "+36 an hour"),
        (0.0001, "+8.6 a day"),
        (-4, "-4 a second"),
    ],
)
def test_a_rate_is_given_in_the_unit_that_suits_it(rate: float, expected: str) -> None:
    assert expected == per_time(rate)


def test_one_is_no_plural() -> None:
    assert ["1 access", "2,000 accesses", "0 keys"] == [
        plural(1, "access", "accesses"),
        plural(2000, "access", "accesses"),
        plural(0, "key"),
    ]
