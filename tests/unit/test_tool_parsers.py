"""Calls of tools in text, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.server.tools.forced import NamedCall, RequiredCalls, required_schema
from fastserve_mega.server.tools.formats import choose_parser
from fastserve_mega.server.tools.hermes import HermesParser
from fastserve_mega.server.tools.llama3_json import Llama3JsonParser

WEATHER = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
TIME = '{"name": "time", "arguments": {}}'
CALLED = [("weather", {"city": "Paris", "days": 2}), ("time", {})]


def read(parser, pieces):
    """(content, [(name, arguments)]), put together as a client does."""
    content, calls = "", []
    told = [each for piece in pieces for each in parser.push(piece)]
    for each in (*told, *parser.finish()):
        if isinstance(each, str):
            content += each
        elif each.name is not None:
            assert each.index == len(calls)
            calls.append([each.name, each.arguments])
        else:
            calls[each.index][1] += each.arguments
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


HERMES = {
    f"<tool_call>\n{WEATHER}\n</tool_call>": ("", CALLED[:1]),
    f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{TIME}</tool_call>": ("", CALLED),
    f"Let me see.\n<tool_call>\n{TIME}\n</tool_call>\n": ("Let me see.", CALLED[1:]),
    f"<tool_call>\n{WEATHER}": ("", CALLED[:1]),  # the end of sequence instead of the tag
    '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>': ("", [("time", {"a": 1})]),
    '<tool_call>{"name": "q\\"\\u00e9", "arguments": {"a": "}{\\"\\\\"}}</tool_call>': (
        "",
        [('q"é', {"a": '}{"\\'})],
    ),
    "no call < here <tool": ("no call < here <tool", []),
    "<tool_call>nonsense</tool_call>": ("<tool_call>nonsense</tool_call>", []),
    '<tool_call>{"name": 3}</tool_call>': ('<tool_call>{"name": 3}</tool_call>', []),
    '<tool_call>{"name": "x", "argu': ('<tool_call>{"name": "x", "argu', []),
    "plain text\n\n": ("plain text\n\n", []),
    "": ("", []),
}
LLAMA = {
    WEATHER.replace("arguments", "parameters"): ("", CALLED[:1]),
    f"<|python_tag|>{WEATHER}; {TIME}": ("", CALLED),
    f" \n{TIME}\n": ("", CALLED[1:]),
    f"{WEATHER} and so on": (f"{WEATHER} and so on", []),
    '{"answer": 42}': ('{"answer": 42}', []),
    '{"name": "x", "para': ('{"name": "x", "para', []),
    "It is < {3}": ("It is < {3}", []),
    "": ("", []),
}
REQUIRED = {
    f"[{WEATHER}, {TIME}]": ("", CALLED),
    f'[{WEATHER}, {{"name": "ti': ("", CALLED[:1]),  # max_tokens
}
CASES = [
    *((HermesParser, text, expected) for text, expected in HERMES.items()),
    *((Llama3JsonParser, text, expected) for text, expected in LLAMA.items()),
    *((RequiredCalls, text, expected) for text, expected in REQUIRED.items()),
]


@pytest.mark.parametrize(("parser", "text", "expected"), CASES)
def test_at_once_and_character_by_character(parser, text, expected):
    assert read(parser(), [text]) == expected
    assert read(parser(), list(text)) == expected


@given(data=st.data(), case=st.sampled_from(CASES))
def test_in_any_pieces(data, case):
    parser, text, expected = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    ends = [*cuts, len(text)]
    pieces = [text[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    assert read(parser(), pieces) == expected


def test_text_is_told_before_the_end():
    parser = HermesParser()
    assert parser.push("Let me ") == ["Let me"]
    assert parser.push("see <") == [" see"]
    assert parser.push("tool_call>" + WEATHER[:20]) == []
    name, arguments = parser.push(WEATHER[20:40])
    assert (name.name, name.arguments) == ("weather", "")
    assert (arguments.name, arguments.arguments) == (None, '{"city"')
    (arguments,) = parser.push(WEATHER[40:] + "</tool_call>")
    assert arguments.arguments == ': "Paris", "days": 2}'


def test_a_named_call_is_its_arguments():
    assert read(NamedCall("weather"), ['{"city"', ': "Paris"}']) == (
        "", [("weather", {"city": "Paris"})],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "template", "expected"),
    [
        ("auto", "{{ tools }} <tool_call> ", HermesParser),
        ("auto", "{{ tools }} Environment: ipython", Llama3JsonParser),
        ("auto", "{{ tools }} [TOOL_CALLS]", None),
        ("auto", None, None),
        ("none", "{{ tools }} <tool_call>", None),
        ("llama3_json", "{{ tools }} <tool_call>", Llama3JsonParser),
        ("hermes", "{{ tools }}", HermesParser),
        ("hermes", None, None),
    ],
)
def test_which_parser_a_model_has(name, template, expected):
    assert choose_parser(name, template) is expected


def test_the_schema_of_required_calls_keeps_references():
    city = {"type": "string", "maxLength": 9}
    uses = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/city"}},
        "$defs": {"city": city},
    }
    schema = required_schema({"a": uses, "b": None}, several=False)
    assert schema["$defs"] == {"city": city}
    assert schema["maxItems"] == 1
    assert "maxItems" not in required_schema({"b": None}, several=True)
    other = {**uses, "$defs": {"city": {"type": "integer"}}}
    with pytest.raises(ValueError, match="two tools define 'city' differently"):
        required_schema({"a": uses, "b": other}, several=True)
