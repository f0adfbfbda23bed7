"""Chat through the OpenAI-compatible server, with the official client: pip install openai."""

from openai import OpenAI

api = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="not needed")
model = api.models.list().data[0].id

stream = api.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name three rivers in Europe."}],
    max_tokens=64,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
