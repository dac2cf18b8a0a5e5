"""What of a head, its memory and its optimizer goes into a checkpoint, by global class row, and how it comes back on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..memory import Entries, PrototypeMemory
from ..sharding import ShardGroup, class_range
from .encoding import encode
from .errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ENTRIES = "memory entries"
RING = tuple(f"memory.{name}" for name in ("ring", "ring_strength", "stamp", "owner", "slot", "cursor"))
EVICTED = "memory.evicted"
_FIELDS = ("ids", "rows", "strength", "stamp")


@dataclass
class Content:
    """JSON form of everything, this rank's tensors by name, and the names of those that are spread over ranks by class."""

    structure: Any
    tensors: dict[str, Tensor]
    by_class: set[str] = field(default_factory=set)

    def detached(self) -> Content:
        """A copy in memory of its own, on the CPU: training may go on while it is written."""
        return Content(self.structure, {k: v.detach().to("cpu", copy=True) for k, v in self.tensors.items()}, self.by_class)

    def of_rank(self, ranks: ShardGroup) -> dict[str, Tensor]:
        """What this rank writes: its classes of the spread tensors, its part of the memory, and on rank 0 all else."""
        mine: dict[str, Tensor] = {name: spread(self.tensors[name].detach(), ranks) for name in self.by_class}
        memory = f"head/{ENTRIES}/{ranks.rank}/"
        mine |= {name: t for name, t in self.tensors.items() if name.startswith(memory)}
        if ranks.rank == 0:
            mine |= {name: t for name, t in self.tensors.items() if name not in self.by_class}
        return {name: t if t.device.type == "cpu" else t.cpu() for name, t in mine.items()}


def spread(local: Tensor, ranks: ShardGroup) -> DTensor:
    """This rank's rows of a class-sharded tensor as a DTensor (Shard(0): torch.chunk's ranges)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((ranks.num_classes, *local.shape[1:]))
    mesh = DeviceMesh.from_group(ranks.hosts, "cpu")
    local = local.to("cpu").contiguous()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride())


def collect(head: torch.nn.Module, optimizer: Any, step: int, more: dict[str, Any], ranks: ShardGroup | None) -> Content:
    """The content of a checkpoint; with ranks: of a sharded head."""
    state = head.state_dict()
    if ranks is not None:
        state = {name: value for name, value in state.items() if name not in RING}
        if EVICTED in state:
            state[EVICTED] = torch.tensor(sum(ranks.exchange(int(state[EVICTED]))))
    tensors: dict[str, Tensor] = {}
    saved = None if optimizer is None else optimizer.state_dict()
    structure = encode({"head": state, "optimizer": saved, "step": step, **more}, "", tensors)
    content = Content(structure, tensors)
    if ranks is not None:
        content.by_class = {"head/weight"} | _momenta(head, optimizer)
        memory = getattr(head, "memory", None)
        if memory is not None:
            _add_entries(content, memory, ranks)
    return content


def _momenta(head: torch.nn.Module, optimizer: Any) -> set[str]:
    """Names of the optimizer's tensors that have a row per class: its state of the head's weight, shaped like it."""
    if optimizer is None:
        return set()
    weight: Any = head.weight
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    at = next((i for i, p in enumerate(parameters) if p is weight), None)
    state = {} if at is None else optimizer.state.get(weight, {})
    return {f"optimizer/state/{at}/{name}" for name, t in state.items() if isinstance(t, Tensor) and t.shape == weight.shape}


def _add_entries(content: Content, memory: PrototypeMemory, ranks: ShardGroup) -> None:
    """This rank's entries, and on every rank the same list of all ranks' parts."""
    parts = []
    for rank in range(ranks.size):
        first, last = class_range(ranks.num_classes, ranks.size, rank)
        names = [[name, {"tensor": f"head/{ENTRIES}/{rank}/{name}"}] for name in _FIELDS]
        parts.append({"dict": [["first", first], ["last", last], *names]})
    head = next(value for key, value in content.structure["dict"] if key == "head")
    head["dict"].append([ENTRIES, {"list": parts}])
    for name, value in memory.entries()._asdict().items():
        content.tensors[f"head/{ENTRIES}/{ranks.rank}/{name}"] = value


# -- back ------------------------------------------------------------------------------------------------------------------


def restore_head(head: torch.nn.Module, saved: dict[str, Any], where: str) -> None:
    """Puts a saved state (weight: the rows this head keeps) into the head; refuses before it changes anything."""
    ranks: ShardGroup | None = getattr(head, "shards", None)
    parts = saved.pop(ENTRIES, None)
    own = head.state_dict()
    by_entries = parts is not None or (ranks is not None and RING[0] in saved)
    if by_entries:
        entries = _entries(saved) if parts is None else _join(parts)
        saved = {name: value for name, value in saved.items() if name not in RING}
        if "memory.clock" in own:
            saved |= {name: own[name] for name in RING}
        if ranks is not None and ranks.rank > 0 and EVICTED in saved:
            saved[EVICTED] = torch.zeros_like(saved[EVICTED])  # the count of all shards is on one
    _check_fit(own, saved, where)
    head.load_state_dict(saved)
    memory = getattr(head, "memory", None)
    if by_entries and memory is not None:
        memory.load_entries(entries)


def _check_fit(own: dict[str, Any], saved: dict[str, Any], where: str) -> None:
    """CheckpointError where names or shapes differ."""
    for name, value in saved.items():
        if name in own and tuple(own[name].shape) != tuple(value.shape):
            raise CheckpointError(
                f"load_checkpoint: {where} does not fit this head: expected {name} of shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            )
    either = {"weight_low"}  # W in one tensor or two: the head converts
    unknown, missing = sorted(set(saved) - set(own) - either), sorted(set(own) - set(saved) - {"sample_seed"} - either)
    if unknown or missing:
        raise CheckpointError(
            f"load_checkpoint: {where} does not fit this head: it lacks {missing or 'nothing'} and holds {unknown or 'nothing'} that the head does not have"
        )


def _entries(saved: dict[str, Any]) -> Entries:
    """Entries by class of a memory saved with its ring (one process)."""
    slot = saved[RING[4]].long()
    ids = (slot >= 0).nonzero().squeeze(1)
    at = slot[ids]
    return Entries(ids, saved[RING[0]][at], saved[RING[1]][at], saved[RING[2]][at])


def _join(parts: list[dict[str, Any]]) -> Entries:
    return Entries(*(torch.cat([part[name] for part in parts]) for name in _FIELDS))
