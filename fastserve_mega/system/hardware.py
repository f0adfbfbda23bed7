"""What the simulated cluster and model look like, with the figures of public data sheets.

Sizes in bytes, bandwidths in bytes/s per direction, times in seconds. The `*_efficiency` fractions
say how much of a data sheet's peak well-tuned kernels reach. They are assumptions, the same for
every device and model here, and not fitted to any result:

- 0.8 of memory bandwidth: what matrix-vector products and STREAM-like kernels reach on HBM.
- 0.6 of peak FLOP/s: large half-precision matrix products in a transformer's prefill.
- 0.8 of PCIe: a pinned copy over 4.0 x16 reaches about 25 of 32 GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator."""

    name: str
    memory_bytes: int
    memory_bandwidth: float
    """Bytes/s of device memory, as in the data sheet."""
    peak_flops: float
    """Dense half-precision FLOP/s, as in the data sheet."""
    host_bandwidth: float
    """Bytes/s of the link to host memory in one direction (PCIe), as in the data sheet."""
    memory_efficiency: float = 0.8
    compute_efficiency: float = 0.6
    host_efficiency: float = 0.8

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "memory_bandwidth", "peak_flops", "host_bandwidth"):
            _require_positive(f"device {self.name}", field, getattr(self, field))
        for field in ("memory_efficiency", "compute_efficiency", "host_efficiency"):
            if not 0.0 < getattr(self, field) <= 1.0:
                raise ValueError(
                    f"device {self.name}: {field} must be above 0 and at most 1, "
                    f"got {getattr(self, field)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between devices of one node, or between nodes; the bandwidth is what collectives reach."""

    name: str
    bandwidth: float
    """Bytes/s in one direction, between devices that of each device, between nodes of a node."""
    latency_s: float
    """Of one message or one all-reduce, launch included."""

    def __post_init__(self) -> None:
        _require_positive(f"link {self.name}", "bandwidth", self.bandwidth)
        if self.latency_s < 0:
            raise ValueError(
                f"link {self.name}: latency_s must not be negative, got {self.latency_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only transformer that decide its cost.

    Biases and norms are left out: below 0.1 % of the parameters.
    """

    name: str
    layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    learned_positions: int = 0
    """Rows of the position table; 0 for rotary positions."""
    gated: bool = False
    """The feed-forward layer has three matrices instead of two."""
    tied_embeddings: bool = True
    """The output layer is the embedding table."""
    bytes_per_value: int = 2
    """Of a parameter, an activation and a KV element."""

    def __post_init__(self) -> None:
        for field in (
            "layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size",
            "vocab_size", "bytes_per_value",
        ):  # fmt: skip
            _require_positive(f"model {self.name}", field, getattr(self, field))

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden_size * self.ffn_hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Of the token table, which also is the size of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        tables = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        positions = self.learned_positions * self.hidden_size
        return self.layers * self.layer_parameters + tables + positions

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers together."""
        return 2 * self.layers * self.num_kv_heads * self.head_dim * self.bytes_per_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Ranks: tensor x pipeline, tensor ranks of a stage next to each other."""

    tensor: int = 1
    pipeline: int = 1
    devices_per_node: int = 8

    def __post_init__(self) -> None:
        for field in ("tensor", "pipeline", "devices_per_node"):
            _require_positive("mesh", field, getattr(self, field))

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline

    def stage_spans_nodes(self, stage: int) -> bool:
        """Whether the all-reduces of a stage cross the network."""
        return self._node(stage * self.tensor) != self._node((stage + 1) * self.tensor - 1)

    def hop_crosses_nodes(self, stage: int) -> bool:
        """Whether `stage` sends its activations to the next one over the network."""
        return self._node(stage * self.tensor) != self._node((stage + 1) * self.tensor)

    def _node(self, rank: int) -> int:
        return rank // self.devices_per_node


def _require_positive(owner: str, field: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{owner}: {field} must be positive, got {value}")


# NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950, 2021): 40 GB HBM2 at 1,555 GB/s,
# 312 TFLOPS FP16/BF16 dense, PCIe Gen4 64 GB/s both directions together; SXM and PCIe alike.
# NVIDIA H200 data sheet (2024): 141 GB HBM3e at 4.8 TB/s, 1,979 TFLOPS BF16 with sparsity, half of
# it dense, PCIe Gen5 128 GB/s both directions together.
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100-40g",
            memory_bytes=40 * GIB,
            memory_bandwidth=1555e9,
            peak_flops=312e12,
            host_bandwidth=32e9,
        ),
        Device(
            name="h200",
            memory_bytes=141 * 10**9,
            memory_bandwidth=4800e9,
            peak_flops=989.5e12,
            host_bandwidth=64e9,
        ),
    )
}

# Data sheets as above: NVLink 600 GB/s (A100 SXM) and 900 GB/s (H200), both directions together.
# Collectives reach about 0.75 of one direction. The latencies of a small collective (its launch
# included) are assumptions, made before any result was seen. Without NVLink they go over PCIe.
# An AWS p4d.24xlarge, the paper's node, has 400 Gbit/s of network (EC2 instance page).
LINKS = {
    link.name: link
    for link in (
        Link(name="nvlink-a100", bandwidth=0.75 * 300e9, latency_s=15e-6),
        Link(name="nvlink-h200", bandwidth=0.75 * 450e9, latency_s=15e-6),
        Link(name="pcie-4", bandwidth=0.6 * 32e9, latency_s=25e-6),
        Link(name="network-400g", bandwidth=0.75 * 50e9, latency_s=40e-6),
    )
}

# OPT: Zhang et al. 2022 (arXiv 2205.01068), table 1; vocabulary and positions from config.json.
# Llama 3: Grattafiori et al. 2024 (arXiv 2407.21783), table 3.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="opt-13b", layers=40, hidden_size=5120, num_heads=40, num_kv_heads=40,
            head_dim=128, ffn_hidden_size=20480, vocab_size=50272, learned_positions=2050,
        ),
        ModelShape(
            name="opt-66b", layers=64, hidden_size=9216, num_heads=72, num_kv_heads=72,
            head_dim=128, ffn_hidden_size=36864, vocab_size=50272, learned_positions=2050,
        ),
        ModelShape(
            name="opt-175b", layers=96, hidden_size=12288, num_heads=96, num_kv_heads=96,
            head_dim=128, ffn_hidden_size=49152, vocab_size=50272, learned_positions=2050,
        ),
        ModelShape(
            name="llama-3-8b", layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8,
            head_dim=128, ffn_hidden_size=14336, vocab_size=128256, gated=True,
            tied_embeddings=False,
        ),
        ModelShape(
            name="llama-3-70b", layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8,
            head_dim=128, ffn_hidden_size=28672, vocab_size=128256, gated=True,
            tied_embeddings=False,
        ),
    )
}  # fmt: skip
