"""Stream an answer over ZeroMQ, without HTTP."""

from fastserve_mega import Client, SamplingParams

with Client("tcp://127.0.0.1:5570") as client:
    params = SamplingParams(max_tokens=48, temperature=0.7, seed=1)
    answer = client.generate("The capital of France is", params, stop="\n\n")
    for chunk in answer:
        print(chunk.text, end="", flush=True)
    print(f"\n[{answer.finish_reason.value}, {answer.usage.completion_tokens} tokens]")
