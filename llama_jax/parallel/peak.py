"""What a device can do at best: the denominator of model FLOPs utilisation (MFU)."""

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its `device_kind`; the first that fits counts.
# TPUs: cloud.google.com/tpu/docs, by chip; v2, v3 and 7x show each of a chip's two cores as a device of its own.
# GPUs: NVIDIA's data sheets, without sparsity.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v2", 45e12 / 2),
    ("TPU v3", 123e12 / 2),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p, under both of its names
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100", 989.5e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA GH200", 989.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in dense bfloat16 products; `None` for a CPU and for a device that is not in the table.

    Args:
      device_kind: as `jax.Device.device_kind` has it, such as `TPU v5 lite` or `NVIDIA H100 80GB HBM3`.
    """
    return next((peak for name, peak in _PEAKS if device_kind.startswith(name)), None)
