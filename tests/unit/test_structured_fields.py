"""How structured output is asked for over HTTP, and what is refused before anything runs."""

from __future__ import annotations

import asyncio
import collections
import json
import sys

import httpx
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving

from fastserve_mega.client import ServerBusyError
from fastserve_mega.client.testing import WAIT_S
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.server.chat_protocol import ChatRequest
from fastserve_mega.server.completions import CompletionRequest
from fastserve_mega.server.structure_check import StructureChecker, verdict
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import StructuredOutput

pytest.importorskip("llguidance")

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HI = [{"role": "user", "content": "hi"}]
WRAPPED = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
FORMS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
    ({"response_format": WRAPPED}, {"json_schema": SCHEMA}),
    ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
    ({"guided_json": json.dumps(SCHEMA)}, {"json_schema": SCHEMA}),
    ({"guided_regex": "[a-z]+"}, {"regex": "[a-z]+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
    ({"structured_outputs": {"regex": "x"}}, {"regex": "x"}),
    ({"structured_outputs": {"choice": ["a"]}}, {"choice": ("a",)}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
]


@pytest.fixture(scope="module")
def shared(tiny_tokenizer_dir):
    coordinator = start_fake_coordinator()
    with (
        serving(coordinator, Tokenizer(tiny_tokenizer_dir)) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        yield coordinator, http
    coordinator.close()


@pytest.mark.parametrize(("fields", "expected"), FORMS)
@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_every_way_to_ask(kind, fields, expected):
    body = {"prompt": "x"} if kind is CompletionRequest else {"messages": HI}
    structured = kind.model_validate({**body, **fields}).structured_output
    if expected is None:
        assert structured is None
        return
    if "json_schema" in expected:
        assert json.loads(structured.json_schema) == expected["json_schema"]
    else:
        assert structured == StructuredOutput(**expected)


REFUSED = [
    ({"guided_regex": "(["}, "the regular expression cannot be used: "),
    ({"guided_json": "{"}, "the JSON schema is not valid JSON"),
    ({"guided_json": {"type": "banana"}}, "the JSON schema cannot be used: Invalid type: banana"),
    ({"guided_json": {"not": {}}}, "the JSON schema cannot be used: "),
    ({"guided_json": "[" * 30_000}, "the JSON schema is nested too deeply"),
    ({"guided_choice": ["\ud800"]}, "not valid Unicode"),
    ({"guided_regex": "\ud800"}, "not valid Unicode"),
    ({"guided_choice": []}, "must have 1 to 65536 characters, got 0"),
    ({"guided_regex": "a" * 70_000}, "must have 1 to 65536 characters, got 70000"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "ask for one structure of the output, got 2"),
    ({"response_format": WRAPPED, "guided_regex": "a"}, "ask for one structure of the output"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos and min_tokens cannot be combined"),
    ({"response_format": {"type": "xml"}}, "response_format: "),
    ({"structured_outputs": {"grammar": "x"}}, "unknown field 'structured_outputs.grammar'"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_what_cannot_be_followed_is_refused_with_one_sentence(shared, fields, sentence):
    coordinator, http = shared
    coordinator.reset()
    for path, body in (
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        content = json.dumps({**body, **fields})
        response = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert sentence in message
        assert "\n" not in message
    assert coordinator.received(Submit) == []


def test_without_the_library_it_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pip install 'fastserve_mega[structured]'" in verdict(b'{"regex": "a"}')


def chained_definitions(length):
    """A schema whose compilation goes as deep as it is long."""
    chain = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(length)}
    return {"$defs": {**chain, str(length): {}}, "$ref": "#/$defs/0"}


def test_a_structure_that_crashes_or_hangs_its_check_is_refused_and_the_next_one_is_checked():
    deep = StructuredOutput(json_schema=json.dumps(chained_definitions(1480)))
    endless = {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(100)]}
    good = StructuredOutput(json_schema=json.dumps(SCHEMA))

    async def check():
        checker = StructureChecker(limit_s=0.5)
        with pytest.raises(ValueError, match="takes too much memory"):
            await checker.check(deep)
        with pytest.raises(ValueError, match=r"takes more than 0\.5 s to compile"):
            await checker.check(StructuredOutput(json_schema=json.dumps(endless)))
        await checker.check(good)
        checker.close()

    asyncio.run(check())


@pytest.mark.parametrize("command", [("/is/not/there",), (sys.executable, "-c", "")])
def test_a_check_that_cannot_be_made_is_not_held_against_the_structure(command):
    async def check():
        checker = StructureChecker(command=command)
        structure = StructuredOutput(regex="a")
        with pytest.raises(ServerBusyError, match=r"cannot be checked now: .* does not start"):
            await checker.check(structure)
        checker._command = StructureChecker()._command
        await checker.check(structure)
        checker.close()

    asyncio.run(check())


def test_a_structure_is_checked_once_and_not_behind_many_others():
    lines = (
        "import sys; print('ready', flush=True); [print('\"no\"', flush=True) for _ in sys.stdin]"
    )

    async def check():
        checker = StructureChecker(command=(sys.executable, "-c", lines))
        asked = [StructuredOutput(regex=f"a{i}") for i in range(40)]
        answers = await asyncio.gather(*map(checker.check, asked), return_exceptions=True)
        kinds = collections.Counter(type(answer) for answer in answers)
        assert kinds == {ValueError: 32, ServerBusyError: 8}
        checker.close()  # what is known already needs no process
        with pytest.raises(ValueError, match="no"):
            await checker.check(asked[0])

    asyncio.run(check())
