from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_mega.text.stop_strings import StopStringFilter

few_letters = st.text("aab", max_size=40)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def plain_search(text, stops):
    """The text before the stop string that is complete first, and that stop string."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, negative_length, stop = min(ends)
    return text[: end + negative_length], stop


def run(stops, pieces):
    stream = StopStringFilter(stops)
    out = "".join(stream.push(piece) for piece in pieces)
    return out + stream.flush(), stream.matched


def cut(text, lengths):
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    return [*pieces, text]


@settings(max_examples=500)
@given(text=few_letters, stops=stop_lists, lengths=st.lists(st.integers(0, 6)))
def test_any_chunking_gives_the_plain_search(text, stops, lengths):
    assert run(stops, cut(text, lengths)) == plain_search(text, stops)


@given(text=st.text(max_size=60), stops=st.lists(st.text(min_size=1, max_size=2), max_size=3))
def test_any_text_one_character_at_a_time(text, stops):
    assert run(stops, list(text)) == plain_search(text, stops)


@given(text=few_letters, stops=stop_lists)
def test_no_more_is_held_back_than_could_become_a_stop_string(text, stops):
    stream = StopStringFilter(stops)
    seen = out = ""
    for character in text:
        seen += character
        out += stream.push(character)
        if stream.matched:
            break
        held = seen[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_beginning_that_leads_nowhere_is_passed_on():
    stream = StopStringFilter(["\n\nUser:"])
    assert [stream.push(p) for p in ("hi\n", "\nUse", "ful")] == ["hi", "", "\n\nUseful"]


def test_of_two_complete_at_once_the_longest_is_cut():
    assert run(["c", "abc"], ["xab", "c!"]) == ("x", "abc")


def test_nothing_passes_after_a_match():
    stream = StopStringFilter(["."])
    assert stream.push("a.b") == "a"
    assert (stream.push("c"), stream.flush()) == ("", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopStringFilter(["a", ""])
