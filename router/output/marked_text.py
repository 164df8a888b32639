"""Text that arrives in pieces, cut at markers. What comes out does not depend on the pieces."""

from __future__ import annotations


class MarkedText:
    def __init__(self) -> None:
        self._text = ""
        self._is_ended = False

    def push(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        """No more is pushed: a beginning of a marker is now plain text."""
        self._is_ended = True

    def before(self, *markers: str) -> tuple[str, str | None]:
        """Take the text up to the first marker and the marker, or what cannot belong to one, and None."""
        found = [(place, marker) for marker in markers if (place := self._text.find(marker)) >= 0]
        if found:
            place, marker = min(found)
            return self.take(place, len(marker)), marker
        return self.take(len(self._text) - self._num_held(markers)), None

    def starts_with(self, marker: str) -> bool | None:
        """None: too little has come to say."""
        if self._text.startswith(marker):
            return True
        may_come = marker.startswith(self._text) and not self._is_ended
        return None if may_come else False

    def take(self, num_chars: int, num_dropped: int = 0) -> str:
        taken = self._text[:num_chars]
        self._text = self._text[num_chars + num_dropped :]
        return taken

    def take_all(self) -> str:
        return self.take(len(self._text))

    def take_space(self) -> str:
        """Leading whitespace."""
        return self.take(len(self._text) - len(self._text.lstrip()))

    @property
    def is_empty(self) -> bool:
        return not self._text

    def _num_held(self, markers: tuple[str, ...]) -> int:
        if self._is_ended:
            return 0
        longest = max(len(marker) for marker in markers) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            end = self._text[len(self._text) - length :]
            if any(marker.startswith(end) for marker in markers):
                return length
        return 0
