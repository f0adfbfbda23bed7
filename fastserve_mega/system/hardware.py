"""What devices and links do, with the figures of public data sheets.

Sizes in bytes, bandwidths in bytes/s per direction, times in seconds. The `*_efficiency` fractions
say how much of a data sheet's peak well-tuned kernels reach. They are assumptions, the same for
every device here, and not fitted to any result:

- 0.8 of memory bandwidth: what matrix-vector products and STREAM-like kernels reach on HBM.
- 0.6 of peak FLOP/s: large half-precision matrix products in a transformer's prefill.
- 0.8 of PCIe: a pinned copy over 4.0 x16 reaches about 25 of 32 GB/s.
"""

from __future__ import annotations

from fastserve_mega.records import Fraction, PositiveFloat, PositiveInt, Record, Seconds

GIB = 2**30


class Device(Record, frozen=True, kw_only=True):
    """One accelerator."""

    name: str
    """For messages."""
    memory_bytes: PositiveInt
    """As the driver reports it."""
    memory_bandwidth: PositiveFloat
    """Bytes/s of device memory, as in the data sheet."""
    peak_flops: PositiveFloat
    """Dense half-precision FLOP/s, as in the data sheet."""
    host_bandwidth: PositiveFloat
    """Bytes/s of the link to host memory in one direction (PCIe), as in the data sheet."""
    memory_efficiency: Fraction = 0.8
    """Share of `memory_bandwidth` that kernels reach."""
    compute_efficiency: Fraction = 0.6
    """Share of `peak_flops` that matrix products reach."""
    host_efficiency: Fraction = 0.8
    """Share of `host_bandwidth` that copies reach."""


class Link(Record, frozen=True, kw_only=True):
    """Between devices of one node, or between nodes; the bandwidth is what collectives reach."""

    name: str
    """For messages."""
    bandwidth: PositiveFloat
    """Bytes/s in one direction, between devices that of each device, between nodes of a node."""
    latency_s: Seconds
    """Time of one small message or all-reduce, launch included."""


# NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950, 2021): 40 GB HBM2 at 1,555 GB/s,
# 312 TFLOPS FP16/BF16 dense, PCIe Gen4 64 GB/s both directions together; SXM and PCIe alike.
# NVIDIA H200 data sheet (2024): 141 GB HBM3e at 4.8 TB/s, 1,979 TFLOPS BF16 with sparsity, half of
# it dense, PCIe Gen5 128 GB/s both directions together.
# NVIDIA H100 data sheet (SXM, 2023): 80 GB HBM3 at 3.35 TB/s, the rest like the H200.
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
            name="h100-80g",
            memory_bytes=80 * GIB,
            memory_bandwidth=3350e9,
            peak_flops=989.5e12,
            host_bandwidth=64e9,
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

# Data sheets as above: NVLink 600 GB/s (A100 SXM) and 900 GB/s (H100 SXM, H200), both directions
# together. Collectives reach about 0.75 of one direction. The latencies of a small collective (its
# launch included) are assumptions, made before any result was seen. Without NVLink they go over
# PCIe.
# An AWS p4d.24xlarge, the paper's node, has 400 Gbit/s of network (EC2 instance page).
LINKS = {
    link.name: link
    for link in (
        Link(name="nvlink-a100", bandwidth=0.75 * 300e9, latency_s=15e-6),
        Link(name="nvlink-h100", bandwidth=0.75 * 450e9, latency_s=15e-6),
        Link(name="nvlink-h200", bandwidth=0.75 * 450e9, latency_s=15e-6),
        Link(name="pcie-4", bandwidth=0.6 * 32e9, latency_s=25e-6),
        Link(name="network-400g", bandwidth=0.75 * 50e9, latency_s=40e-6),
    )
}


class HardwareConfig(Record, frozen=True, kw_only=True):
    """The machines a deployment is meant for.

    `fastserve-mega plan` and `simulate` compute with them, on any machine; ranks look at the device
    they have. A device or a link is a name, or a mapping of figures of one's own.
    """

    device: str | Device | None = None
    """What each rank has: a100-40g, h100-80g, h200, or its figures. None leaves it open; then a
    simulation needs a profile for the times of steps, and takes copies to the host for free."""
    device_memory_gb: PositiveFloat | None = None
    """Memory of a device, GiB. None takes what `device` has, or leaves open what fits."""
    devices_per_node: PositiveInt = 8
    """GPUs of a node, one per rank."""
    host_memory_gb: PositiveFloat | None = None
    """Memory of a node, GiB."""
    interconnect: str | Link = "pcie-4"
    """Between the devices of a node: nvlink-a100, nvlink-h100, nvlink-h200, pcie-4, or figures."""
    network: str | Link = "network-400g"
    """Between nodes: network-400g, or figures."""
    layer_overhead_s: Seconds = 10e-6
    """Simulated time of the small kernels and launches of a layer in each step."""
    step_overhead_s: Seconds = 1e-3
    """Simulated time from a step's result to the next plan's start: scheduling, messages and
    sampling."""

    def __post_init__(self) -> None:
        for name, known in (("device", DEVICES), ("interconnect", LINKS), ("network", LINKS)):
            if isinstance(value := getattr(self, name), str) and value not in known:
                raise ValueError(
                    f"hardware.{name}: {value!r} is not known; known are {', '.join(known)}"
                )

    @property
    def device_figures(self) -> Device | None:
        return DEVICES[self.device] if isinstance(self.device, str) else self.device

    @property
    def interconnect_figures(self) -> Link:
        return LINKS[self.interconnect] if isinstance(self.interconnect, str) else self.interconnect

    @property
    def network_figures(self) -> Link:
        return LINKS[self.network] if isinstance(self.network, str) else self.network

    @property
    def device_memory_bytes(self) -> int | None:
        """Memory of a device; None when nothing says it."""
        if self.device_memory_gb is not None:
            return int(self.device_memory_gb * GIB)
        device = self.device_figures
        return None if device is None else device.memory_bytes

    def spans_nodes(self, first_rank: int, last_rank: int) -> bool:
        """Whether ranks are on more than one node; nodes are filled one after another."""
        return first_rank // self.devices_per_node != last_rank // self.devices_per_node
