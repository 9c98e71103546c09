"""The GPUs a plan knows: what they hold, how fast they compute, and what their networks carry.

Enter: a name. Leave: a `Machine`. Refused: other names. Rates are what was measured, not what data sheets say; each
figure names its source, and says where it is an estimate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mmpretrain.core.accelerators import TERA, peak_flops
from mmpretrain.core.errors import ConfigError
from mmpretrain.planning.communication import Bandwidth, Network

GIGA, MIB = 1e9, 2**20


@dataclass(frozen=True)
class Rates:
    """Of one GPU, in FLOP/s and bytes/s."""

    peak: float
    """Of the data sheet, half precision, dense: what MFU is a share of."""
    gemm: float
    """Products of half precision as they occur in a transformer."""
    gemm_fp32: float
    attention: float
    """Fused attention of half precision, forward and backward."""
    memory: float


@dataclass(frozen=True)
class Machine:
    """A kind of GPU in nodes of eight."""

    name: str
    memory: float
    """Bytes a process sees."""
    reserved: float
    """Bytes of them that the context, communicators and fragmentation take: an estimate."""
    rates: Rates
    within: Network
    """Between the GPUs of a node."""
    between: Network
    """Between nodes."""
    gpus_per_node: int = 8

    @property
    def capacity(self) -> float:
        """Bytes a step may take."""
        return self.memory - self.reserved

    def network(self, ranks: int) -> Network:
        return self.within if ranks <= self.gpus_per_node else self.between


_SIZES = [2**power * MIB / 32 for power in range(20)]
"""32 KiB to 16 GiB."""
_NODE = (
    *(3.15, 6.16, 12.46, 24.68, 48.15, 74.57, 96.26, 145.14, 196.56, 255.9),
    *(301.25, 368.86, 414.54, 441.87, 456.23, 465.91, 471.06, 474.13, 478.24, 482.25),
)
"""GB/s of all-reduce on 8 H200, NCCL 2.30.7: ml-engineering, network/benchmarks. H100 has the same NVLink 4."""
_NODES = (
    *(0.65, 1.27, 2.35, 4.06, 6.99, 12.47, 20.79, 31.63, 50.61, 71.8),
    *(142.9, 197.77, 260.5, 283.23, 309.91, 365.99, 371.26, 374.66, 376.14, 376.71),
)
"""The same on 4 nodes of 8 B200, whose network cards carry 400 Gbit/s a GPU as those of H100 and H200 nodes do."""
_ONE_WAY_WITHIN, _ONE_WAY_BETWEEN = 361 / 473, 0.98
"""Gathers and scatters beside all-reduce: 361 and 363 of 473 GB/s on 8 H200 (ml-engineering), whose switches add up for
all-reduce alone; 324 of 331 GB/s on 32 H100 (Voltage Park's cluster report)."""


def _network(all_reduce: tuple[float, ...], factor: float, one_way: float) -> Network:
    def scaled(share: float) -> Bandwidth:
        return Bandwidth(tuple(_SIZES), tuple(GIGA * rate * factor * share for rate in all_reduce))

    return Network(scaled(1.0), scaled(one_way), scaled(one_way))


def _peak(name: str) -> float:
    found = peak_flops(name, "bf16")
    assert found is not None, f"{name} is not in the table of accelerators"
    return found


_HOPPER_NETWORKS = (_network(_NODE, 1.0, _ONE_WAY_WITHIN), _network(_NODES, 1.0, _ONE_WAY_BETWEEN))
_GEMM_SHARE = 0.88
"""Of the largest rate of any product (MAMF) that those of a transformer reach: 0.85 to 0.92, an estimate."""

MACHINES: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            name="h100",  # SXM, 80 GB HBM3
            memory=79.1 * 2**30,
            reserved=2.5 * 2**30,
            # MAMF 794.5 and data sheets: ml-engineering. Copies 2.9 TB/s: Voltage Park. Attention at head width 64 and
            # length 512: 282 forward (FlashAttention 3, figure 5); 270 with the backward and fp32 are estimates.
            rates=Rates(_peak("H100"), 794.5 * TERA * _GEMM_SHARE, 50 * TERA, 270 * TERA, 2.9 * TERA),
            within=_HOPPER_NETWORKS[0],
            between=_HOPPER_NETWORKS[1],
        ),
        Machine(
            name="h200",  # the same chip with 141 GB HBM3e at 4.8 TB/s
            memory=139.8 * 2**30,
            reserved=2.5 * 2**30,
            rates=Rates(_peak("H200"), 794.5 * TERA * _GEMM_SHARE, 50 * TERA, 270 * TERA, 4.3 * TERA),
            within=_HOPPER_NETWORKS[0],
            between=_HOPPER_NETWORKS[1],
        ),
        Machine(
            name="a100",  # SXM, 80 GB HBM2e
            memory=79.1 * 2**30,
            reserved=2.5 * 2**30,
            # MAMF 271.2: ml-engineering. All else is an estimate: 0.87 of 2.04 TB/s; attention after FlashAttention 2.
            # Networks: 235 GB/s within a node (ml-engineering), and cards of half the rate.
            rates=Rates(_peak("A100"), 271.2 * TERA * _GEMM_SHARE, 16 * TERA, 120 * TERA, 1.77 * TERA),
            within=_network(_NODE, 235 / 482, 1.0),
            between=_network(_NODES, 0.5, _ONE_WAY_BETWEEN),
        ),
    )
}


def machine_named(name: str) -> Machine:
    """Raises ConfigError for a name that is none of these."""
    if name not in MACHINES:
        raise ConfigError(f"--gpu is {name!r}; choose one of {', '.join(MACHINES)}")
    return MACHINES[name]
