"""Stop strings: however a text is cut into pieces, what comes out is the text before the first of them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from phinetune.generation.stop_strings import StopStrings

LETTERS = st.text("abé", max_size=30)


@given(text=LETTERS, stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), data=st.data())
def test_the_cut_is_that_of_the_whole_text(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    stream = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
    is_found = stream.is_found
    shown += stream.finish()
    first = min((text.index(stop) for stop in stops if stop in text), default=None)
    assert is_found == (first is not None)
    assert shown == text[:first]


def test_nothing_is_held_back_without_reason():
    stream = StopStrings(["###"])
    assert stream.push("one # two") == "one # two"
    assert stream.push(" #") == " "
    assert stream.push("x") == "#x"
