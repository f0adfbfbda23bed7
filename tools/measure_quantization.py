"""What 8 bits cost in quality: perplexity, and how often the best token is another.

Compares a model with itself under other settings, as kv_cache.dtype=fp8 or model.quantization=fp8.

The text is that of Python's own manual, which comes with every Python. Each window is read token by
token through the cache, as in decoding, or with --prefill at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer

from fastserve_mega.system.config_file import load_config
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput, StepOutput
from fastserve_mega.worker.topology import Topology

BLOCK_SIZE = 16
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


class Reader:
    """In the place of the sampler: keeps what the model thinks of the text."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows
        self.losses: list[Tensor] = []
        self.best: list[Tensor] = []

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Nothing to prepare."""

    def __call__(self, logits: Tensor, sequences: Sequence[SequenceInput]) -> StepOutput:
        """Compare the logits of a step with the tokens that follow."""
        following = self._windows[:, sequences[0].context]
        logits = logits.float().cpu()
        self.losses.append(torch.nn.functional.cross_entropy(logits, following))
        self.best.append(logits.argmax(dim=-1))
        return StepOutput([0] * len(sequences))


def read(windows: Tensor, settings: Sequence[str], arguments: argparse.Namespace) -> Reader:
    """Read all windows beside each other."""
    count, length = windows.shape
    blocks = -(-length // BLOCK_SIZE)
    config = load_config(
        None,
        [
            f"model.path={arguments.model}",
            f"model.dtype={arguments.dtype}",
            f"parallel.device={arguments.device}",
            f"parallel.threads_per_rank={arguments.threads}",
            f"parallel.cpu_engine={arguments.cpu_engine}",
            f"kv_cache.block_size={BLOCK_SIZE}",
            f"kv_cache.device_blocks={1 + count * blocks}",
            *settings,
        ],
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    reader = Reader(windows)
    if arguments.prefill:
        prefill(runner, windows, reader)
        return reader
    runner._sampler = reader
    for position in range(length - 1):
        runner.execute(
            [
                SequenceInput(
                    request_id=RequestId(str(row)),
                    token_ids=[int(windows[row, position])],
                    start=position,
                    block_table=range(1 + row * blocks, 1 + (row + 1) * blocks),
                    samples=True,
                    params=GREEDY,
                    seed=0,
                    prompt_tokens=1,
                )
                for row in range(count)
            ]
        )
    runner.close()
    return reader


def prefill(runner: MegatronRunner, windows: Tensor, reader: Reader) -> None:
    """Read each window in one step, as a prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, prompt_logprobs=True)
    for window in windows.tolist():
        told = runner.execute(
            [
                SequenceInput(
                    request_id=RequestId("window"),
                    token_ids=window[:-1],
                    start=0,
                    block_table=range(1, 1 + -(-len(window) // BLOCK_SIZE)),
                    samples=False,
                    params=params,
                    seed=0,
                    prompt_tokens=len(window),
                    history=TokenHistory(len(window), window, []),
                )
            ]
        )
        tokens = told.scored[0].logprobs
        reader.losses.append(-torch.tensor([each.logprob for each in tokens]).mean())
        reader.best.append(torch.tensor([each.top_ids[0] for each in tokens]))
    runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-engine", default="torch", choices=("torch", "native"))
    parser.add_argument(
        "--compare",
        nargs="+",
        default=["kv_cache.dtype=fp8", "model.quantization=fp8"],
        help="settings, each beside none of them",
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="read a window in one step, where its KV cache does not matter: faster",
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    arguments = parser.parse_args()
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    # Not verbose: it would warn of a text longer than the context, of which windows are read.
    tokens = AutoTokenizer.from_pretrained(arguments.model)(text, verbose=False)["input_ids"]
    count, length = arguments.windows, arguments.length
    starts = [row * (len(tokens) // count) for row in range(count)]
    windows = torch.tensor([tokens[start : start + length] for start in starts])
    before = None
    for settings in ([], *([setting] for setting in arguments.compare)):
        reader = read(windows, settings, arguments)
        best = torch.stack(reader.best)
        before = best if before is None else before
        print(
            f"{' '.join(settings) or 'neither'}: perplexity "
            f"{torch.stack(reader.losses).mean().exp():.4f}, best token equal: "
            f"{(best == before).float().mean():.4f} of {best.numel()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
