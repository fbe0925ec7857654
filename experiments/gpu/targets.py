"""Descriptions of GPUs by their hardware figures, to compile for them on another machine."""

import dataclasses
import importlib.metadata

# XLA's GpuTargetConfigProto. Figures of the hardware; versions of a driver and a toolkit that this
# compiler accepts.
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
  shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  pcie_bandwidth: 34359738368
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.{minor}"
  name: "{name}"
  device_address_bits: 64 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str
    major: int
    minor: int
    cores: int
    fpus: int
    per_core: int  # bytes of shared memory
    optin: int
    bandwidth: int  # bytes a second
    l2: int
    clock: float
    memory: int
    extension: str = "NONE"

    @property
    def has_kernels(self) -> bool:
        """Whether Pallas' Triton back end supports it."""
        return self.major >= 8


TARGETS = {
    "h200": Target("NVIDIA H200", 9, 0, 132, 128, 233472, 232448, 4800000000000, 52428800, 1.98,
                   151397597184, "ACCELERATED_FEATURES"),
    "a100": Target("NVIDIA A100-SXM4-40GB", 8, 0, 108, 64, 167936, 166912, 1555200000000, 41943040,
                   1.41, 42331013120),
    "l4": Target("NVIDIA L4", 8, 9, 58, 128, 102400, 101376, 300000000000, 50331648, 2.04,
                 24000000000),
    "t4": Target("Tesla T4", 7, 5, 40, 64, 65536, 65536, 320000000000, 4194304, 1.59, 15800000000),
}  # fmt: skip


def missing_compiler() -> str | None:
    """Says why nothing can be compiled here for a GPU, None if it can."""
    version = importlib.metadata.version("jaxlib")
    for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed (pip install -e .[aot])"
        if found != version:
            return f"{name} is {found}, jaxlib is {version}: install the same version"
    return None


def description(target: str) -> str:
    """Returns XLA's description of one of TARGETS."""
    return _TARGET.format(**dataclasses.asdict(TARGETS[target]))
