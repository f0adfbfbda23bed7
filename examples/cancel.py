"""Stop an answer when there is enough of it; the server stops computing it."""

from fastserve_mega import Client, SamplingParams

with Client("tcp://127.0.0.1:5570") as client:
    answer = client.generate("Once upon a time", SamplingParams(max_tokens=400, ignore_eos=True))
    for chunk in answer:
        print(chunk.text, end="", flush=True)
        if len(answer.token_ids) >= 20:
            answer.cancel()
    print(f"\n[{answer.finish_reason.value} after {len(answer.token_ids)} tokens]")
