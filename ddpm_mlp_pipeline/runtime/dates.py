"""Read and write dates as text, the same in every locale and in every language that reads a bundle."""

from __future__ import annotations

import datetime
import re
from functools import lru_cache

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_PATTERNS = {
    "Y": r"(?P<Y>\d{4})",
    "y": r"(?P<y>\d{2})",
    "m": r"(?P<m>\d{1,2})",
    "b": "(?P<b>" + "|".join(_MONTHS) + ")",
    "d": r"(?P<d>\d{1,2})",
    "H": r"(?P<H>\d{1,2})",
    "M": r"(?P<M>\d{2})",
    "S": r"(?P<S>\d{2})",
}


def is_date_format(text: str) -> bool:
    """Return whether a format has a year, a month and a day, each directive once, and no other directives."""
    directives = re.findall("%(.?)", text)
    return (
        len(set(directives)) == len(directives)
        and set(directives) <= set(_PATTERNS)
        and len({"Y", "y"} & set(directives)) == 1
        and len({"m", "b"} & set(directives)) == 1
        and "d" in directives
    )


@lru_cache(maxsize=64)
def _pattern(date_format: str) -> re.Pattern[str]:
    parts = re.split("%(.)", date_format)  # literal texts and directives take turns
    pattern = "".join(_PATTERNS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(pattern, re.ASCII | re.IGNORECASE)


@lru_cache(maxsize=2**16)
def read_date(text: str, date_format: str) -> datetime.datetime | None:
    """Return the date that a text stands for, or `None` if it doesn't match the format or there is no such date."""
    match = _pattern(date_format).fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    if "Y" in part:
        year = int(part["Y"])
    else:
        year = int(part["y"])
        year += 1900 if year >= 69 else 2000  # the convention of POSIX
    month = int(part["m"]) if "m" in part else _MONTHS.index(part["b"].title()) + 1
    hour, minute, second = (int(part.get(name) or 0) for name in "HMS")
    try:
        return datetime.datetime(year, month, int(part["d"]), hour, minute, second)
    except ValueError:
        return None


def write_date(date: datetime.datetime | datetime.date, date_format: str) -> str:
    """Return the text of a date."""
    hour, minute, second = (getattr(date, name, 0) for name in ("hour", "minute", "second"))
    part = {
        "Y": f"{date.year:04}",
        "y": f"{date.year % 100:02}",
        "m": f"{date.month:02}",
        "b": _MONTHS[date.month - 1],
        "d": f"{date.day:02}",
        "H": f"{hour:02}",
        "M": f"{minute:02}",
        "S": f"{second:02}",
    }
    return re.sub("%(.)", lambda match: part[match[1]], date_format)
