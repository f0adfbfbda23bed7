"""A chat template with tools, and what answers say of calls."""

from __future__ import annotations

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_call_id %}[{{ m.name }} {{ m.tool_call_id }}] {% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("look", "ask")
]
LOOK = {"type": "function", "function": {"name": "look"}}
ARGUMENTS = '{"q": "日本 🙂"}'
CALL = f'<tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]
ENDS = 2


def ask(api, **options):
    """(content, [(name, arguments)], finish reason), streamed or not."""
    done = api.chat.completions.create(
        model="tiny", **{"messages": HI, "tools": TOOLS, "max_tokens": 500, **options}
    )
    return put_together(list(done)) if options.get("stream") else of_message(done)


def of_message(done):
    (choice,) = done.choices
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    told = [(call.function.name, call.function.arguments) for call in calls]
    return choice.message.content, told, choice.finish_reason


def put_together(chunks):
    content, calls, ids = None, [], set()
    for delta in (chunk.choices[0].delta for chunk in chunks):
        if delta.content:
            content = (content or "") + delta.content
        for call in delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls)
                ids.add(call.id)
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
    assert len(ids) == len(calls)
    return content, [tuple(call) for call in calls], chunks[-1].choices[0].finish_reason
