"""A file of weights for a config.json, where nobody looks at their values."""

from __future__ import annotations

import json
import math

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.system.weights import weights_of


def write_weights(directory, **shapes):
    """A file of zeros, with other shapes than config.json implies for some tensors."""
    architecture = load_architecture(directory)
    partition = partition_model(architecture, ParallelConfig(), 0, 1)
    pieces = [piece for weight in weights_of(architecture, partition) for piece in weight.pieces]
    header, end = {}, 0
    for piece in pieces:
        shape = shapes.get(piece.bare_name, piece.shape)
        begin, end = end, end + 2 * math.prod(shape)
        header[piece.tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
