"""Masking of what identifies people: mail addresses, phone numbers, card numbers.

Rules that can be said in a sentence each, not a search for names: a mail address is what has an @ between a local part
and a dotted domain; a card number has 13 to 19 digits and a right check digit (Luhn); a phone number has 8 to 15 digits
and starts with + or 0, or is written in groups with at least two separators.
"""

import re

_MAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
_DIGITS = re.compile(r"(?<![\w.])\+?\(?\d(?:[ \-./()]{0,2}\d){7,18}(?![\w])")
MASKS = {"mail": "[mail address]", "card": "[card number]", "phone": "[phone number]"}


def redacted(text: str) -> str:
    """The text with each such place replaced by what it was."""
    return _DIGITS.sub(_masked, _MAIL.sub(MASKS["mail"], text))


def _masked(found: re.Match[str]) -> str:
    written = found.group()
    digits = re.sub(r"\D", "", written)
    if 13 <= len(digits) <= 19 and _check_digit_holds(digits):
        return MASKS["card"]
    separators = len(re.findall(r"(?<=\d)[ \-./()]+(?=\d)", written))
    looks_dialled = written.startswith(("+", "0", "(0", "(+")) or separators >= 2
    date = re.fullmatch(r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{4}", written)
    return MASKS["phone"] if 8 <= len(digits) <= 15 and looks_dialled and not date else written


def _check_digit_holds(digits: str) -> bool:
    """Luhn: from the right, each second digit doubled, digits of products added."""
    doubled = [int(d) if i % 2 == 0 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0
