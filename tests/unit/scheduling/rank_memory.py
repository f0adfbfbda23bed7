"""What the pools of ranks hold that execute plans, checked with each of them."""

BLOCK_SIZE = 4


class RankMemory:
    """The tokens in the blocks of both pools, and the block tables that the plans have told."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Begin anew, as ranks do that were lost."""
        self.pools = {"device": {}, "host": {}}
        """What each slot of each pool holds: the name of a token."""
        self.tables: dict[str, list[int]] = {}

    def check_written_blocks(self, in_flight):
        """Blocks may be shared as long as nobody writes to them.

        Args:
            in_flight: plans with the keys of their batches.
        """
        running = {key: self.tables[key] for _, keys in in_flight for key in keys}
        for plan, keys in in_flight:
            for key, piece in zip(keys, plan.batch, strict=True):
                end = piece.start + piece.num_tokens
                written = running[key][piece.start // BLOCK_SIZE : -(-end // BLOCK_SIZE)]
                others = {b for other, table in running.items() if other != key for b in table}
                assert not others & set(written), "a block that is written has another owner"

    def run_slice(self, key, piece, content):
        """Compute a slice; `content` names all tokens of its request."""
        device = self.pools["device"]
        table = self.tables.setdefault(key, [])
        if piece.block_ids:
            table[piece.block_start :] = piece.block_ids
        end = piece.start + piece.num_tokens
        assert piece.num_tokens >= 1
        assert end <= len(content)
        assert piece.samples == (end == len(content))
        assert len(table) * BLOCK_SIZE >= end
        assert 0 not in table

        def slot(position):
            return table[position // BLOCK_SIZE], position % BLOCK_SIZE

        for position in range(piece.start):
            assert device.get(slot(position)) == content[position], "the KV of a token is lost"
        for position in range(piece.start, end):
            device[slot(position)] = content[position]

    def run_copy(self, copy):
        """At its start and again at its end: between these it may happen at any time."""
        source, target = self._pools_of(copy)
        for here, there in zip(copy.source_ids, copy.target_ids, strict=True):
            assert here
            assert there
            for offset in range(BLOCK_SIZE):
                target[there, offset] = source.get((here, offset))

    def held_by_source(self, copy):
        source, _ = self._pools_of(copy)
        return [source.get((b, offset)) for b in copy.source_ids for offset in range(BLOCK_SIZE)]

    def _pools_of(self, copy):
        pools = ("device", "host") if copy.direction == "swap_out" else ("host", "device")
        return [self.pools[pool] for pool in pools]
