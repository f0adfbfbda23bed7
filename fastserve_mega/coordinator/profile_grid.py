"""Which steps `fastserve-mega profile` and a starting server measure."""

from __future__ import annotations

from dataclasses import dataclass

_CONTEXTS = (16, 128, 512, 2048, 8192, 32768)
_MIXED_CONTEXTS = (128, 256, 1024)
_MIXED_PREFILLS = (16, 64, 256)
_CHUNKS = (16, 64, 256)
_CHUNK_STARTS = (256, 1024)
_FIRST_SIZES = (16, 64, 256, 1024)
_FIRSTS_PER_SIZE = 5
_QUICK_CONTEXTS = (16, 512, 2048)


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """What the server to be measured can hold."""

    device_blocks: int
    block_size: int
    max_batch_size: int
    max_batch_tokens: int
    max_context: int
    stages: int = 1
    """Steps that can be in flight at once."""

    @property
    def max_prefill(self) -> int:
        """Tokens of the longest prefill in one step that leaves room to decode once."""
        return max(min(self.max_batch_tokens, self.max_decode_context), 1)

    def max_decodes(self, context: int) -> int:
        """Requests of `context` tokens that can decode in one step."""
        blocks_each = -(-(context + 1) // self.block_size)
        return min(
            self.max_batch_size, self.max_batch_tokens, (self.device_blocks - 1) // blocks_each
        )

    @property
    def max_decode_context(self) -> int:
        """Tokens of the longest request that can decode alone."""
        return min(self.max_context - 1, (self.device_blocks - 1) * self.block_size - 1)

    def prefill_grid(self) -> list[int]:
        """Lengths of prefills."""
        return _powers_of_two(self.max_prefill)

    def decode_grid(self) -> list[tuple[int, int]]:
        """(batch, context) of decode steps of equal requests.

        The same batches at every context, as far as they fit: a batch measured at one context only
        would say nothing of the others.
        """
        room = self.max_decode_context
        contexts = [context for context in _CONTEXTS if context <= room] or [room]
        batches = _powers_of_two(self.max_decodes(contexts[0]))
        return [
            (batch, context)
            for context in contexts
            for batch in batches
            if batch <= self.max_decodes(context)
        ]

    def mixed_grid(self) -> list[tuple[int, tuple[int, ...]]]:
        """(prefill tokens, contexts) of steps whose requests are of all ages."""
        found = []
        for mean in _MIXED_CONTEXTS:
            longest = 2 * mean
            if longest > self.max_decode_context:
                continue
            for batch in {self.max_decodes(longest), -(-self.max_decodes(longest) // 2)}:
                contexts = tuple(longest * (2 * i + 1) // (2 * batch) for i in range(batch))
                blocks = sum(-(-(context + 1) // self.block_size) for context in contexts)
                room = (self.device_blocks - 1 - blocks) * self.block_size
                limit = min(self.max_batch_tokens - batch, self.max_context - 1, room)
                lengths = (0, *(tokens for tokens in _MIXED_PREFILLS if tokens <= limit))
                found += [(tokens, contexts) for tokens in lengths]
        return sorted(found)

    def chunk_grid(self) -> list[tuple[int, int]]:
        """(start, tokens) of later chunks of prompts that do not fit into one step."""
        lengths = sorted({min(tokens, self.max_prefill) for tokens in _CHUNKS})
        return [
            (start, tokens)
            for start in _CHUNK_STARTS
            for tokens in lengths
            if start + tokens <= self.max_decode_context
        ]

    def first_grid(self) -> list[int]:
        """Lengths of prefills that no other step of the profile has as its number of tokens.

        They lie around a few sizes, so that there is more than one measurement of each.
        """
        known = {1, *self.prefill_grid(), *(tokens for _, tokens in self.chunk_grid())}
        known |= {batch for batch, _ in self.decode_grid()}
        known |= {tokens + len(contexts) for tokens, contexts in self.mixed_grid()}
        found: list[int] = []
        lengths = [length for length in range(1, self.max_prefill + 1) if length not in known]
        for size in sorted({min(size, self.max_prefill) for size in _FIRST_SIZES}):
            fresh = [(abs(length - size), length) for length in lengths if length not in found]
            found += [length for _, length in sorted(fresh)[:_FIRSTS_PER_SIZE]]
        return sorted(found)

    def quick_prefills(self) -> list[int]:
        """Lengths of prefills for a server that starts."""
        return sorted({max(self.max_prefill // divisor, 1) for divisor in (1, 4, 16, 64)})

    def quick_decodes(self) -> list[tuple[int, int]]:
        """(batch, context) of decode steps for a server that starts, the cheap contexts first.

        The contexts are far apart: what a token of context costs is the small difference of two
        noisy times, and is extrapolated to the longest request.
        """
        room = self.max_decode_context
        contexts = sorted({min(context, room) for context in _QUICK_CONTEXTS})
        most = self.max_decodes(contexts[0])
        return [
            (batch, context)
            for context in contexts
            for batch in sorted({1, -(-most // 4), most})
            # The longest context is for the slope only, and too slow with many requests.
            if batch <= self.max_decodes(context) and (batch == 1 or context < _QUICK_CONTEXTS[-1])
        ]


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … and the limit itself."""
    return [*(1 << i for i in range(limit.bit_length()) if 1 << i < limit), limit]
