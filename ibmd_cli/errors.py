"""The errors that a user can cause. Each is one line: the value, what was expected, and what mends it."""

import difflib
from collections.abc import Iterable


class IbmdError(Exception):
    """A failure that is told in one line.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1


class UsageError(IbmdError):
    """A flag or setting that cannot be meant (exit 2)."""

    exit_code = 2


class NotAvailable(IbmdError):
    """A model or data set that cannot be found or fetched (exit 4)."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names that are most like `name`, or all of them, for a message."""
    names = {one.lower(): one for one in known}
    alike = [name.lower()] if name.lower() in names else difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return ("nearest: " if alike else "expected one of: ") + ", ".join(names[one] for one in alike or names)
