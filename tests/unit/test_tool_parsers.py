"""Calls of tools in text, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.server.tools.forced import (
    NamedCall,
    RequiredCalls,
    named_schema,
    required_schema,
)
from fastserve_mega.server.tools.formats import FORMATS, choose_format
from fastserve_mega.server.tools.harmony import HarmonyParser
from fastserve_mega.server.tools.hermes import HermesParser
from fastserve_mega.server.tools.llama3_json import Llama3JsonParser
from fastserve_mega.server.tools.mistral import MistralParser
from fastserve_mega.server.tools.pieces import Reasoning
from fastserve_mega.server.tools.qwen3_coder import Qwen3CoderParser
from fastserve_mega.text.structured import check_structured
from fastserve_mega.types import StructuredOutput

WEATHER = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
TIME = '{"name": "time", "arguments": {}}'
CALLED = [("weather", {"city": "Paris", "days": 2}), ("time", {})]


def read(parser, pieces):
    """(content, [(name, arguments)]), put together as a client does; reasoning in brackets."""
    content, calls = "", []
    told = [each for piece in pieces for each in parser.push(piece)]
    for each in (*told, *parser.finish()):
        if isinstance(each, str):
            content += each
        elif isinstance(each, Reasoning):
            content += f"({each.text})"
        elif each.name is not None:
            assert each.index == len(calls)
            calls.append([each.name, each.arguments])
        else:
            calls[each.index][1] += each.arguments
    return content.replace(")(", ""), [(name, json.loads(arguments)) for name, arguments in calls]


HERMES = {
    f"<tool_call>\n{WEATHER}\n</tool_call>": ("", CALLED[:1]),
    f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{TIME}</tool_call>": ("", CALLED),
    f"Let me see.\n<tool_call>\n{TIME}\n</tool_call>\n": ("Let me see.", CALLED[1:]),
    f"<tool_call>{WEATHER}<tool_call>\n{TIME}</tool_call>": ("", CALLED),
    f"<tool_call>a <tool_call>{TIME}": ("<tool_call>a ", CALLED[1:]),
    f"<tool_call>\n{WEATHER}": ("", CALLED[:1]),  # the end of sequence instead of the tag
    '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>': ("", [("time", {"a": 1})]),
    '<tool_call>{"name": "q\\"\\u00e9", "arguments": {"a": "}{\\"\\\\"}}</tool_call>': (
        "",
        [('q"é', {"a": '}{"\\'})],
    ),
    "no call < here <tool": ("no call < here <tool", []),
    "write <tool_call> before it": ("write <tool_call> before it", []),
    "<tool_call>nonsense</tool_call>": ("<tool_call>nonsense</tool_call>", []),
    '<tool_call>{"name": "time", "arguments": null}</tool_call>': ("", CALLED[1:]),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [("f", {"a": 1})]),
    '<tool_call>{"name": "f", "arguments": "a"}</tool_call>': (
        '<tool_call>{"name": "f", "arguments": "a"}</tool_call>',
        [],
    ),
    '<tool_call>{"name": "f", "arguments": {"a": "\\"</tool_call>", "b": 1}}</tool_call>.': (
        ".",
        [("f", {"a": '"</tool_call>', "b": 1})],
    ),
    '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "f"}</tool_call>': (
        "",
        [("f", {"a": "</tool_call>"})],
    ),
    f'<tool_call>10" of it</tool_call> and <tool_call>{TIME}</tool_call>': (
        '<tool_call>10" of it</tool_call> and',
        CALLED[1:],
    ),
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
TYPES = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "at": {"type": ["object", "null"]},
        },
    },
    "time": None,
}


def qwen3_coder():
    return Qwen3CoderParser(TYPES)


def written(name, **arguments):
    """A call as Qwen3-Coder writes it."""
    told = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{told}</function>\n</tool_call>"


QWEN3_CODER = {
    written("weather", city="Paris", days=2): ("", CALLED[:1]),
    f"See:\n{written('weather', city='Paris', days=2)}\n{written('time')}": ("See:", CALLED),
    written("weather", city="<b>\n7", at='{"x": [1]}', days="few"): (
        "", [("weather", {"city": "<b>\n7", "at": {"x": [1]}, "days": "few"})],
    ),
    written("weather", at="null", other="12"): ("", [("weather", {"at": None, "other": "12"})]),
    "<function=time>\n</function>": ("", CALLED[1:]),
    "<tool_call>\n<function=time>": ("", CALLED[1:]),
    "a < b <tool_call> nonsense": ("a < b <tool_call> nonsense", []),
    "plain <fun": ("plain <fun", []),
    "": ("", []),
}  # fmt: skip
MISTRAL = {
    f"[TOOL_CALLS][{WEATHER}, {TIME}]": ("", CALLED),
    f"Wait. [TOOL_CALLS] [{TIME}]": ("Wait.", CALLED[1:]),
    '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]time[ARGS]{}': ("", CALLED),
    '[TOOL_CALLS]weather[CALL_ID]aB3[ARGS]{"city": "Paris", "days": 2}': ("", CALLED[:1]),
    "[TOOL_CALLS]time{}": ("", CALLED[1:]),
    "Say [TOOL_CALLS] what": ("Say [TOOL_CALLS] what", []),
    "a [TOOL": ("a [TOOL", []),
    "": ("", []),
}
HARMONY = {
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.": (
        "(Hm.)Yes.", [],
    ),
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 2}<|call|>': (
        "(Hm.)", CALLED[:1],
    ),
    " to=functions.time<|channel|>commentary json<|message|>{}": ("", CALLED[1:]),
    "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>comm": (
        "I look.", [],
    ),
    '{"a": 1}': ('{"a": 1}', []),
    "": ("", []),
}  # fmt: skip
CASES = [
    *((qwen3_coder, text, expected) for text, expected in QWEN3_CODER.items()),
    *((MistralParser, text, expected) for text, expected in MISTRAL.items()),
    *((HarmonyParser, text, expected) for text, expected in HARMONY.items()),
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
        ("auto", "{{ tools }} <tool_call> ", "hermes"),
        ("auto", "{{ tools }} <tool_call> <function=", "qwen3_coder"),
        ("auto", "{{ tools }} Environment: ipython", "llama3_json"),
        ("auto", "{{ tools }} [TOOL_CALLS]", "mistral"),
        ("auto", "{{ tools }} <|channel|>", "harmony"),
        ("auto", "{{ tools }} something else", None),
        ("auto", None, None),
        ("none", "{{ tools }} <tool_call>", None),
        ("llama3_json", "{{ tools }} <tool_call>", "llama3_json"),
        ("hermes", "{{ tools }}", "hermes"),
        ("hermes", None, None),
    ],
)
def test_which_format_a_model_has(name, template, expected):
    assert choose_format(name, template) is FORMATS.get(expected)


def test_ids_of_calls_are_such_as_the_templates_take():
    assert FORMATS["hermes"].new_call_id().startswith("call_")
    name = FORMATS["mistral"].new_call_id()
    assert (len(name), name.isalnum()) == (9, True)


def test_each_required_call_has_definitions_of_its_own():
    city = {"type": "string", "maxLength": 9}
    tree = {
        "properties": {
            "at": {"$ref": "#/definitions/city"},
            "under": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
            "$ref": {"enum": ["#/definitions/city"]},
        },
        "definitions": {"city": city},
        "$schema": "http://json-schema.org/draft-07/schema#",
    }
    other = {"type": "object", "definitions": {"city": {"type": "integer"}}}
    schema = required_schema({"a": tree, "b": other, "c": None}, several=False)
    assert schema["$defs"]["a"] == {
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/a/definitions/city"},
            "under": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]},
            "$ref": {"enum": ["#/definitions/city"]},
        },
        "definitions": {"city": city},
    }
    assert schema["$defs"]["b"]["definitions"] == other["definitions"]
    assert schema["maxItems"] == 1
    assert "maxItems" not in required_schema({"b": None}, several=True)
    pytest.importorskip("llguidance")
    check_structured(StructuredOutput(json_schema=json.dumps(schema)))


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object", "properties": {}},
        {"type": "object", "properties": {}, "required": [], "title": "Nothing"},
    ],
)
def test_a_forced_call_of_a_function_without_parameters_has_no_arguments(parameters):
    schema = named_schema({"now": parameters}, "now")
    assert (schema["type"], schema["properties"], schema["additionalProperties"]) == (
        "object", {}, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object"},
        {"type": ["object", "null"], "properties": {"x": {}}},
        {"properties": {}, "additionalProperties": {"type": "string"}},
        {"properties": {}, "patternProperties": {"^x": {}}},
    ],
)
def test_arguments_are_an_object_of_what_the_schema_leaves_open(parameters):
    assert named_schema({"set": parameters}, "set") == {**parameters, "type": "object"}


def test_arguments_that_are_no_object_are_refused():
    with pytest.raises(ValueError, match="function 'f' must be of type 'object', got 'string'"):
        named_schema({"f": {"type": "string"}}, "f")
