"""What was left out and why: nothing is skipped without a line in the log and a count at the end."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class SkipLog:
    """Collects what is skipped, logs each item once, and reports the count at the end.

    Args:
        strict: the first item raises instead of being skipped.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.skipped: dict[str, str] = {}  # name -> reason, in order of first sight

    def __len__(self) -> int:
        return len(self.skipped)

    def add(self, name: str, reason: Exception | str) -> None:
        """Skips `name`; a strict log raises ValueError instead, with the same text and the reason as its cause."""
        if self.strict:
            raise ValueError(f"{name}: {reason}") from (reason if isinstance(reason, Exception) else None)
        if name not in self.skipped:
            self.skipped[name] = str(reason)
            logger.warning("skipped %s: %s", name, reason)

    def report(self, total: int, what: str = "records") -> str:
        """Logs and gives one line: how many of `total` were skipped."""
        line = f"skipped {len(self)} of {total} {what}"
        (logger.warning if self.skipped else logger.info)(line)
        return line
