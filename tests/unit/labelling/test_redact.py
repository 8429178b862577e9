import pytest

from perlhf.labelling.redact import redacted


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to ana.b+c@mail.example.org, please", "write to [mail address], please"),
        ("call +49 30 1234567 now", "call [phone number] now"),
        ("call (030) 1234-5678", "call [phone number]"),
        ("0301234567", "[phone number]"),
        ("card 4111 1111 1111 1111.", "card [card number]."),
        (
            "card 4111-1111-1111-1112",
            "card 4111-1111-1111-1112",
        ),  # the check digit is wrong, and 16 digits ring nowhere
        ("in 2026-11-28 and 28.11.2026", "in 2026-11-28 and 28.11.2026"),
        ("population 83000000", "population 83000000"),
        ("pi is 3.14159265358979", "pi is 3.14159265358979"),
        ("a@b is no address", "a@b is no address"),
    ],
)
def test_masks_what_it_says(text: str, masked: str) -> None:
    assert redacted(text) == masked
