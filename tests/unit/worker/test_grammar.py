"""The grammar a sequence is held to, on the rank that samples."""

from __future__ import annotations

import json
import threading
from datetime import date

import pytest
import torch

pytest.importorskip("llguidance")

from fastserve_mega.text.structured import load_llguidance
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import MAX_CHOICES, RequestId, SamplingParams, StructuredOutput
from fastserve_mega.worker import grammar
from fastserve_mega.worker.grammar import GrammarError, GrammarMatcher, Grammars
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.sampler import Sampler

VOCABULARY = 352
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {"fox": {"enum": ["日本", "naïve"]}, "dogs": {"type": "integer", "maximum": 999}},
    "required": ["fox", "dogs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def grammars(tiny_tokenizer_dir):
    return Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,))


def write(grammars, structured, *, seed=0, restart_at=(), limit=200):
    """Sample from random logits until the end; at some points only the tokens are kept."""
    sampler = Sampler((EOS,), grammars)
    params = SamplingParams(structured=structured, max_tokens=limit)
    history = TokenHistory(3)
    for position in range(3, 3 + limit):
        if len(history.output) in restart_at:
            history = TokenHistory(3, (), history.output)
        sequence = SequenceInput(
            RequestId("r"), [1], position - 1, [1], True, params, seed, 3, history
        )
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(position))
        output = sampler(logits, [sequence])
        assert output.failures == ()
        if output.token_ids == [EOS]:
            return history.output
        history.follow(position, output.token_ids)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(5))
def test_a_json_schema(grammars, tokenizer, seed):
    structured = StructuredOutput(json_schema=json.dumps(SCHEMA))
    value = json.loads(tokenizer.decode(write(grammars, structured, seed=seed)))
    assert set(value) == {"fox", "dogs"}
    assert value["fox"] in ("日本", "naïve")
    assert value["dogs"] <= 999


@pytest.mark.parametrize("restart_at", [(), (1, 40)])
def test_a_form_may_begin_behind_a_token(grammars, tokenizer, restart_at):
    """Until then the output is free; with 352 tokens at random that takes a while."""
    mark = 77
    structured = StructuredOutput(choice=("the fox", "the dog"), after=mark)
    output = write(grammars, structured, seed=1, restart_at=restart_at, limit=3000)
    thought, answer = output[: output.index(mark)], output[output.index(mark) + 1 :]
    assert len(thought) > 1
    assert tokenizer.decode(answer) in ("the fox", "the dog")


@pytest.mark.parametrize("seed", range(5))
def test_a_regular_expression_and_a_choice(grammars, tokenizer, seed):
    import re

    text = tokenizer.decode(write(grammars, StructuredOutput(regex=r"[a-d]{3,5}-\d{2}"), seed=seed))
    assert re.fullmatch(r"[a-d]{3,5}-\d{2}", text)
    choices = ('say "日本"', "naïve\ncafé", "\\")
    text = tokenizer.decode(write(grammars, StructuredOutput(choice=choices), seed=seed))
    assert text in choices


def test_the_state_is_rebuilt_from_the_output(grammars):
    structured = StructuredOutput(json_schema=json.dumps(SCHEMA))
    undisturbed = write(grammars, structured)
    assert len(undisturbed) > 5
    assert write(grammars, structured, restart_at=range(100)) == undisturbed


def test_others_in_the_batch_are_not_held(grammars):
    params = SamplingParams(structured=StructuredOutput(choice=("fox",)), temperature=0.0)
    plain = SamplingParams(temperature=0.0)
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 150] = 9.0
    sequences = [
        SequenceInput(RequestId("r"), [1], 2, [1], True, p, 0, 3, TokenHistory(3))
        for p in (params, plain)
    ]
    held, free = Sampler((EOS,), grammars)(logits, sequences).token_ids
    assert (held == 150, free == 150) == (False, True)


@pytest.mark.parametrize(
    ("structured", "sentence"),
    [
        (StructuredOutput(regex="(["), "unclosed character class"),
        (StructuredOutput(json_schema="{"), "not valid JSON"),
        (StructuredOutput(json_schema='{"type": "banana"}'), "banana"),
        (StructuredOutput(json_schema='{"$ref": "http://x/y"}'), "http://x/y"),
        (StructuredOutput(json_schema="[" * 30_000), "recursion"),
        (StructuredOutput(json_schema='{"items": {"multipleOf": 99991}}'), "10000, got 99991"),
        (
            StructuredOutput(json_schema=f'{{"items": {{"enum": ["a", {{"a": {2**53 + 1}}}]}}}}'),
            f"at most {2**53} in size, got {2**53 + 1}",
        ),
    ],
)
def test_a_bad_grammar_ends_its_request_and_nothing_else(grammars, structured, sentence):
    params = [SamplingParams(structured=structured), SamplingParams(temperature=0.0)]
    sequences = [
        SequenceInput(RequestId("r"), [1], 2, [1], True, p, 0, 3, TokenHistory(3)) for p in params
    ]
    output = Sampler((EOS,), grammars)(torch.arange(2.0 * VOCABULARY).view(2, -1), sequences)
    (failure,) = output.failures
    assert failure.index == 0
    assert sentence in failure.message
    assert output.token_ids[1] == VOCABULARY - 1


def test_an_expression_that_explodes_is_its_own_fault_and_told_in_one_sentence(
    grammars, monkeypatch
):
    limits = load_llguidance().LLParserLimits(max_lexer_states=5)
    monkeypatch.setattr(grammar, "grammar_limits", lambda: limits)
    with pytest.raises(GrammarError, match="cannot be followed: lexer error") as caught:
        grammars.hold(
            torch.zeros(VOCABULARY), StructuredOutput(regex="((ab|c){90}){90}"), TokenHistory(3)
        )
    assert caught.value.is_invalid
    assert "<state>" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_comes_first_is_found_out_where_nobody_waits_for_it(tiny_tokenizer_dir, monkeypatch):
    masks = []

    class Slow(GrammarMatcher):
        def _compute_mask(self):
            masks.append(threading.current_thread().name)
            return super()._compute_mask()

    monkeypatch.setattr(grammar, "GrammarMatcher", Slow)
    grammars = Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,))
    history = TokenHistory(3)
    grammars.hold(torch.zeros(VOCABULARY), StructuredOutput(regex="a{9}"), history)
    assert masks == ["grammar"]


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_tokenizer_dir, tokenizer):
    small = tokenizer.vocab_size - 3
    logits = torch.zeros(small)
    grammars = Grammars(tiny_tokenizer_dir, small, (EOS,))
    grammars.hold(logits, StructuredOutput(choice=("fox",)), TokenHistory(3))
    allowed = [tokenizer.token_bytes(i) for i in range(small) if logits[i] == 0]
    assert allowed
    assert all(b"fox".startswith(each) for each in allowed)


@pytest.mark.parametrize("seed", range(3))
def test_digits_words_and_spaces_are_those_of_ascii(grammars, tokenizer, seed):
    import re

    expression = r"\d{3}[\d\-]{3}\w{3}\s\\d"
    text = tokenizer.decode(write(grammars, StructuredOutput(regex=expression), seed=seed))
    assert re.fullmatch(expression, text, re.ASCII)


def test_forms_that_exclude_each_other_and_names_that_are_strings(grammars, tokenizer):
    schema = {
        "type": "object",
        "properties": {"propertyNames": {"oneOf": [{"const": 1}, {"const": 2}]}},
        "required": ["propertyNames"],
        "propertyNames": {"type": "string"},
        "additionalProperties": False,
    }
    held = StructuredOutput(json_schema=json.dumps(schema))
    assert json.loads(tokenizer.decode(write(grammars, held)))["propertyNames"] in (1, 2)


@pytest.mark.parametrize("name", ["password", "x-anything"])
def test_a_format_that_is_not_known_says_nothing(grammars, tokenizer, name):
    text = {"type": "string", "format": name, "maxLength": 3}
    schema = {"properties": {"format": text, "when": {"type": "string", "format": "date"}},
              "required": ["format", "when"], "type": "object"}  # fmt: skip
    value = json.loads(
        tokenizer.decode(write(grammars, StructuredOutput(json_schema=json.dumps(schema))))
    )
    assert len(value["format"]) <= 3
    assert date.fromisoformat(value["when"])


def test_a_grammar_that_takes_too_long_ends_its_request_and_nothing_else(
    tiny_tokenizer_dir, monkeypatch
):
    released = threading.Event()
    endless = StructuredOutput(regex="endless")

    def compile_slowly(tokenizer, text):
        if "endless" in text:
            released.wait()
        return GrammarMatcher(tokenizer, text)

    monkeypatch.setattr(grammar, "GrammarMatcher", compile_slowly)
    hurried = Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,), limit_s=0.0)
    patient = Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,), limit_s=60.0)
    try:
        for _ in range(4):
            with pytest.raises(GrammarError, match="more than 0 s to compile"):
                hurried.hold(torch.zeros(VOCABULARY), endless, TokenHistory(3))
        with pytest.raises(GrammarError, match="4 other structures take too long"):
            hurried.hold(torch.zeros(VOCABULARY), endless, TokenHistory(3))
        # Begun before, and waited for after: none holds up another one.
        waiting = TokenHistory(3)
        patient.begin(endless, waiting)
        patient.hold(torch.zeros(VOCABULARY), StructuredOutput(choice=("fox",)), TokenHistory(3))
    finally:
        released.set()
    patient.hold(torch.zeros(VOCABULARY), endless, waiting)


def test_a_grammar_that_takes_too_long_for_a_token_ends_its_request(tiny_tokenizer_dir):
    hurried = Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,), mask_limit_s=-1.0)
    with pytest.raises(GrammarError, match="for a token, the limit is -1 s"):
        hurried.hold(torch.zeros(VOCABULARY), StructuredOutput(choice=("fox",)), TokenHistory(3))


def test_the_longest_list_of_choices_can_be_followed(grammars):
    choices = tuple(f"{number}" for number in range(MAX_CHOICES))
    grammars.hold(torch.zeros(VOCABULARY), StructuredOutput(choice=choices), TokenHistory(3))


def test_without_a_tokenizer_or_an_end_there_are_no_grammars(tmp_path, tiny_tokenizer_dir):
    choice = StructuredOutput(choice=("fox",))
    for grammars, sentence in [
        (Grammars(tmp_path, VOCABULARY, (EOS,)), "needs tokenizer.json"),
        (Grammars(tiny_tokenizer_dir, VOCABULARY, ()), "end-of-sequence"),
    ]:
        with pytest.raises(GrammarError, match=sentence):
            grammars.hold(torch.zeros(VOCABULARY), choice, TokenHistory(3))


def test_output_that_left_the_grammar_is_an_error(grammars):
    history = TokenHistory(3, (), [150, 150])
    with pytest.raises(GrammarError, match="cannot be followed"):
        grammars.hold(torch.zeros(VOCABULARY), StructuredOutput(choice=("fox",)), history)


def test_definitions_in_a_long_chain_do_not_take_the_rank_down(tiny_tokenizer_dir):
    chain = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1480)}
    schema = json.dumps({"$defs": {**chain, "1480": {}}, "$ref": "#/$defs/0"})
    patient = Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,), limit_s=60.0, mask_limit_s=60.0)
    patient.hold(torch.zeros(VOCABULARY), StructuredOutput(json_schema=schema), TokenHistory(3))


def test_the_tokenizer_of_grammars_is_loaded_before_anybody_asks(tiny_tokenizer_dir, monkeypatch):
    loads = threading.Event()
    load = Grammars._load_tokenizer
    monkeypatch.setattr(Grammars, "_load_tokenizer", lambda self: loads.set() or load(self))
    Grammars(tiny_tokenizer_dir, VOCABULARY, (EOS,))
    assert loads.wait(60)
