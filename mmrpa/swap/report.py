"""What a swap tells its user: changes, leftovers, and refusals."""

from dataclasses import dataclass, field

# For all of this package.
from ..preflight import type_name as type_name


class SwapError(ValueError):
    """A config or an argument with which no swap can begin."""


class SwapRefused(SwapError):
    """A swap that would make no sense, or whose result nobody could train.

    Args:
        reason (str): The kind of refusal, the same text for all configs that
            are refused for it.
        detail (str): What it is in this config, and what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f'{reason}: {detail}')
        self.reason = reason
        self.detail = detail


@dataclass
class Report:
    """The lines that a swap prints.

    Attributes:
        changed (list[tuple[str, str, str]]): Dotted key, what was done to it,
            and why.
        left (list[tuple[str, str]]): Dotted key, and why it stays or what
            its user should know.
    """

    changed: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def change(self, key: str, what: str, why: str) -> None:
        """Note a change."""
        self.changed.append((key, what, why))

    def leave(self, key: str, why: str) -> None:
        """Note what stays as it was."""
        if (key, why) not in self.left:
            self.left.append((key, why))

    def lines(self) -> list[str]:
        """One line a change, then one a thing that was left."""
        return [
            *(f'changed  {key}: {what} ({why})'
              for key, what, why in self.changed),
            *(f'left     {key}: {why}' for key, why in self.left)
        ]


def short(value: object, limit: int = 60) -> str:
    """A value as text for one line."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit - 3] + '...'
