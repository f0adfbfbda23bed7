"""Templates and tokenizers in every form that directories of models have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastserve_mega.text.chat_template import ChatTemplate
from fastserve_mega.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "<b>hi</b> 日"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
LIKE_THOSE_OF_MODELS = """
{%- if not messages %}{{ raise_exception('nothing was said') }}{% endif %}
{{- bos_token }}
{%- set seen = namespace(system=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set seen.system = true %}{% continue %}{% endif %}
    {% generation %}{{ message['role'] + ': ' + message.content | trim }}{% endgeneration %}
    {%- if tools is not none and loop.last %}{{ tools | tojson(indent=2) }}{% endif %}
{%- endfor %}
{%- if strftime_now is defined %}{{ strftime_now('%%') }}{% endif %}
{%- if add_generation_prompt %}
assistant:
{% endif %}
"""


def write_settings(directory: Path, **settings: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")


@pytest.fixture
def directory(tiny_tokenizer_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "model"))


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_templates_are_rendered_as_transformers_does(directory, tools):
    (directory / "chat_template.jinja").write_text(LIKE_THOSE_OF_MODELS, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(directory)
    text = theirs.apply_chat_template(
        HELLO, tools=tools or None, tokenize=False, add_generation_prompt=True
    )
    ours = Tokenizer(directory)
    assert "<b>hi</b>" in text
    assert ours.apply_chat_template(HELLO, tools) == ours.encode(text, add_special_tokens=False)


def test_a_template_may_stand_in_a_file_of_a_processor(directory):
    """As Gemma 3's and Mistral's models have it that see images as well."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    write_settings(directory, chat_template=None)
    (directory / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
    assert Tokenizer(directory).render_chat([{"role": "user", "content": "hi"}]) == "hi!"


def test_a_conversation_with_tools_takes_the_template_named_for_them(directory):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} of them"},
    ]
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    write_settings(directory, chat_template=named)
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.apply_chat_template(HELLO)) == "plain"
    assert tokenizer.decode(tokenizer.apply_chat_template(HELLO, TOOLS)) == "1 of them"
    assert tokenizer.chat_template.source == "{{ tools | length }} of them"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for", "unexpected|expected"),
        ("{{ messages[0].content.nowhere.at_all }}", "no attribute"),
        ("{{ raise_exception('not like this') }}", "not like this"),
    ],
)
def test_a_template_that_fails_is_refused_in_one_sentence(source, message):
    with pytest.raises(ValueError, match=f"chat template refuses the messages: .*({message})"):
        ChatTemplate(source).render(HELLO)


STRICT = """
{%- for m in messages %}
    {%- if m.role == 'system' and (not loop.first or no_system) %}{{ raise_exception('system') }}
    {%- elif not loop.first and m.role == loop.previtem.role %}{{ raise_exception('in turn') }}
    {%- endif %}[{{ m.role }}]{{ m.content }}
    {%- for c in m.tool_calls or [] %}({{ c }}){% endfor %}
{%- endfor %}"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("uu", "[user]0\n\n1"),
        ("suau", "[system]0[user]1[assistant]2[user]3"),
        ("ssu", "[system]0\n\n1[user]2"),
        ("usau", "[system]1[user]0[assistant]2[user]3"),
        ("uaau", "[user]0[assistant]1\n\n2[user]3"),
    ],
)
def test_what_one_role_says_is_joined_where_the_template_wants_that(words, expected):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": roles[word], "content": str(i)} for i, word in enumerate(words)]
    before = [dict(message) for message in messages]
    assert ChatTemplate(STRICT).render(messages) == expected
    assert messages == before
    with pytest.raises(ValueError, match=r"refuses the messages: (system|in turn)$"):
        ChatTemplate(STRICT).render([*messages, *[{"role": "t", "content": ""}] * 2])


def test_where_nothing_is_the_systems_the_user_says_it():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    told = ChatTemplate(STRICT).render(messages, variables={"no_system": True})
    assert told == "[user]s\n\nu"


def test_calls_in_a_row_are_calls_of_one_message():
    call = {"role": "assistant", "content": "", "tool_calls": [1]}
    more = {"role": "assistant", "content": "and", "tool_calls": [2]}
    end = {"role": "assistant", "content": "so"}
    assert ChatTemplate(STRICT).render([call, more]) == "[assistant]and(1)(2)"
    told = ChatTemplate(STRICT).render([*HELLO, end, end], end="open message")
    assert told == f"[user]{HELLO[0]['content']}[assistant]so\n\nso"


def test_tokens_that_only_the_settings_make_special_are_skipped(directory):
    described = {"content": "<|end of turn|>", "special": True, "lstrip": False, "rstrip": False,
                 "normalized": False, "single_word": False}  # fmt: skip
    before = Tokenizer(directory)
    write_settings(directory, added_tokens_decoder={str(before.vocab_size): described})
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode("fox<|end of turn|>fox")
    assert ids.count(before.vocab_size) == 1
    assert tokenizer.decode(ids) == "foxfox"
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    assert theirs.encode("fox<|end of turn|>fox") == ids


def test_a_tokenizer_in_an_older_form_is_converted(directory, tmp_path):
    backend = json.loads((directory / "tokenizer.json").read_text())
    older = tmp_path / "older"
    older.mkdir()
    vocabulary = backend["model"]["vocab"]
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]
    ]
    (older / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (older / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
    (older / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (older / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    tokenizer = Tokenizer(older)
    assert tokenizer.decode(tokenizer.encode("the quick 日 fox")) == "the quick 日 fox"
