from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.text.detokenizer import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    StopStringFilter,
    stop_strings,
)

few_letters = st.text("aab", max_size=40)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


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


@given(text=few_letters, stops=stop_lists, lengths=st.lists(st.integers(0, 6)))
def test_any_chunking_gives_the_plain_search(text, stops, lengths):
    assert run(stops, cut(text, lengths)) == plain_search(text, stops)


@given(
    text=st.text(max_size=60),
    stops=st.lists(st.text(min_size=1, max_size=2), min_size=1, max_size=3),
)
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


@given(
    ignored=few_letters,
    text=few_letters,
    stops=stop_lists,
    lengths=st.lists(st.integers(0, 6)),
)
def test_a_stop_string_counts_only_where_it_is_complete_in_text_that_may_stop(
    ignored, text, stops, lengths
):
    stream = StopStringFilter(stops)
    out = "".join(stream.push(piece, may_stop=False) for piece in cut(ignored, lengths))
    out += "".join(stream.push(piece) for piece in cut(text, lengths)) + stream.flush()
    whole = ignored + text
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(len(ignored) + 1, len(whole) + 1)
        if whole[:end].endswith(stop)
    ]
    end, negative_length, stop = min(ends, default=(len(whole), 0, None))
    assert (out, stream.matched) == (whole[: end + negative_length], stop)


# --- what callers give as stop strings -----------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "strings"),
    [
        (None, ()),
        ("STOP", ("STOP",)),
        ("é日🙂\n\n", ("é日🙂\n\n",)),
        (["a", "bc"], ("a", "bc")),
        (("a",), ("a",)),
        ([], ()),
        (["x"] * MAX_STOPS, ("x",) * MAX_STOPS),
        ("x" * MAX_STOP_LENGTH, ("x" * MAX_STOP_LENGTH,)),
    ],
)
def test_one_string_is_one_stop_string_and_not_its_characters(stop, strings):
    assert stop_strings(stop) == strings


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        ("", "must not be empty"),
        (["a", ""], "must not be empty"),
        (["a", None], "must be a string or a list of strings, got ['a', None]"),
        ([["a"]], "must be a string or a list of strings, got [['a']]"),
        (5, "must be a string or a list of strings, got 5"),
        (b"ab", "must be a string or a list of strings, got b'ab'"),
        ({"a": 1}, "must be a string or a list of strings"),
        (["x"] * (MAX_STOPS + 1), f"at most {MAX_STOPS} strings, got {MAX_STOPS + 1}"),
        ("x" * (MAX_STOP_LENGTH + 1), f"has {MAX_STOP_LENGTH + 1} characters"),
    ],
)
def test_what_is_no_stop_string_is_refused_with_the_value_and_the_limit(stop, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        stop_strings(stop)
