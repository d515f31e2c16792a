"""Stop strings in a text that arrives in parts."""


class StopStrings:
    """Finds the first stop string in a text that arrives in parts, however it is cut.

    The match that ends first wins, and among those the longest. Text that may be the start of a
    stop string is held back. One Knuth-Morris-Pratt automaton per string: linear in the text.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """`include` emits the stop string itself, too. No stop string may be empty."""
        assert all(stops), "an empty stop string matches everywhere"
        # The longest first, so that it wins where two match at the same character.
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._include = include
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take in text; returns what may be emitted, and the stop string once one is complete.

        What follows the stop string is dropped, and nothing may be pushed after it.
        """
        if not self._held and not any(stop[0] in text for stop in self._stops):
            # The usual case, at the speed of C: no automaton has begun, and none begins.
            return text, None
        seen = self._held + text
        for at in range(len(self._held), len(seen)):
            stop = self._advance(seen[at])
            if stop is not None:
                self._held = ""
                return seen[: at + 1 - (0 if self._include else len(stop))], stop
        split = len(seen) - max(self._matched)
        self._held = seen[split:]
        return seen[:split], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Move every automaton by a character; returns the stop string that this completes."""
        found = None
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                found = found or stop
                matched = borders[matched - 1]
            self._matched[i] = matched
        return found


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    matched = 0
    for at in range(1, len(stop)):
        while matched and stop[matched] != stop[at]:
            matched = borders[matched - 1]
        matched += stop[matched] == stop[at]
        borders[at] = matched
    return borders
