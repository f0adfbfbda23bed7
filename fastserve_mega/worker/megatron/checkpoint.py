"""Loads the weights of one rank from a Hugging Face safetensors directory.

Each rank reads only its own slices, so the pages of other ranks' weights are never touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.worker.megatron.expert_weights import ExpertWeights
from fastserve_mega.worker.megatron.model import Stage
from fastserve_mega.worker.partition import Partition

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory by name. Use as a context manager.

    Raises:
        ValueError: a file is missing, cut short or malformed; one sentence names it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self._file_of = self._find_tensors()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def slice(self, name: str) -> Any:
        """A handle that reads only the elements it is indexed with.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._file_of:
            raise ValueError(f"the checkpoint {self._directory} has no tensor {name}")
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self._directory / file}: {error}") from None

    def _find_tensors(self) -> dict[str, str]:
        index_path = self._directory / _INDEX_FILE
        if index_path.is_file():
            try:
                file_of: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{index_path}: not a valid index of safetensors files") from None
            missing = [
                f for f in sorted({*file_of.values()}) if not (self._directory / f).is_file()
            ]
            if missing:
                raise ValueError(
                    f"{self._directory}: {len(missing)} of the files named in {_INDEX_FILE} are "
                    f"missing, the first is {missing[0]}"
                )
            return file_of
        if (self._directory / _SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(_SINGLE_FILE).keys(), _SINGLE_FILE)
        raise ValueError(
            f"{self._directory} holds no weights: neither {_SINGLE_FILE} nor {_INDEX_FILE} is there"
        )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._directory / file
            try:
                handle = safe_open(str(path), framework="pt")
                self._files[file] = self._stack.enter_context(handle)
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: not a whole safetensors file ({error}); was the download cut short?"
                ) from None
        return self._files[file]


def load_weights(
    directory: Path, stage: Stage, architecture: Architecture, partition: Partition
) -> None:
    """Fill all parameters of the stage.

    Raises:
        ValueError: a file or tensor is missing, cut short or has another shape.
    """
    parameters = stage.parameters()
    with Checkpoint(directory) as checkpoint:
        source = _Source(checkpoint, architecture, partition)
        for name, weight in source.weights():
            parameter = parameters.pop(name)
            with torch.no_grad():
                parameter.copy_(weight)
    if parameters:
        raise RuntimeError(f"no weights were loaded for {', '.join(sorted(parameters))}")


class _Source:
    """Megatron's parameters of one rank, put together from Hugging Face tensors."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, partition: Partition
    ) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._partition = partition
        self._names = architecture.weights

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Megatron's name and this rank's slice of each parameter."""
        names, partition = self._names, self._partition
        if partition.is_first_stage:
            yield "embedding.word_embeddings.weight", self._vocab_rows(names.embedding)
            yield from self._position_table()
        for local, layer in enumerate(partition.layers):
            for name, weight in self._layer(layer):
                yield f"decoder.layers.{local}.{name}", weight
        if partition.is_last_stage:
            yield from self._norm("decoder.final_layernorm", names.final_norm)
            if not self._architecture.tied_embeddings:
                yield "output_layer.weight", self._vocab_rows(names.head)
            elif not partition.is_first_stage:
                yield "output_layer.weight", self._vocab_rows(names.embedding)

    def _layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        def at(name: str | None) -> str:
            return (name or "").format(layer=layer)

        names, architecture = self._names, self._architecture
        hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
        yield from self._norm("input_layernorm", at(names.input_norm))
        yield "self_attention.linear_qkv.weight", self._qkv(layer, "weight")
        if architecture.qkv_bias or architecture.linear_bias:
            yield "self_attention.linear_qkv.bias", self._qkv(layer, "bias")
        if architecture.qk_norm:
            for target, name in (("q", names.query_norm), ("k", names.key_norm)):
                weight = self._vector(f"{at(name)}.weight", architecture.head_dim)
                yield f"self_attention.{target}_layernorm.weight", weight
        heads = self._elements(self._partition.query_heads)
        attention_size = architecture.num_heads * architecture.head_dim
        yield from self._row(
            "self_attention.linear_proj", at(names.attention_output), attention_size, heads
        )
        yield from self._norm("pre_mlp_layernorm", at(names.feed_forward_norm))
        if architecture.post_norms:
            yield from self._norm("post_attention_layernorm", at(names.post_attention_norm))
            yield from self._norm("post_mlp_layernorm", at(names.post_feed_forward_norm))
        if architecture.has_experts(layer):
            yield from self._experts(layer)
            return
        columns = self._partition.ffn_columns
        halves = [at(names.gate), at(names.up)] if names.gate else [at(names.up)]
        parts = [self._linear(name, (ffn, hidden), rows=columns) for name in halves]
        yield "mlp.linear_fc1.weight", torch.cat(parts)
        if architecture.linear_bias:
            biases = [self._bias(name, ffn, columns) for name in halves]
            yield "mlp.linear_fc1.bias", torch.cat(biases)
        yield from self._row("mlp.linear_fc2", at(names.down), ffn, columns)

    def _experts(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        experts = ExpertWeights(
            self._architecture,
            self._partition,
            read_linear=self._linear,
            open_slice=self._slice,
            has=lambda name: self._full_name(name) in self._checkpoint,
        )
        return experts.layer(layer)

    def _qkv(self, layer: int, kind: str) -> Tensor:
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
        return torch.cat(parts)

    def _qkv_rows(self, layer: int, kind: str, which: int, rows: range) -> Tensor:
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

    def _row(
        self, target: str, name: str, input_size: int, columns: range
    ) -> Iterator[tuple[str, Tensor]]:
        """A linear divided along its input; its bias is whole on all ranks."""
        hidden = self._architecture.hidden_size
        yield f"{target}.weight", self._linear(name, (hidden, input_size), columns=columns)
        if self._architecture.linear_bias:
            yield f"{target}.bias", self._bias(name, hidden, range(hidden))

    def _norm(self, target: str, name: str) -> Iterator[tuple[str, Tensor]]:
        kinds = ("weight", "bias") if self._architecture.norm == "layer" else ("weight",)
        for kind in kinds:
            yield f"{target}.{kind}", self._vector(f"{name}.{kind}", self._architecture.hidden_size)

    def _position_table(self) -> Iterator[tuple[str, Tensor]]:
        architecture = self._architecture
        if isinstance(architecture.positions, LearnedPositions):
            first = architecture.positions.first_row
            shape = (first + architecture.max_context, architecture.hidden_size)
            table = self._slice(f"{self._names.position_embedding}.weight", shape)
            yield "embedding.position_embeddings.weight", table[first:]

    def _elements(self, heads: range) -> range:
        head_dim = self._architecture.head_dim
        return range(heads.start * head_dim, heads.stop * head_dim)

    def _vocab_rows(self, name: str) -> Tensor:
        rows, vocab_size = self._partition.vocab_rows, self._architecture.vocab_size
        table = self._slice(f"{name}.weight", (vocab_size, self._architecture.hidden_size))
        present: Tensor = table[rows.start : min(rows.stop, vocab_size)]
        padding = present.new_zeros(len(rows) - present.shape[0], present.shape[1])
        return torch.cat((present, padding))

    def _linear(
        self,
        name: str,
        shape: tuple[int, int],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """Rows are outputs and columns inputs, whichever way the file keeps them."""
        row_slice = slice(rows.start, rows.stop) if rows else slice(None)
        column_slice = slice(columns.start, columns.stop) if columns else slice(None)
        if self._names.transposed:
            transposed: Tensor = self._slice(f"{name}.weight", shape[::-1])[column_slice, row_slice]
            return transposed.t()
        weight: Tensor = self._slice(f"{name}.weight", shape)[row_slice, column_slice]
        return weight

    def _bias(self, name: str, size: int, rows: range) -> Tensor:
        """Zero where the checkpoint has none: Megatron has all biases of a kind, or none."""
        if self._full_name(f"{name}.bias") not in self._checkpoint:
            return torch.zeros(len(rows))
        bias: Tensor = self._slice(f"{name}.bias", (size,))[rows.start : rows.stop]
        return bias

    def _vector(self, name: str, size: int) -> Tensor:
        vector: Tensor = self._slice(name, (size,))[:]
        return vector

    def _slice(self, name: str, shape: tuple[int, ...]) -> Any:
        name = self._full_name(name)
        handle = self._checkpoint.slice(name)
        actual = tuple(handle.get_shape())
        if actual != shape:
            raise ValueError(
                f"the checkpoint's {name} has shape {actual}, config.json implies {shape}"
            )
        return handle

    def _full_name(self, name: str) -> str:
        """The output layer, and all of a checkpoint of the bare model, have no prefix."""
        prefixed = self._names.prefix + name
        return name if name in self._checkpoint and prefixed not in self._checkpoint else prefixed
