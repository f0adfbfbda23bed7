"""Steps that only decode, and a stand-in for CUDA graphs of them."""

from __future__ import annotations

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.model_runner import SequenceInput


def decodes(count, context=100):
    return [
        SequenceInput(
            request_id=RequestId(str(index)),
            token_ids=[1],
            start=context - 1,
            block_table=range(1, 1 + -(-context // 16)),
            samples=True,
            params=SamplingParams(),
            seed=0,
            prompt_tokens=4,
        )
        for index in range(count)
    ]


class Again:
    """Records by computing again, into the tensors that the first computation gave."""

    def record(self, compute):
        results = compute()

        def replay():
            for result, again in zip(results, compute(), strict=True):
                if result is not None:
                    result.copy_(again)
            return results

        return replay
