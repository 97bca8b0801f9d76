"""A ledger: entries in, balances out."""

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True)
class Entry:
    day: date
    account: str
    cents: int


class Ledger:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, day: date, account: str, cents: int) -> None:
        """Books an amount; below zero it leaves the account."""
        <CURSOR>

    def balance(self, account: str) -> int:
        """The sum of an account's entries."""
        own = [entry for entry in self.entries if entry.account == account]
        return sum(entry.cents for entry in own)

    def accounts(self) -> list[str]:
        return sorted({entry.account for entry in self.entries})
