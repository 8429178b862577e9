"""Masking of what identifies people: mail addresses, phone numbers, card numbers.

Rules that can be said in a sentence each, not a search for names. A mail address is what has an @ between a local part
and a dotted domain, whose last part begins with two letters. Groups of digits on one line, with at most three spaces,
dashes, dots, slashes or brackets between one and the next, are a run; in it

- a card number is whole groups of 13 to 19 digits together with a right check digit (Luhn);
- a phone number is whole groups of 8 to 15 digits together, beside cards, that begin with + or 0, or that are three or
  more and all that stands there, or all between two spaces.

Dates (2026-11-28, 28.11.2026, 28/11/2026, 28-11-2026), fractions of seven or more places (3.14159265) and what is
nothing but years, or decimal numbers and addresses in private networks (10.00 - 18.00, 192.168.0.1), stay. Digits that
touch a letter of the Latin alphabet are no group: names of files, hashes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

MASKS = {"mail": "[mail address]", "card": "[card number]", "phone": "[phone number]"}
# Each begins where none of its letters stands before it: a long word is looked through once.
_LETTERS = r"\w\u0300-\u036f"  # also with accents of their own
_MAIL = re.compile(
    rf"(?<![{_LETTERS}.+%-])[{_LETTERS}.+%-]+@[{_LETTERS}-]+(?:\.[{_LETTERS}-]+)*\.[^\W\d_]{{2}}[{_LETTERS}-]*"
)
_DAY, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:1\d|20)\d\d"
_DATE = (
    r"(?:\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{4}"
    rf"|{_YEAR}[./-]{_DAY}[./-]{_DAY}|{_DAY}-{_DAY}-{_YEAR})"
)
_WHOLE = r"(?:0|[1-9]\d{0,2})"
_KEPT = rf"(?<![\d+])(?<!\d[-./])(?:{_DATE}(?:[-/]{_DATE})*|{_WHOLE}\.\d{{7,}})(?!\d|[-./]\d)"
_DIGITS = rf"(?!\+?\(?{_KEPT})\+?\(?\d+(?![\dA-Za-z])"
_SPACE = r"[^\S\n\r\f\v\x85\u2028\u2029]"
_BETWEEN = rf"(?:{_SPACE}|[-\u2010-\u2015\u2212./()]){{1,3}}"
_RUN = re.compile(rf"(?P<kept>{_KEPT})|(?<![\dA-Za-z]){_DIGITS}(?:{_BETWEEN}{_DIGITS})*")
# IPv4 addresses of private networks, and masks; others look like phone numbers (91.234.56.78 in Spain).
_BYTE = r"\.(?:0|1\d{0,2}|2[0-4]\d|25[0-5]|[2-9]\d?)"
_ADDRESS = rf"(?:(?:10|127|255){_BYTE}|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:{_BYTE}){{2}}"
_NUMBER = rf"(?:{_WHOLE}\.\d+|{_ADDRESS})"
_APART = rf"(?:{_SPACE}|[-\u2010-\u2015\u2212/()]){{1,3}}"
_LIST = re.compile("|".join(rf"\(?{one}(?:{_APART}{one})*" for one in (r"(?:1[5-9]|20)\d\d", _NUMBER)))


@dataclass(frozen=True)
class _Group:
    """Digits with nothing between them, and the sign or bracket before them."""

    start: int
    end: int
    """Where they stand in the run."""
    digits: str
    sign: str
    apart: bool
    """A space stands before it."""

    @property
    def dialled(self) -> bool:
        """Whether phone numbers begin so."""
        return "+" in self.sign or self.digits[0] == "0"


def redacted(text: str) -> str:
    """The text with each such place replaced by what it was."""
    return _RUN.sub(_masked, _MAIL.sub(MASKS["mail"], text))


def _masked(found: re.Match[str]) -> str:
    run = found.group()
    if found["kept"] or _LIST.fullmatch(run):
        return run
    groups = _groups(run)
    parts, at = [], 0
    for first, end, name in _places(groups):
        parts += [run[at : groups[first].start], MASKS[name]]
        at = groups[end - 1].end
    return "".join(parts) + run[at:]


def _groups(run: str) -> list[_Group]:
    groups: list[_Group] = []
    for one in re.finditer(r"(\+?\(?)(\d+)", run):
        gap = run[groups[-1].end : one.start()] if groups else ""
        digits = "".join(str(int(digit)) for digit in one[2])  # of any script
        groups.append(_Group(one.start(), one.end(), digits, one[1], any(map(str.isspace, gap))))
    return groups


def _places(groups: Sequence[_Group]) -> Iterator[tuple[int, int, str]]:
    """From which group to before which, in order, and what it is.

    One in ten numbers has a right check digit by chance, also one that is a phone number with a part of the next. So
    cards as they are usually written come first, then phone numbers, then what is left of any other card.
    """
    before = 0
    for first, end in [*_cards(groups, usual=True), (len(groups), len(groups))]:
        rest = groups[before:first]
        names = [""] * len(rest)
        for name, found in (("card", _cards(rest, usual=False)), ("phone", _phones(rest))):
            for number, (start, stop) in enumerate(found):
                names[start:stop] = [f"{name} {number}"] * (stop - start)
        for name, alike in groupby(range(len(rest)), key=names.__getitem__):
            if name:
                at = list(alike)
                yield before + at[0], before + at[-1] + 1, name.split()[0]
        if end > first:
            yield first, end, "card"
        before = end


def _cards(groups: Sequence[_Group], usual: bool) -> list[tuple[int, int]]:
    """Groups with the length and the check digit of a card; where such numbers overlap, all of them together.

    Args:
        usual: those alone that are written as cards are.
    """
    found: list[tuple[int, int]] = []
    places = list(accumulate((len(group.digits) for group in groups), initial=0))
    sums = _luhn_sums("".join(group.digits for group in groups))
    for first, start in enumerate(places[:-1]):
        for end in range(first + 1, len(places)):
            stop = places[end]
            if stop - start > 19:
                break
            if stop - start < 13 or (sums[stop % 2][stop] - sums[stop % 2][start]) % 10:
                continue
            if usual and not _as_on_a_card(groups[first:end]):
                continue
            if found and first < found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], end))
            else:
                found.append((first, end))
    return found


def _as_on_a_card(groups: Sequence[_Group]) -> bool:
    """In one piece, in fours with a shorter end, or as American Express and Diners Club write them."""
    lengths = [len(group.digits) for group in groups]
    fours = {*lengths[:-1]} <= {4} and lengths[-1] <= 4
    return (len(lengths) == 1 or fours or lengths in ([4, 6, 5], [4, 6, 4])) and not any(
        group.sign for group in groups[1:]
    )


def _phones(groups: Sequence[_Group]) -> list[tuple[int, int]]:
    """From which group to before which, in order."""
    if not groups or _rings(groups):
        return [(0, len(groups))] * bool(groups)
    found: list[tuple[int, int]] = []
    for first, end in pairwise(_begins(groups)):
        piece = groups[first:end]
        if piece[0].dialled:
            stop = _dialled(piece)
            found += [(first, first + stop)] * bool(stop)
            first, piece = first + stop, piece[stop:]
        # Two numbers of three groups each: 555-123-4567 555-123-4568.
        cuts = [0, *(at for at, group in enumerate(piece) if group.apart and at), len(piece)]
        for bounds in [(0, len(piece))] if piece and _rings(piece) else pairwise(cuts):
            if piece and _rings(piece[slice(*bounds)]):
                found.append((first + bounds[0], first + bounds[1]))
    return found


def _begins(groups: Sequence[_Group]) -> list[int]:
    """Where something begins as phone numbers do, but not within one that is too short yet; and both ends."""
    cuts, length = [0], 0
    for at, group in enumerate(groups):
        if at and (group.sign or group.dialled) and (length >= 8 or not groups[cuts[-1]].dialled):
            cuts.append(at)
            length = 0
        length += len(group.digits)
    return [*cuts, len(groups)]


def _dialled(groups: Sequence[_Group]) -> int:
    """How many of the groups are the number that they begin with: all that may be, unless the rest is one, too."""
    ends = [end for end in range(1, min(len(groups), 15) + 1) if 8 <= _length(groups[:end]) <= 15]
    return next((end for end in reversed(ends) if end < len(groups) and _rings(groups[end:])), max(ends, default=0))


def _rings(groups: Sequence[_Group]) -> bool:
    return 8 <= _length(groups) <= 15 and (groups[0].dialled or len(groups) >= 3)


def _length(groups: Sequence[_Group]) -> int:
    return sum(len(group.digits) for group in groups)


def _luhn_sums(digits: str) -> tuple[list[int], list[int]]:
    """Sums of the first 0, 1, 2, ... digits, for numbers that end before an even place, and before an odd one: of a
    number's digits each second from the right is doubled, and the digits of products are added (Luhn)."""
    single = [int(digit) for digit in digits]
    double = [sum(divmod(2 * digit, 10)) for digit in single]
    even, odd = (
        list(
            accumulate(
                (pair[(at + end) % 2 == 0] for at, pair in enumerate(zip(single, double, strict=True))), initial=0
            )
        )
        for end in (0, 1)
    )
    return even, odd
