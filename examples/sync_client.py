"""Ask and wait for the whole answer, over ZeroMQ."""

from fastserve_mega import Client, SamplingParams

with Client("tcp://127.0.0.1:5570") as client:
    params = SamplingParams(max_tokens=32, temperature=0.0)
    answer = client.generate("The largest city of Japan is", params).wait()
    print(answer.text)
    print(f"[{answer.finish_reason.value}, {answer.usage.completion_tokens} tokens]")
