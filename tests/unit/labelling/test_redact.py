from random import Random
from time import process_time

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
        ("My card is 4111 1111 1111 1111 12/27 ok?", "My card is [card number] 12/27 ok?"),
        ("4111 1111 1111 1111 123", "[card number] 123"),
        ("Card: 4111111111111111 123", "Card: [card number] 123"),
        ("4111 1111 1111 1111 5500 0000 0000 0004", "[card number] [card number]"),
        ("3782 822463 10005 1234", "[card number] 1234"),
        ("4111 - 1111 - 1111 - 1111", "[card number]"),
        ("4111\u00a01111\u202f1111\u20091111", "[card number]"),
        ("4111\u20131111\u20111111\u20141111", "[card number]"),
        ("\uff14\uff11\uff11\uff11 1111 1111 1111", "[card number]"),  # digits as wide as Chinese letters
        ("\u5361\u53f7\u662f4111111111111111\u5417", "\u5361\u53f7\u662f[card number]\u5417"),
        ("_4111111111111111_", "_[card number]_"),
        ("Nr.4111111111111111", "Nr.[card number]"),
        ("Tel.030 1234567", "Tel.[phone number]"),
        ("5 0301234567", "5 [phone number]"),
        ("0151 12345678 030 1234567", "[phone number] [phone number]"),
        ("+49 151 12345678 +49 30 1234567", "[phone number] [phone number]"),
        ("0301234567 555 123 4567", "[phone number] [phone number]"),
        ("555-123-4567 555-123-4568", "[phone number] [phone number]"),
        ("(555) 123-4567 (555) 123-4568", "[phone number] [phone number]"),
        ("0151 12345678 4111 1111 1111 1111", "[phone number] [card number]"),
        ("0301234567 28.11.2026", "[phone number] 28.11.2026"),
        ("+49 (0)30 1234567", "[phone number]"),
        ("at 2026-11-28 12:30:45 (28.11.2026)", "at 2026-11-28 12:30:45 (28.11.2026)"),
        ("0.30000000000000004 or 0.33333333", "0.30000000000000004 or 0.33333333"),
        ("1. 2010\n2. 2011\n3. 2012\n4. 2013", "1. 2010\n2. 2011\n3. 2012\n4. 2013"),
        ("1.299,00 or 12.50, order 2026-000123", "1.299,00 or 12.50, order 2026-000123"),
        ("commit a4111111111111111 of x4111", "commit a4111111111111111 of x4111"),
        ("from jose\u0301@example.org", "from [mail address]"),  # an accent of its own
        ("npm i lodash@4.17.21; scores = q@k.T", "npm i lodash@4.17.21; scores = q@k.T"),
        ("2026/11/28, 2026.11.28, 28-11-2026 and 2026-1-2", "2026/11/28, 2026.11.28, 28-11-2026 and 2026-1-2"),
        ("2026-11-28/2026-12-01 or 2026-11-28-2026-12-01", "2026-11-28/2026-12-01 or 2026-11-28-2026-12-01"),
        ("28-11-2026 0301234567", "28-11-2026 [phone number]"),
        ("open 10.00 - 18.00, from 12.50-13.50 EUR", "open 10.00 - 18.00, from 12.50-13.50 EUR"),
        ("[0.12 -0.34 0.56] with 0.001-0.005", "[0.12 -0.34 0.56] with 0.001-0.005"),
        ("at 52.5200 13.4050 in 2010 2011 2012", "at 52.5200 13.4050 in 2010 2011 2012"),
        ("ping 192.168.0.1 192.168.1.20:8080", "ping 192.168.0.1 192.168.1.20:8080"),
        ("10.0.0.1 - 10.0.0.255, 172.31.255.254 255.255.255.0", "10.0.0.1 - 10.0.0.255, 172.31.255.254 255.255.255.0"),
        ("call 12.34.56.78, 02.123.45.67 or 91.234.56.78", "call [phone number], [phone number] or [phone number]"),
        ("call 030 12.34 56.78 or 212.555 1934", "call [phone number] or [phone number]"),  # more than decimal numbers
    ],
)
def test_masks_what_it_says(text: str, masked: str) -> None:
    assert redacted(text) == masked


@pytest.mark.parametrize("piece", ["(", "+", "+(", "1 ", "0-", "+1", "(1", "1.", "a@", "2026-11-28-", "1.1 ", "\u0301"])
def test_a_long_text_takes_time_in_proportion(piece: str) -> None:
    began = process_time()
    redacted(piece * 10_000)
    assert process_time() - began < 5  # under 0.5 s; 10 s where each bracket looked through all that follow


def test_a_card_is_found_whatever_stands_beside_it() -> None:
    """Each number of 13 to 19 digits with a right check digit, in one piece or in fours, among other groups."""
    random = Random(0)
    for _ in range(300):
        digits = [random.randrange(10) for _ in range(random.randint(12, 18))]
        # From the right, before the check digit: doubled, not, doubled; a product of two digits counts both.
        doubled = [(2 * d - 9 if d > 4 else 2 * d) if i % 2 == 0 else d for i, d in enumerate(reversed(digits))]
        number = "".join(map(str, digits)) + str(-sum(doubled) % 10)
        fours = " ".join(number[at : at + 4] for at in range(0, len(number), 4))
        beside = [str(random.randrange(10 ** random.randint(1, 8))) for _ in range(4)]
        for card in (number, fours):
            text = " ".join([*beside[:2], card, *beside[2:]])
            assert card not in redacted(text) and "[card number]" in redacted(text), text
            shown = redacted(text).split()
            assert not [four for four in card.split() if four in shown and four not in beside], text
