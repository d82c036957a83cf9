"""Bad rows: those that cannot be used, collected while reading goes on, so that all are named at once."""

from __future__ import annotations

from speft_ds.errors import UserError

MOST = 1000  # that are collected: a file of another kind has nothing else
MOST_NAMED = 20


class BadRow(UserError):
    """A row that cannot be used."""


class BadRows:
    """The errors of rows by where these stand, the first of each."""

    def __init__(self):
        self.errors: dict[str, BadRow] = {}

    def add(self, error: UserError) -> None:
        """Raises UserError once there are too many to go on."""
        self.errors.setdefault(error.where, BadRow(error.what, error.where, error.fix))
        if len(self.errors) >= MOST:
            self.check()

    def check(self, most_named: int = MOST_NAMED) -> None:
        """Raises UserError, with up to so many rows by name, where there are bad rows."""
        errors = list(self.errors.values())
        if len(errors) == 1:
            raise errors[0]
        if not errors:
            return
        lines = [f"{error.where}: {error.what}" for error in errors[:most_named]]
        if (more := len(errors) - most_named) > 0:
            lines.append(f"and {more:,} more: speft validate RECIPE --all lists them")
        number = f"{len(errors):,} rows" + (" or more" if len(errors) >= MOST else "")
        fixes = dict.fromkeys(error.fix for error in errors[:most_named] if error.fix)
        what = "\n  ".join([f"{number} cannot be used:", *lines])
        raise UserError(what, errors[0].where, "; ".join(list(fixes)[:3]))


def report(error: UserError, bad: BadRows | None) -> None:
    """Add the error of a row to the others, or raise it where they are not collected."""
    if bad is None:
        raise error
    bad.add(error)
