"""Grammars of structured output, by llguidance, an optional dependency; changes to JSON schemas."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from types import ModuleType
from typing import Any

from fastserve_mega.types import MAX_CHOICES, StructuredOutput

NOT_INSTALLED = (
    "structured output needs llguidance, which is not installed on the server: "
    "pip install 'fastserve_mega[structured]'"
)
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
"""One way to write JSON, since small models may otherwise write spaces without end; and `oneOf`
means `anyOf`, as elsewhere: whoever writes it has forms that exclude each other, which need not be
provable. A schema's own `x-guidance` comes before it."""
_LONGEST_MESSAGE = 300
_MOST_MULTIPLES = 10_000
"""What the numbers of all `multipleOf` may add up to: each takes a state for every remainder, and
llguidance sets no limit to that."""
_LARGEST_INTEGER = 2**53
"""Beyond it llguidance writes another number that is close."""
_ASCII_CLASSES = {"d": "[[:digit:]]", "w": "[[:word:]]", "s": "[[:space:]]"}
_FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
"""Strings of these formats llguidance holds the output to. Any other is an annotation, as the
standard has it: pydantic writes `password`, `binary` and `path`."""
_LIMITS = {
    "max_items_in_row": 2 * MAX_CHOICES,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
}
"""llguidance's own but for two: a list of choices is one row, and a request has not the memory of
250,000 states."""
Schema = dict[str, Any]
_DATA = frozenset({"const", "enum", "default", "examples", "example"})
"""Keywords whose values are no schemas, whatever they look like."""
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose values are maps from any name to a schema."""


class GrammarUnavailableError(Exception):
    """llguidance is not installed; str() is one sentence."""


def load_llguidance() -> ModuleType:
    """The module.

    Raises:
        GrammarUnavailableError: it is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise GrammarUnavailableError(NOT_INSTALLED) from None
    module: ModuleType = llguidance
    return module


def grammar_limits() -> Any:
    """What compiling and following one grammar may take; beyond it is an error of the grammar.

    Raises:
        GrammarUnavailableError: llguidance is not installed.
    """
    return load_llguidance().LLParserLimits(**_LIMITS)


def grammar_of(structured: StructuredOutput) -> str:
    """The grammar in llguidance's form; it may turn out not to be valid.

    Raises:
        ValueError: the schema is not JSON, or neither an object nor a boolean, or would take too
            long to compile.
        GrammarUnavailableError: llguidance is not installed.
    """
    matcher: Any = load_llguidance().LLMatcher
    if structured.json_schema is not None:
        try:
            schema = json.loads(structured.json_schema)
        except ValueError as error:
            raise ValueError(f"the JSON schema is not valid JSON: {error}") from None
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"a JSON schema must be an object, got {structured.json_schema[:40]}")
        if (multiples := sum(_multiples(schema))) > _MOST_MULTIPLES:
            raise ValueError(
                f"the numbers of multipleOf in a JSON schema add up to at most {_MOST_MULTIPLES}, "
                f"got {multiples}"
            )
        schema = rewrite(schema, _without_idle_keywords)
        return str(matcher.grammar_from_json_schema(schema, defaults=_JSON_STYLE))
    if structured.regex is not None:
        return str(matcher.grammar_from_regex(_ascii_classes(structured.regex)))
    # Lark's strings are written as those of JSON are.
    choices = " | ".join(json.dumps(text) for text in structured.choice or ())
    return str(matcher.grammar_from_lark(f"start: {choices}"))


def _ascii_classes(expression: str) -> str:
    r"""An expression whose `\d`, `\w` and `\s` are those of ASCII, as in a schema's `pattern`.

    Whoever asks for three digits does not mean those of Arabic.
    """
    return re.sub(
        r"\\(.)",
        lambda escape: _ASCII_CLASSES.get(escape[1], escape[0]),
        expression,
        flags=re.DOTALL,
    )


def _without_idle_keywords(schema: Schema) -> Schema:
    """A schema without what holds the output to nothing.

    That is a format that is an annotation, and, as zod says of each record, that names are strings.

    Raises:
        ValueError: it holds the output to a number that could not be written.
    """
    for number in _integers((schema.get("const"), schema.get("enum"))):
        if abs(number) > _LARGEST_INTEGER:
            raise ValueError(
                f"an integer of const or enum is at most {_LARGEST_INTEGER} in size, got {number}"
            )
    given, names = schema.get("format"), schema.get("propertyNames")
    idle = {"format"} if isinstance(given, str) and given not in _FORMATS else set()
    if names in (True, {}, {"type": "string"}):
        idle.add("propertyNames")
    return {key: value for key, value in schema.items() if key not in idle} if idle else schema


def _integers(data: object) -> Iterator[int]:
    """All integers in some JSON."""
    if isinstance(data, dict):
        data = data.values()
    if isinstance(data, int):
        yield data
    elif isinstance(data, Iterable) and not isinstance(data, str):
        for value in data:
            yield from _integers(value)


def _multiples(schema: object) -> Iterator[int]:
    """The number of each `multipleOf`, without its decimal point."""
    if isinstance(schema, dict):
        number = schema.get("multipleOf")
        if isinstance(number, int | float) and math.isfinite(number):
            yield int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits)))
        for value in schema.values():
            yield from _multiples(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _multiples(value)


def check_structured(structured: StructuredOutput) -> None:
    """Compile the grammar once, which takes up to 0.1 s where it is as long as it may be.

    Raises:
        ValueError: it is not valid, or asks for what llguidance does not know; one sentence.
        GrammarUnavailableError: llguidance is not installed.
    """
    kind = "JSON schema" if structured.json_schema is not None else "regular expression"
    kind = "choice" if structured.choice is not None else kind
    try:
        for text in (structured.json_schema, structured.regex, *(structured.choice or ())):
            (text or "").encode()
        grammar = grammar_of(structured)
    except UnicodeEncodeError as error:
        raise ValueError(f"the {kind} is not valid Unicode: {error.reason}") from None
    except RecursionError:
        raise ValueError(f"the {kind} is nested too deeply") from None
    if complaint := load_llguidance().LLMatcher.validate_grammar(grammar, limits=grammar_limits()):
        told = " ".join(str(complaint).split())[:_LONGEST_MESSAGE]
        raise ValueError(f"the {kind} cannot be used: {told}")


def rewrite(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """A copy of a schema in which it and each schema in it has been changed, inner ones first.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(schema, list):
        return [rewrite(each, change) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return change({key: _rewrite_value(key, value, change) for key, value in schema.items()})


def _rewrite_value(key: str, value: Any, change: Callable[[Schema], Schema]) -> Any:
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: rewrite(each, change) for name, each in value.items()}
    return rewrite(value, change)


def as_definition(schema: Schema, name: str) -> Schema:
    """A whole schema as it has to be to stand in another one as `$defs/NAME`.

    References within it are by their path from the top, so they change with it; it is no document
    of its own any more.

    Args:
        schema: with a type or without one.
        name: without the characters ~, / and %.
    """
    top = f"#/$defs/{name}"

    def move(each: Schema) -> Schema:
        target = each.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            return {**each, "$ref": top + target[1:]}
        return each

    whole = {key: value for key, value in schema.items() if key not in ("$id", "$schema")}
    moved: Schema = rewrite(whole, move)
    return moved
