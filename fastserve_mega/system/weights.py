"""Which parts of a Hugging Face checkpoint make up each of Megatron's parameters.

One description for both directions: loading copies the parts into the parameters of a rank,
converting copies whole parameters back into the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.system.expert_weights import expert_weights
from fastserve_mega.system.partition import Partition
from fastserve_mega.system.pieces import Piece, Weight, stack


def weights_of(
    architecture: Architecture, partition: Partition, *, fused_experts: bool = False
) -> Iterator[Weight]:
    """All parameters of a rank, in the order of the model's layers.

    Args:
        architecture: of the model.
        partition: of the rank.
        fused_experts: the checkpoint has all experts of a layer in two tensors.
    """
    return _Source(architecture, partition, fused_experts=fused_experts).weights()


def unused_positions(architecture: Architecture) -> Iterator[Weight]:
    """Rows of the position table before that of position 0, which conversions keep."""
    positions = architecture.positions
    if isinstance(positions, LearnedPositions) and positions.first_row:
        names, hidden = architecture.weights, architecture.hidden_size
        name = f"{names.position_embedding}.weight"
        shape = (positions.first_row + architecture.max_context, hidden)
        rows = range(positions.first_row)
        piece = Piece(names.prefix + name, name, shape, rows, range(hidden))
        yield Weight("embedding.unused_positions", (len(rows), hidden), (piece,), extra=True)


class _Source:
    """Megatron's parameters of one rank, put together from Hugging Face tensors."""

    def __init__(
        self, architecture: Architecture, partition: Partition, *, fused_experts: bool
    ) -> None:
        self._fused_experts = fused_experts
        self._architecture = architecture
        self._partition = partition
        self._names = architecture.weights

    def weights(self) -> Iterator[Weight]:
        names, partition = self._names, self._partition
        if partition.is_first_stage:
            yield self._vocab_rows("embedding.word_embeddings.weight", names.embedding)
            yield from self._position_table()
        for local, layer in enumerate(partition.layers):
            for weight in self._layer(layer):
                name = f"decoder.layers.{local}.{weight.name}"
                yield Weight(name, weight.shape, weight.pieces)
        if partition.is_last_stage:
            yield from self._norm("decoder.final_layernorm", names.final_norm)
            if not self._architecture.tied_embeddings:
                yield self._vocab_rows("output_layer.weight", names.head, prefixed=False)
            elif not partition.is_first_stage:
                yield self._vocab_rows("output_layer.weight", names.embedding)

    def _layer(self, layer: int) -> Iterator[Weight]:
        def at(name: str | None) -> str:
            return (name or "").format(layer=layer)

        names, architecture = self._names, self._architecture
        hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
        if architecture.pre_norms:
            yield from self._norm("input_layernorm", at(names.input_norm))
            yield from self._norm("pre_mlp_layernorm", at(names.feed_forward_norm))
        yield self._qkv(layer, "weight")
        if architecture.qkv_bias or architecture.linear_bias:
            yield self._qkv(layer, "bias")
        if architecture.qk_norm:
            yield self._head_norm("q", at(names.query_norm), architecture.num_heads)
            yield self._head_norm("k", at(names.key_norm), architecture.num_kv_heads)
        heads = self._elements(self._partition.query_heads)
        attention_size = architecture.num_heads * architecture.head_dim
        yield from self._row(
            "self_attention.linear_proj", at(names.attention_output), attention_size, heads
        )
        if architecture.post_norms:
            yield from self._norm("post_attention_layernorm", at(names.post_attention_norm))
            yield from self._norm("post_mlp_layernorm", at(names.post_feed_forward_norm))
        if architecture.has_experts(layer):
            yield from expert_weights(
                architecture, self._partition, layer, self._linear, fused=self._fused_experts
            )
            return
        parts = list(self._feed_forward_rows(layer))
        linears = [self._linear(name, (size, hidden), rows=rows) for name, size, rows in parts]
        yield stack("mlp.linear_fc1.weight", linears)
        if architecture.linear_bias:
            yield stack("mlp.linear_fc1.bias", [self._bias(*part) for part in parts])
        columns = self._partition.ffn_columns
        yield from self._row("mlp.linear_fc2", at(names.down), ffn, columns)

    def _feed_forward_rows(self, layer: int) -> Iterator[tuple[str, int, range]]:
        """Name, rows in all, and this rank's rows: of the gate, if there is one, and of `up`."""
        names, size = self._names, self._architecture.ffn_hidden_size
        own = self._partition.ffn_columns
        if names.fused_gate_up:
            name = names.fused_gate_up.format(layer=layer)
            yield name, 2 * size, own
            yield name, 2 * size, range(size + own.start, size + own.stop)
            return
        for half in (names.gate, names.up):
            if half:
                yield half.format(layer=layer), size, own

    def _head_norm(self, target: str, name: str, heads: int) -> Weight:
        """For each head the same, or for all of the whole model."""
        norms_all = self._architecture.qk_norm == "projection"
        piece = self._vector(
            f"{name}.weight", self._architecture.head_dim * (heads if norms_all else 1)
        )
        return stack(f"self_attention.{target}_layernorm.weight", [piece])

    def _qkv(self, layer: int, kind: str) -> Weight:
        """Per key-value head of the rank: its query heads, the key, the value."""
        partition = self._partition
        group = len(partition.query_heads) // len(partition.kv_heads)
        parts = []
        for local, kv_head in enumerate(partition.kv_heads):
            first = partition.query_heads.start + local * group
            query = self._elements(range(first, first + group))
            key_value = self._elements(range(kv_head, kv_head + 1))
            for which, rows in enumerate((query, key_value, key_value)):
                parts.append(self._qkv_rows(layer, kind, which, rows))
        return stack(f"self_attention.linear_qkv.{kind}", parts)

    def _qkv_rows(self, layer: int, kind: str, which: int, rows: range) -> Piece:
        """Rows of the query (0), key (1) or value (2) projection."""
        names, architecture = self._names, self._architecture
        heads = (architecture.num_heads, architecture.num_kv_heads, architecture.num_kv_heads)
        sizes = [count * architecture.head_dim for count in heads]
        name, size = (names.query, names.key, names.value)[which], sizes[which]
        if names.fused_qkv:
            name, size = names.fused_qkv, sum(sizes)
            offset = sum(sizes[:which])
            rows = range(rows.start + offset, rows.stop + offset)
        name = (name or "").format(layer=layer)
        if kind == "bias":
            return self._bias(name, size, rows)
        return self._linear(name, (size, architecture.hidden_size), rows=rows)

    def _row(self, target: str, name: str, input_size: int, columns: range) -> Iterator[Weight]:
        """A linear divided along its input; its bias is whole on all ranks."""
        hidden = self._architecture.hidden_size
        piece = self._linear(name, (hidden, input_size), columns=columns)
        yield stack(f"{target}.weight", [piece])
        if self._architecture.linear_bias:
            yield stack(f"{target}.bias", [self._bias(name, hidden, range(hidden))])

    def _norm(self, target: str, name: str) -> Iterator[Weight]:
        kinds = ("weight", "bias") if self._architecture.norm == "layer" else ("weight",)
        for kind in kinds:
            piece = self._vector(f"{name}.{kind}", self._architecture.hidden_size)
            yield stack(f"{target}.{kind}", [piece])

    def _position_table(self) -> Iterator[Weight]:
        architecture = self._architecture
        if isinstance(architecture.positions, LearnedPositions):
            first = architecture.positions.first_row
            shape = (first + architecture.max_context, architecture.hidden_size)
            rows = range(first, shape[0])
            piece = self._matrix(f"{self._names.position_embedding}.weight", shape, rows)
            yield stack("embedding.position_embeddings.weight", [piece])

    def _elements(self, heads: range) -> range:
        head_dim = self._architecture.head_dim
        return range(heads.start * head_dim, heads.stop * head_dim)

    def _vocab_rows(self, target: str, name: str, *, prefixed: bool = True) -> Weight:
        """The rank's rows of the table; padding is not in the checkpoint."""
        rows = self._partition.vocab_rows
        hidden, vocab_size = self._architecture.hidden_size, self._architecture.vocab_size
        present = range(min(rows.start, vocab_size), min(rows.stop, vocab_size))
        shape = (vocab_size, hidden)
        piece = self._matrix(f"{name}.weight", shape, present, prefixed=prefixed)
        return Weight(target, (len(rows), hidden), (piece,))

    def _linear(
        self,
        name: str,
        shape: tuple[int, int],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Piece:
        """Rows are outputs and columns inputs, whichever way the file keeps them."""
        name = f"{name}.weight"
        transposed = self._names.transposed
        return Piece(
            self._names.prefix + name,
            name,
            shape[::-1] if transposed else shape,
            range(shape[0]) if rows is None else rows,
            range(shape[1]) if columns is None else columns,
            transposed=transposed,
        )

    def _matrix(
        self, name: str, shape: tuple[int, int], rows: range, *, prefixed: bool = True
    ) -> Piece:
        """Whole rows of a table."""
        full_name = self._names.prefix + name if prefixed else name
        return Piece(full_name, name, shape, rows, range(shape[1]))

    def _bias(self, name: str, size: int, rows: range) -> Piece:
        """Optional: Megatron has all biases of a kind, or none."""
        name = f"{name}.bias"
        return Piece(self._names.prefix + name, name, (size,), rows, optional=True)

    def _vector(self, name: str, size: int) -> Piece:
        return Piece(self._names.prefix + name, name, (size,), range(size))
