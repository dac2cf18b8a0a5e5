"""`.metadata` of torch.distributed.checkpoint is a pickle: read with the few classes it is made of and no other."""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError


def read_metadata(folder: Path) -> Any:
    """The Metadata of a checkpoint folder; CheckpointError where it holds anything else."""
    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, OSError) as error:
        raise CheckpointError(f"load_checkpoint: {folder / '.metadata'} is damaged: {error}") from error
    return metadata


def _enum_member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{kind!r}.{name} does not belong in a checkpoint")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    _METADATA = (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"
    ).split()
    _OTHER = frozenset(
        {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 write a member of an Enum
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        metadata = module == "torch.distributed.checkpoint.metadata" and name in self._METADATA
        if not (dtype or metadata or (module, name) in self._OTHER):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)
