"""Numbers in words, as tables, pages and messages show them; what isn't there is a dash."""

from perlhf.runs.evaluations import Measured


def number(value: float | None, scale: float | None = None) -> str:
    """`value` to about three significant digits; `scale` fixes the decimals by another number's size."""
    if value is None:
        return "–"
    size = abs(value if scale is None else scale)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif 0 < size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return text.replace("-", "−")


def interval(metric: Measured, scale: float | None = None) -> str:
    """`low to high` with the decimals of the value (or of `scale`); empty where there is none, or one of no width."""
    if metric.low is None or metric.high is None or metric.low == metric.high:
        return ""
    scale = metric.value if scale is None else scale
    return f"{number(metric.low, scale)} to {number(metric.high, scale)}"


def with_interval(metric: Measured, scale: float | None = None) -> str:
    """`value (low to high)`, or the value alone where `interval` is empty."""
    inside = interval(metric, scale)
    return number(metric.value, scale) + (f" ({inside})" if inside else "")


def duration(seconds: float | None) -> str:
    """Seconds as `48 s`, `6 min 05 s` or `2 h 07 min`."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(size: float | None) -> str:
    """Bytes as MiB or GiB."""
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def count(value: float | None) -> str:
    """A whole number with thousands separators; – for what is none, as in a damaged file."""
    return f"{value:,.0f}" if isinstance(value, int | float) else "–"
