"""How numbers and names read on the page: signed percentages, counts, sizes, lists, names of settings."""

from __future__ import annotations


def percent(change: float, digits: int = 1) -> str:
    """A relative change with its sign: -0.093 is '−9.3%'."""
    value = round(100 * change, digits)
    return f"{'−' if value < 0 else '+' if value > 0 else '±'}{abs(value):.{digits}f}%"


def interval(low_high: tuple[float, float], digits: int = 1) -> str:
    """Both ends as `percent` writes them: '−2.0% to +1.0%'."""
    return f"{percent(low_high[0], digits)} to {percent(low_high[1], digits)}"


def within(ends: tuple[float, float] | None, covers: str, digits: int = 1) -> str:
    """'95% interval −2.0% to +1.0% on these documents, one training'. covers: Change.covers."""
    return f"95% interval {interval(ends, digits)} {covers}" if ends else "no interval: all text is of one work"


def number(value: float | None, digits: int = 3) -> str:
    """Empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def count(value: float) -> str:
    """A whole number with narrow no-break spaces between thousands."""
    return f"{round(value):,}".replace(",", "\u202f")


def size(value: float) -> str:
    """Bytes in a unit that fits: 1500 is '1.5 kB'."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def listed(words: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def in_words(name: str) -> str:
    """'documents_an_instance' as 'documents per instance'."""
    return name.replace("_an_", "_per_").replace("_", " ")
