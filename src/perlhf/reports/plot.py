"""Draws one figure as an SVG element: axes, lines, dots, words. It knows neither runs nor pages.

A report of two hundred runs has thousands of figures, and a drawing library took a tenth of a second for each. Colours
are CSS (`currentColor`, variables of the page), so one figure serves the light and the dark page, and it has no ids, so
that any number of them can stand on a page. Equal numbers give equal bytes.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import escape

Point = tuple[float, float]
Limits = tuple[float, float]

TEXT, RULE = "currentColor", "var(--rule)"
WIDE, SQUARER = (260, 148), (260, 195)
"""Sizes in the figure's own units, which the page scales to its columns; a label's letters are 8 high."""
_LETTER, _SMALL = 8, 6
_ADVANCE = 0.58
"""Width of a digit by its height, in the sans-serif fonts that pages are shown in."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_MOST_TICKS = 5
_LARGEST = 1e290


@dataclass(frozen=True)
class _Mark:
    """Something drawn: its points, and the SVG of them once they are in the figure's units."""

    points: Sequence[Point]
    kind: str
    look: str = ""
    radii: Sequence[float] = ()
    words: str = ""
    shift: Point = (0.0, 0.0)


@dataclass
class Plot:
    """Axes that grow with what is added to them; `svg` draws them.

    The limits are those of all points with a twentieth on each side, where `xlim` or `ylim` doesn't fix them; points
    beyond fixed limits must not be added.
    """

    size: tuple[int, int] = WIDE
    xlabel: str = ""
    ylabel: str = ""
    xlim: Limits | None = None
    ylim: Limits | None = None
    whole_steps: bool = False
    """Whether x counts something, so that it has no ticks between whole numbers."""
    xmargin: float = 0.05
    _marks: list[_Mark] = field(default_factory=list[_Mark])

    def line(
        self, points: Sequence[Point], colour: str, width: float, opacity: float = 1.0, dashes: str | None = None
    ) -> None:
        """Joins the points; `dashes` are lengths of strokes and gaps."""
        look = f'fill="none" stroke="{colour}" stroke-width="{width:g}"' + _opacity("stroke-opacity", opacity)
        self._marks.append(_Mark(points, "line", look + (f' stroke-dasharray="{dashes}"' if dashes else "")))

    def dots(
        self, points: Sequence[Point], colour: str, radii: float | Sequence[float], opacity: float = 1.0, ring: str = ""
    ) -> None:
        """A disc at each point, of one radius or each of its own; `ring` is the colour of its rim."""
        each = [radii] * len(points) if isinstance(radii, int | float) else radii
        look = f'fill="{colour}"' + _opacity("fill-opacity", opacity)
        self._marks.append(_Mark(points, "dots", look + (f' stroke="{ring}" stroke-width="1.1"' if ring else ""), each))

    def words(self, at: Point, words: str, right: float, up: float) -> None:
        """Words that begin beside a point."""
        self._marks.append(_Mark([at], "words", words=words, shift=(right, -up)))

    def upright(self, x: float) -> None:
        """A dotted line from bottom to top."""
        self._marks.append(_Mark([(x, math.nan)], "upright"))

    def arrow(self, start: Point, end: Point) -> None:
        """From near one point to near another."""
        self._marks.append(_Mark([start, end], "arrow"))

    def svg(self) -> str:
        """The `<svg>` element."""
        xs, ys = (self._values(axis) for axis in (0, 1))
        xlim, ylim = self.xlim or limits(xs, self.xmargin), self.ylim or limits(ys, 0.05)
        across, up = ticks(*xlim, self.whole_steps), ticks(*ylim)
        columns, rows = labels(across), labels(up)
        width, height = self.size
        left = 8 + max(map(len, rows), default=0) * _LETTER * _ADVANCE + (11 if self.ylabel else 0)
        right, top, bottom = width - 6, 6, height - 16 - (11 if self.xlabel else 0)

        def place(point: Point) -> Point:
            return (
                left + (right - left) * ((point[0] - xlim[0]) / (xlim[1] - xlim[0])),
                bottom - (bottom - top) * ((point[1] - ylim[0]) / (ylim[1] - ylim[0])),
            )

        heights = [place((xlim[0], tick))[1] for tick in up]
        grid = "".join(f"M{_short(left)} {_short(y)}H{right}" for y in heights)
        parts = [
            f'<svg aria-hidden="true" focusable="false" viewBox="0 0 {width} {height}">',
            f'<path d="{grid}M{_short(left)} {bottom}H{right}" fill="none" stroke="{RULE}" stroke-width="0.8"/>',
            f'<g fill="{TEXT}" font-size="{_LETTER}" text-anchor="middle">',
            *(
                _text(place((tick, ylim[0]))[0], bottom + 11, label)
                for tick, label in zip(across, columns, strict=True)
            ),
            *([_text((left + right) / 2, height - 3, self.xlabel)] if self.xlabel else []),
            *([_turned(8, (top + bottom) / 2, self.ylabel)] if self.ylabel else []),
            f'</g><g fill="{TEXT}" font-size="{_LETTER}" text-anchor="end">',
            *(_text(left - 4, y + 2.8, label) for y, label in zip(heights, rows, strict=True)),
            "</g>",
            *(_drawn(mark, [place(point) for point in mark.points], top, bottom) for mark in self._marks),
            "</svg>",
        ]
        return "\n".join(parts)

    def _values(self, axis: int) -> list[float]:
        return [point[axis] for mark in self._marks for point in mark.points if not math.isnan(point[axis])]


def limits(values: Sequence[float], margin: float) -> Limits:
    """The least and the largest value with a margin of so much of their distance; never of no width.

    What is too large or too close together for float64's differences is taken as less of it.
    """
    low, high = (min(max(end, -_LARGEST), _LARGEST) for end in (min(values), max(values)))
    if high - low <= max(1e-9 * abs(low), 1e-9 * abs(high), 1 / _LARGEST):
        room = 0.05 * abs(low) if abs(low) > 1 / _LARGEST else 0.05
    else:
        room = margin * (high - low)
    return low - room, high + room


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers between two limits, about six at most; `whole` has no fractions."""
    least = (high - low) / _MOST_TICKS
    size = 10.0 ** math.floor(math.log10(least))
    step = next(size * step for step in _STEPS if size * step >= 0.95 * least)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Numbers with equal decimals, as many as tell them apart."""
    largest = max(map(abs, values), default=0.0)
    step = min((after - before for before, after in itertools.pairwise(values)), default=largest) or 1.0
    if largest >= 1e7 or step < 1e-4:
        digits = max(0, math.floor(math.log10(largest or 1.0)) - math.floor(math.log10(step) + 1e-9))
        return [
            _signed(_scientific(value, digits + _decimals(step / 10 ** math.floor(math.log10(step)))))
            for value in values
        ]
    return [_signed(f"{value:,.{_decimals(step)}f}") for value in values]


def _decimals(step: float) -> int:
    """Digits behind the point that a number needs, at most six."""
    return next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 6)


def _scientific(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _drawn(mark: _Mark, at: list[Point], top: float, bottom: float) -> str:
    match mark.kind:
        case "line":
            path = "L".join(f"{_short(x)} {_short(y)}" for x, y in thinned(at))
            return f'<path d="M{path}" {mark.look}/>'
        case "dots":
            discs = (
                f'<circle cx="{_short(x)}" cy="{_short(y)}" r="{_short(r)}"/>'
                for (x, y), r in zip(at, mark.radii, strict=True)
            )
            return f"<g {mark.look}>{''.join(discs)}</g>"
        case "words":
            (x, y), (right, down) = at[0], mark.shift
            return f'<g fill="{TEXT}" font-size="{_SMALL}">{_text(x + right, y + down, mark.words)}</g>'
        case "upright":
            path, look = f"M{_short(at[0][0])} {bottom}V{top}", 'stroke-opacity="0.6" stroke-dasharray="1.6 2.4"'
            return f'<path d="{path}" stroke="{TEXT}" stroke-width="0.8" {look}/>'
        case _:
            return _arrow(at[0], at[1])


def _arrow(start: Point, end: Point, gap: float = 5.0) -> str:
    across, down = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, down)
    if length <= 2 * gap:
        return ""
    x, y = across / length, down / length
    (x0, y0), (x1, y1) = (start[0] + gap * x, start[1] + gap * y), (end[0] - gap * x, end[1] - gap * y)
    head = [(x1, y1), (x1 - 5 * x + 2 * y, y1 - 5 * y - 2 * x), (x1 - 5 * x - 2 * y, y1 - 5 * y + 2 * x)]
    corners = "L".join(f"{_short(a)} {_short(b)}" for a, b in head)
    return (
        f'<path d="M{_short(x0)} {_short(y0)}L{_short(x1 - 4 * x)} {_short(y1 - 4 * y)}" stroke="{TEXT}" '
        f'stroke-width="1.1"/><path d="M{corners}Z" fill="{TEXT}"/>'
    )


def thinned(at: Sequence[Point]) -> Iterable[Point]:
    """A line's points without those that nobody sees: of many in one column the first, lowest, highest and last."""
    if len(at) <= 1000:
        return at
    kept: list[Point] = []
    for _, column in itertools.groupby(at, key=lambda point: round(2 * point[0])):
        points = list(column)
        ends = {0, len(points) - 1}
        ends |= {pick(range(len(points)), key=lambda i: points[i][1]) for pick in (min, max)}
        kept += [points[i] for i in sorted(ends)]
    return kept


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{_short(x)}" y="{_short(y)}">{escape(words)}</text>'


def _turned(x: float, y: float, words: str) -> str:
    return f'<text transform="translate({_short(x)} {_short(y)}) rotate(-90)">{escape(words)}</text>'


def _opacity(name: str, value: float) -> str:
    return "" if value == 1 else f' {name}="{value:g}"'


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
