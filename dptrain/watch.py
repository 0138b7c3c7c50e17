"""Who looks on while a run trains: the interface of what shows it, and the one that shows nothing."""

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Shows a run to a person. Called by the chief only, between steps, so it must be quick."""

    def started(self, info: Mapping[str, Any]) -> None:
        """Training begins; ``info`` says with what."""

    def progressed(self, line: Mapping[str, Any]) -> None:
        """A line of the journal."""

    def warned(self, text: str) -> None:
        """Something went wrong that training goes on without."""

    def recovered(self, recovery: Mapping[str, Any]) -> None:
        """Workers died and the others go on; one of the result's ``recoveries``."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """The content of result.json."""

    def close(self) -> None:
        """Training ended in an error that is told next; leave the terminal in order. May come after ``finished``."""


class Unwatched:
    """An observer that shows nothing."""

    def started(self, info: Mapping[str, Any]) -> None:
        """See Observer."""

    def progressed(self, line: Mapping[str, Any]) -> None:
        """See Observer."""

    def warned(self, text: str) -> None:
        """See Observer."""

    def recovered(self, recovery: Mapping[str, Any]) -> None:
        """See Observer."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """See Observer."""

    def close(self) -> None:
        """See Observer."""
