"""Layers with a window and layers that see everything, in families that have both."""

from __future__ import annotations

from fastserve_mega.models.architecture import Rope
from fastserve_mega.models.fields import Fields
from fastserve_mega.models.llama import rope_of


def windowed_layers(fields: Fields, pattern: int) -> tuple[bool, ...]:
    """Which layers have a window: `layer_types`, or all but the last of each `pattern`."""
    num_layers = fields.integer("num_hidden_layers")
    types = fields.texts("layer_types")
    if types is None:
        return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != num_layers:
        raise ValueError(
            f"layer_types must name sliding_attention or full_attention for {num_layers} layers, "
            f"got {list(types)}"
        )
    return tuple(kind == "sliding_attention" for kind in types)


def ropes_by_kind(
    by_kind: Fields, fields: Fields, default_thetas: tuple[float, float]
) -> tuple[Rope, Rope]:
    """Rotations of the layers that see everything, and of those with a window.

    Args:
        by_kind: `rope_parameters` with a section for each kind of layer.
        fields: config.json.
        default_thetas: in the same order, where a section names none.
    """
    if fields.raw("rope_scaling"):
        raise ValueError("rope_scaling must stand in rope_parameters, where config.json has those")
    sections = [by_kind.section(f"{kind}_attention") for kind in ("full", "sliding")]
    ropes = [
        Rope(theta=theta) if section is None else rope_of(section, fields, theta)
        for section, theta in zip(sections, default_thetas, strict=True)
    ]
    return ropes[0], ropes[1]
