"""What a check found: that all is well, or what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: str
    """What was looked at, in a word or two."""
    ok: bool
    text: str
    """What was found; where it is not well, also what to do."""

    @property
    def line(self) -> str:
        """As a person reads it."""
        return f"{'ok ' if self.ok else 'FIX'}  {self.check}: {self.text}"


def well(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, True, text)


def fix(check: str, text: str) -> Finding:
    """Something is to be done."""
    return Finding(check, False, text)
