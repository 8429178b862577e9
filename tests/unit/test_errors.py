"""What errors say, and what of a user's text is shown how."""

import pytest

from perlhf.errors import DataError, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe ☕ 日本", "Größe ☕ 日本"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\x00\x07\x7f\x9b", "a\\x00\\x07\\x7f\\x9b"),
        ("half \ud83d", "half \\ud83d"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\nb\tc", "a\\nb\\tc"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    assert visible(text) == shown


def test_an_error_keeps_its_lines_but_a_place_has_one():
    error = DataError("first\n  second \x1b[2J", where="a\nerror: fake.json:1", allowed="\x9b", hint="see \u2066")
    assert str(error) == "a\\nerror: fake.json:1: first\n  second \\x1b[2J\n  allowed: \\x9b\n  try: see \\u2066"
    assert error.where == "a\nerror: fake.json:1", "as it was given"
