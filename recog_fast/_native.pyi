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
