from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.stop_strings import StopStrings


def run(pieces: list[str], stops: list[str], includes_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, includes_stop=includes_stop)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def reference(text: str, stops: list[str], includes_stop: bool) -> tuple[str, str | None]:
    """Character by character over the whole text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if includes_stop else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text(alphabet="ab\u4e2d", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab\u4e2d", min_size=1, max_size=4), max_size=4),
    includes_stop=st.booleans(),
)
def test_the_result_does_not_depend_on_how_the_text_is_cut(
    pieces: list[str], stops: list[str], includes_stop: bool
) -> None:
    assert run(pieces, stops, includes_stop) == reference("".join(pieces), stops, includes_stop)


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), max_size=10),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_what_was_shown_never_has_to_be_taken_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown, seen = "", ""
    for piece in pieces:
        shown, seen = shown + matcher.push(piece), seen + piece
        if matcher.matched is not None:
            break
        for future in stops:
            assert reference(seen + future, stops, False)[0].startswith(shown)


def test_text_that_cannot_become_a_stop_is_shown_at_once() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.push("hello S") == "hello "
    assert matcher.push("T") == ""
    assert matcher.push("ART") == "START"
