"""Bad rows: those that cannot be used, collected while reading goes on, so that all are named at once."""

from __future__ import annotations

from speft_ds.errors import UserError

MOST = 1000  # that are collected: a file of another kind has nothing else
MOST_NAMED, NUM_PLACES = 20, 3  # reasons, and rows for each, unless all are named


class BadRow(UserError):
    """A row that cannot be used."""


class BadRows:
    """The errors of rows by where these stand, the first of each.

    Args:
        names_all: every row by name, not some for each reason.
    """

    def __init__(self, names_all: bool = False):
        self.names_all = names_all
        self.errors: dict[str, BadRow] = {}

    def add(self, error: UserError) -> None:
        """Raises UserError once there are too many to go on."""
        self.errors.setdefault(error.where, BadRow(error.what, error.where, error.fix))
        if len(self.errors) >= MOST:
            self.check()

    def check(self) -> None:
        """Raises BadRow where there are bad rows."""
        errors = list(self.errors.values())
        if len(errors) == 1:
            raise errors[0]
        if not errors:
            return
        places: dict[str, list[str]] = {}
        for error in errors:
            places.setdefault(error.what, []).append(error.where)
        lines = [f"{_some(where, self.names_all)}: {what}" for what, where in places.items()]
        if not self.names_all:
            more = f"and {len(lines) - MOST_NAMED:,} other reasons; " if len(lines) > MOST_NAMED else ""
            lines = [*lines[:MOST_NAMED], f"{more}speft validate RECIPE --all names all of them"]
        number = f"{len(errors):,} rows" + (" or more" if len(errors) >= MOST else "")
        fixes = list(dict.fromkeys(error.fix for error in errors if error.fix))
        what = "\n  ".join([f"{number} cannot be used:", *lines])
        raise BadRow(what, errors[0].where, "; ".join(fixes[:3]))


def _some(places: list[str], names_all: bool) -> str:
    more = 0 if names_all else len(places) - NUM_PLACES
    named = places[:NUM_PLACES] if more > 0 else places
    return "; ".join(named) + (f" and {more:,} more" if more > 0 else "")


def report(error: UserError, bad: BadRows | None) -> None:
    """Add the error of a row to the others, or raise it where they are not collected."""
    if bad is None:
        raise error
    bad.add(error)
