"""The errors that a user can cause. Each is one line: the value, what was expected, and what mends it."""


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
