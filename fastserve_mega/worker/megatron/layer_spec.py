"""The layers that a stage is made of: Megatron's own, or Transformer Engine's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.megatron.attention import PagedAttention
from fastserve_mega.worker.megatron.experts import PartialRowLinear
from fastserve_mega.worker.megatron.layers import (
    ColumnLinear,
    InferenceLayer,
    ProjectionNorm,
    RowLinear,
    ZeroCenteredRMSNorm,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What the layers are built from."""

    linears: Literal["local", "transformer_engine"]
    """Megatron's own, or Transformer Engine's, which bring their norms along."""
    reason: str
    fused_norm: bool = False
    """LayerNorm is NVIDIA Apex's."""
    unrelated_apex: bool = False
    """The package `apex` is installed and is not NVIDIA's."""
    float8: bool = False
    """Weights of linears have 8 bits."""


def choose_layers(
    setting: str, architecture: Architecture, device: torch.device, *, float8: bool = False
) -> LayerChoice:
    """Find out what is installed, and what of it this device can use.

    Args:
        setting: model.layer_spec of the configuration.
        architecture: of the model.
        device: of the rank.
        float8: weights have 8 bits, model.quantization=fp8.

    Raises:
        ValueError: Transformer Engine was asked for and cannot be used.
    """
    obstacle = None
    if setting != "local" and float8:
        obstacle = "model.quantization=fp8 is for Megatron's own layers"
    elif setting != "local" and not architecture.pre_norms:
        obstacle = "the norms that Transformer Engine's linears have are not in this model"
    elif setting != "local":
        obstacle = _transformer_engine_obstacle(device)
    if setting == "transformer_engine" and obstacle is not None:
        raise ValueError(f"model.layer_spec=transformer_engine, but {obstacle}")
    apex_installed, apex_is_nvidias = _find_apex()
    unrelated_apex = apex_installed and not apex_is_nvidias
    if setting != "local" and obstacle is None:
        return LayerChoice("transformer_engine", "it is installed", unrelated_apex=unrelated_apex)
    return LayerChoice(
        "local",
        obstacle or "model.layer_spec=local",
        # Apex's RMSNorm is not among Megatron's norms.
        fused_norm=apex_is_nvidias and _is_gpu(device) and architecture.norm == "layer",
        unrelated_apex=unrelated_apex,
        float8=float8,
    )


def log_choice(choice: LayerChoice) -> None:
    """One line on the choice, for the log of rank 0, and a warning of the wrong `apex`."""
    names = {"local": "Megatron's own", "transformer_engine": "Transformer Engine's"}
    norm = " with Apex's fused LayerNorm" if choice.fused_norm else ""
    _log.info("layers: %s%s (%s)", names[choice.linears], norm, choice.reason)
    if choice.unrelated_apex:
        _log.warning(
            "the package apex that is installed is not NVIDIA Apex (it has no apex.normalization) "
            "and is not used; PyPI's apex is unrelated, NVIDIA's is at github.com/NVIDIA/apex"
        )


def _transformer_engine_obstacle(device: torch.device) -> str | None:
    """Why Transformer Engine cannot be used, None if it can."""
    if not _is_gpu(device):
        return "Transformer Engine needs a CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a build for another CUDA or torch fails in many ways
        return f"Transformer Engine cannot be imported: {' '.join(str(error).split())}"
    if not gpt_layer_specs.HAVE_TE:
        return "this version of Megatron-Core cannot use this version of Transformer Engine"
    return None


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _find_apex() -> tuple[bool, bool]:
    """Whether a package `apex` is installed, and whether it is NVIDIA's."""
    if "apex" not in sys.modules and importlib.util.find_spec("apex") is None:
        return False, False
    try:
        importlib.import_module("apex.normalization")
    except Exception:  # PyPI's unrelated package of that name fails in its own ways
        return True, False
    return True, True


def block_spec(
    architecture: Architecture, partition: Partition, choice: LayerChoice
) -> TransformerBlockSubmodules:
    """Megatron's specification of a stage's layers, with our forward passes and our attention."""
    norm = _norm(architecture, choice)
    layers = [
        _layer_spec(architecture, partition, choice, norm, experts=architecture.has_experts(layer))
        for layer in partition.layers
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _norm(architecture: Architecture, choice: LayerChoice) -> Any:
    if choice.linears == "transformer_engine":
        return gpt_layer_specs.TENorm
    if architecture.zero_centered_norm:
        return ZeroCenteredRMSNorm
    return FusedLayerNorm if choice.fused_norm else WrappedTorchNorm


def _layer_spec(
    architecture: Architecture,
    partition: Partition,
    choice: LayerChoice,
    norm: Any,
    *,
    experts: bool,
) -> Any:
    num_experts = architecture.experts.count if experts and architecture.experts else None
    if choice.linears == "transformer_engine":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, qk_layernorm=architecture.qk_norm is not None
        )
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=num_experts,
            qk_layernorm=architecture.qk_norm is not None,
            normalization="RMSNorm" if architecture.norm == "rms" else "LayerNorm",
        )
    spec.module = InferenceLayer
    spec.params = {**spec.params, "residual_scale": architecture.residual_scale}
    if architecture.post_norms:
        spec.params["post_norm"] = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PagedAttention
    if choice.linears == "local":
        # Named here, since Megatron takes any package called apex for NVIDIA's.
        pre_norm = norm if architecture.pre_norms else IdentityOp
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = pre_norm
        attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    if architecture.qk_norm == "projection":
        attention.q_layernorm = _projection_norm(architecture.num_heads, partition.query_heads)
        attention.k_layernorm = _projection_norm(architecture.num_kv_heads, partition.kv_heads)
    elif architecture.qk_norm:
        # Their input is a strided view, which Transformer Engine's norm may not take.
        plain = ZeroCenteredRMSNorm if architecture.zero_centered_norm else WrappedTorchNorm
        attention.q_layernorm = attention.k_layernorm = plain
    mlp = _parts(spec.submodules.mlp)
    if experts:
        # Not Transformer Engine's: that of the shared expert would sum over the ranks by itself.
        for experts_mlp in (_parts(mlp.experts), _parts(mlp.shared_experts)):
            experts_mlp.linear_fc1, experts_mlp.linear_fc2 = ColumnLinear, PartialRowLinear
    elif choice.linears == "local":
        mlp.linear_fc1, mlp.linear_fc2 = ColumnLinear, RowLinear
    return spec


def _projection_norm(num_heads: int, own_heads: range) -> ModuleSpec:
    return ModuleSpec(ProjectionNorm, {"num_heads": num_heads, "own_heads": own_heads})


def _parts(spec: Any) -> Any:
    """A functools.partial from Megatron-Core 0.19 on, a ModuleSpec before."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules
