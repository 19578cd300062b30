"""What the makers say of GPUs: memory, arithmetic, and links."""

from __future__ import annotations

from dataclasses import dataclass

GIGA = 1e9
MIB = 2**20


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: the name of `mmi plan --type`.
        title: part of the name that the driver gives it.
        mib: memory that the driver shows, in MiB.
        tflops: dense bf16 peak, in TFLOP/s.
        bandwidth: of its memory, in GB/s.
        link: to the GPUs of its machine, in GB/s each way.
        network: its share of the links between machines, in GB/s each way. A data sheet of a GPU does not say; these
            are one 400 Gb/s adapter a GPU for H100 and later, 200 Gb/s for A100, and 100 Gb/s for GPUs on PCIe.
        source: where the figures come from.
    """

    name: str
    title: str
    mib: int
    tflops: float
    bandwidth: float
    link: float
    network: float
    source: str

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return self.mib * MIB


_SHEET = "NVIDIA {} data sheet"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("b200", "B200", 183_359, 2250.0, 8000.0, 900.0, 50.0, _SHEET.format("DGX B200")),
        GPU("h200", "H200", 143_771, 989.0, 4800.0, 450.0, 50.0, _SHEET.format("H200 (SXM)")),
        GPU("h100", "H100 80GB HBM3", 81_559, 989.0, 3350.0, 450.0, 50.0, _SHEET.format("H100 (SXM)")),
        GPU("h100-pcie", "H100 PCIe", 81_559, 756.0, 2000.0, 64.0, 12.5, _SHEET.format("H100 (PCIe)")),
        GPU("a100", "A100-SXM4-80GB", 81_920, 312.0, 2039.0, 300.0, 25.0, _SHEET.format("A100 80GB (SXM)")),
        GPU("a100-40", "A100-SXM4-40GB", 40_960, 312.0, 1555.0, 300.0, 25.0, _SHEET.format("A100 40GB (SXM)")),
        GPU("l40s", "L40S", 46_068, 362.0, 864.0, 32.0, 12.5, _SHEET.format("L40S")),
        GPU("l4", "L4", 23_034, 121.0, 300.0, 32.0, 12.5, _SHEET.format("L4")),
        GPU("rtx4090", "4090", 24_564, 165.0, 1008.0, 32.0, 12.5, "NVIDIA Ada GPU architecture, version 2.02"),
    )
}
# Dense bf16 peak in TFLOP/s of devices by part of their names; the first that matches decides.
PEAKS = {gpu.title: gpu.tflops for gpu in GPUS.values()} | {"H100": 989.0, "GH200": 989.0, "A100": 312.0}
