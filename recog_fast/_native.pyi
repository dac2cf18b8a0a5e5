"""What csrc/module.cpp exports; addresses are data pointers, checked by the callers in `ops`."""

class Classes:
    """The rows of W (or of P) of one call, with their memory."""

    def __init__(
        self,
        *,
        weight: int,
        memory_rows: int,
        strength: int,
        slot: int,
        C: int,
        K: int,
        D: int,
        S: int,
        unit: bool,
        memory_bf16: bool,
        renormalize: bool,
        members: int = 0,
        seen: int = 0,
        all: int = 0,
    ) -> None: ...

class Rows:
    """The embeddings of one call with their targets and rules."""

    def __init__(self, *, unit_embeddings: int, target: int, rules: int, N: int, scale: float, half: bool) -> None: ...

class Kept:
    """A buffer for exponentials between the sweeps; address 0: none are kept."""

    def __init__(self, *, address: int = 0, bytes: int = 0, half: bool = False, lists: bool = False, floor: int = 0) -> None: ...

def select_isa(force: str = "") -> str: ...
def active_isa() -> str: ...
def runs_isa(name: str) -> bool: ...
def pair_format() -> str | None: ...
def micro_kernel_rate(arithmetic: str, seconds: float) -> float: ...
def kept_bytes(classes: Classes, N: int, half: bool, keep_half: bool, lists: bool = False) -> int: ...
def row_sweep(
    classes: Classes, rows: Rows, *, lse: int, nearest_cosine: int, nearest_index: int, pull: int, kept: Kept, threads: int,
    listed: int = 0,
) -> None: ...
def unknown_sweep(
    classes: Classes, rows: Rows, *, lse: int, first_mean: int, mass: int, remainder: int, mean: int, pull: int, threads: int,
    low: int = 0,
) -> None: ...
def class_sweep(
    classes: Classes,
    rows: Rows,
    *,
    terms: int,
    mode: int,
    gradient: int = 0,
    weight: int = 0,
    velocity: int = 0,
    lr: float = 0.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    sparse: bool = False,
    kept: Kept,
    threads: int,
) -> None: ...
def effective_prototypes(classes: Classes, *, prototypes: int, threads: int) -> None: ...

# CUDA kernels: only where `cuda_built()` is (version of CUDA, architectures). Addresses are of device memory, `stream` is a
# cudaStream_t. Every launch raises RuntimeError with the kernel's name and CUDA's text where it fails.

CUDA_MISSING: str  # why there are none, where there are none
CUDA_MOST_COLUMNS: int
CUDA_MOST_WRITTEN: int

class CudaInjection:
    """The memory behind the rows of one call; rows 0: none."""

    def __init__(self, *, rows: int = 0, strength: int = 0, slot: int = 0, bfloat16: bool = False, renormalize: bool = True) -> None: ...

class CudaRing:
    """The state of a prototype memory."""

    def __init__(
        self, *, rows: int, strength: int, stamp: int, owner: int, slot: int, cursor: int, S: int, C: int, D: int, bfloat16: bool
    ) -> None: ...

def cuda_built() -> tuple[str, str] | None: ...
def cuda_missing(device: int) -> str: ...
def cuda_class_step(
    *,
    d_prototypes: int,
    weight: int,
    memory: CudaInjection,
    R: int,
    D: int,
    velocity: int = 0,
    gradient: int = 0,
    lr: float = 0.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    prototypes: int = 0,
    prototypes_bfloat16: bool = False,
    next_memory: CudaInjection = ...,
    rates: int = 0,
    stream: int,
    device: int,
) -> None: ...
def cuda_effective_prototypes(
    *, weight: int, memory: CudaInjection, prototypes: int, bfloat16: bool, R: int, D: int, stream: int, device: int
) -> None: ...
def cuda_memory_write_scratch(N: int, S: int) -> int: ...
def cuda_memory_write(
    ring: CudaRing,
    *,
    embeddings: int,
    labels: int,
    strengths: int,
    N: int,
    step: int,
    bfloat16: bool,
    strengths_double: bool,
    scratch: int,
    evicted: int,
    stream: int,
    device: int,
) -> None: ...
def cuda_norm_statistics(
    *,
    norms: int,
    labelled: int,
    N: int,
    norms_double: bool,
    old: float,
    mean: int,
    std: int,
    batches: int,
    new_mean: int,
    new_std: int,
    new_batches: int,
    stream: int,
    device: int,
) -> None: ...
