"""What a model thinks before it answers, as the official client sees it."""

from __future__ import annotations

import openai
import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving
from hypothesis import given
from hypothesis import strategies as st
from templates import with_template

from fastserve_mega.client.testing import WAIT_S, answer
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.server.reasoning import ThinkParser, choose_marks
from fastserve_mega.server.tools.hermes import HermesParser
from fastserve_mega.server.tools.pieces import CallPiece, PlainText, Reasoning
from fastserve_mega.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
MARKS = choose_marks("think", None)
OPENS = (
    "{% if tools %}<tool_call>{% endif %}"
    "{% for m in messages %}{% if m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}\n{% endfor %}{{ reasoning_effort }}|"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}"
)
HARMONY = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "<|start|>assistant{# <|channel|> #}"
)
HARMONY_TOKENS = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|constrain|>")


@pytest.mark.parametrize(
    ("prompt", "begun", "opened"),
    [
        ("x<think>\n", "", True),
        ("x<think>\nWell", "<think>\nWell", True),
        ("x<think>\n</think>\nWell", "<think>\n</think>\nWell", False),
        ("Use <think> and x", "", False),
    ],
)
def test_reasoning_is_begun_by_the_template_or_by_the_message_that_goes_on(prompt, begun, opened):
    assert MARKS.opened_by(prompt, begun) == opened


# --- the parser ----------------------------------------------------------------------------------


def read(text, cuts=(), *, opened=False, inner=PlainText):
    parser = ThinkParser(MARKS, inner(), opened=opened)
    ends = [*sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in zip([0, *sorted(cuts)], ends, strict=True)]
    told = [each for piece in pieces for each in parser.push(piece)] + [*parser.finish()]
    reasoning = "".join(each.text for each in told if isinstance(each, Reasoning))
    content = "".join(each for each in told if isinstance(each, str))
    return reasoning, content, [e.name for e in told if isinstance(e, CallPiece) and e.name]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nHm, <b>.\n</think>\n\nYes. ", False, ("Hm, <b>.", "Yes. ", [])),
        ("\nHm.\n\nWell.</think>Yes", True, ("Hm.\n\nWell.", "Yes", [])),
        ("<think>\n\n</think>\n\nYes", False, ("", "Yes", [])),
        ("Yes <think>no</think>", False, ("", "Yes <think>no</think>", [])),
        ("<think>Hm, </thi", False, ("Hm, </thi", "", [])),
        ("<thi", False, ("", "<thi", [])),
        ("", True, ("", "", [])),
        (
            '<think>a</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            False,
            ("a", "", ["f"]),
        ),
    ],
)
@given(data=st.data())
def test_in_any_pieces(text, opened, expected, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert read(text, cuts, opened=opened, inner=HermesParser) == expected


def test_reasoning_is_told_as_it_comes():
    parser = ThinkParser(MARKS, PlainText(), opened=True)
    assert parser.push("\nHm, ") == [Reasoning("Hm,")]
    assert parser.push("so </") == [Reasoning(" so")]
    assert parser.push("think>\n") == []
    assert parser.push("Yes") == ["Yes"]


def test_which_marks_a_model_has():
    assert choose_marks("auto", "… </think> …") is MARKS
    assert choose_marks("auto", "… [THINK] [/THINK]").end == "[/THINK]"
    assert choose_marks("auto", "no marks") is choose_marks("auto", None) is None
    assert choose_marks("none", "</think>") is None


# --- over HTTP -----------------------------------------------------------------------------------


class Api:
    """The official client, and what the model is to say."""

    def __init__(self, coordinator, tokenizer, client):
        self.coordinator, self.tokenizer, self.client = coordinator, tokenizer, client

    def says(self, text):
        self.coordinator.reset()
        self.coordinator.behaviour = answer([*self.tokenizer.encode(text), 2])

    def ask(self, *, stream, **options):
        """(reasoning, content, names of calls, finish reason)"""
        done = self.client.chat.completions.create(
            model="tiny", stream=stream, **{"messages": HI, **options}
        )
        if not stream:
            (choice,) = done.choices
            message = choice.message
            calls = [call.function.name for call in message.tool_calls or ()]
            reasoning = getattr(message, "reasoning_content", "")
            return reasoning, message.content, calls, choice.finish_reason
        reasoning = content = ""
        calls = []
        for chunk in done:
            delta = chunk.choices[0].delta
            reasoning += getattr(delta, "reasoning_content", "")
            content += delta.content or ""
            calls += [c.function.name for c in delta.tool_calls or () if c.function.name]
        return reasoning, content, calls, chunk.choices[0].finish_reason

    @property
    def submit(self):
        return self.coordinator.received(Submit)[-1]

    @property
    def prompt(self):
        return self.tokenizer.showing((*HARMONY_TOKENS, "</think>")).decode(self.submit.prompt)


def serve(tokenizer, **options):
    coordinator = start_fake_coordinator(max_context=2048)
    with (
        serving(coordinator, tokenizer, **options) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as client,
    ):
        yield Api(coordinator, tokenizer, client)
    coordinator.close()


@pytest.fixture(scope="module")
def opens(tiny_tokenizer_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("opens")
    yield from serve(with_template(tiny_tokenizer_dir, directory, OPENS, "</think>"))


@pytest.fixture(scope="module")
def harmony(tiny_tokenizer_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("harmony")
    yield from serve(with_template(tiny_tokenizer_dir, directory, HARMONY, *HARMONY_TOKENS))


@pytest.fixture(scope="module")
def plain(tiny_tokenizer_dir):
    yield from serve(Tokenizer(tiny_tokenizer_dir))


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart_though_its_end_is_a_special_token(opens, stream):
    opens.says("Hm, 日本.\n</think>\n\nYes.")
    assert opens.ask(stream=stream) == ("Hm, 日本.", "Yes.", [], "stop")
    assert opens.ask(stream=stream, max_tokens=3)[1:] == ("", [], "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
     {"reasoning_effort": "none"}],
)  # fmt: skip
def test_thinking_is_switched_off(opens, stream, options):
    opens.says("Yes.")
    assert opens.ask(stream=stream, **options) == ("", "Yes.", [], "stop")
    assert opens.prompt.endswith("<think>\n\n</think>\n\n")


def test_the_effort_and_earlier_reasoning_reach_the_template(opens):
    opens.says("a</think>b")
    messages = [*HI, {"role": "assistant", "content": "x", "reasoning_content": "so"}, *HI]
    opens.ask(stream=False, messages=messages, reasoning_effort="low")
    assert "(so)x" in opens.prompt
    assert "low|<think>" in opens.prompt
    kwargs = {"chat_template_kwargs": {"reasoning_effort": "high"}}
    opens.ask(stream=False, reasoning_effort="low", extra_body=kwargs)
    assert "high|" in opens.prompt


def test_a_form_begins_behind_the_reasoning(opens):
    pytest.importorskip("llguidance")
    opens.says('Hm.</think>{"a": 1}')
    options = {"response_format": {"type": "json_object"}}
    assert opens.ask(stream=True, **options) == ("Hm.", '{"a": 1}', [], "stop")
    end = opens.tokenizer.token_id("</think>")
    assert opens.submit.params.structured.after == end
    opens.says('{"a": 1}')
    options["reasoning_effort"] = "none"
    assert opens.ask(stream=True, **options) == ("", '{"a": 1}', [], "stop")
    assert opens.submit.params.structured.after is None


@pytest.mark.parametrize("stream", [False, True])
def test_channels_of_harmony(harmony, stream):
    harmony.says("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
                 "<|message|>Yes.")  # fmt: skip
    assert harmony.ask(stream=stream) == ("Hm.", "Yes.", [], "stop")
    harmony.says("<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}")
    tools = [{"type": "function", "function": {"name": "look"}}]
    reasoning, content, calls, reason = harmony.ask(stream=stream, tools=tools)
    assert (reasoning, content or "", calls, reason) == ("", "", ["look"], "tool_calls")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort='high' has no effect"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "'tools' is not for a request"),
        ({"messages": [{**HI[0], "reasoning_content": "x"}]}, "is for the role 'assistant'"),
        ({"extra_body": {"chat_template_kwargs": 3}}, "chat_template_kwargs: input should be"),
    ],
)
def test_what_is_wrong_is_refused(plain, options, sentence):
    plain.says("x")
    with pytest.raises(openai.BadRequestError) as caught:
        plain.ask(stream=False, **options)
    assert sentence in caught.value.body["message"]


def test_without_marks_all_is_the_answer(plain):
    plain.says("<think>a</think>b")
    options = {"reasoning_effort": "none", "extra_body": {"chat_template_kwargs": {"x": 1}}}
    assert plain.ask(stream=False, **options) == ("", "<think>a</think>b", [], "stop")
