"""InsightFace verification files (.bin): a pickle of (list of encoded images, list of bool), read without running
anything in it.

Two guards. First every opcode is walked with `pickletools`: only those that data needs are let through, the only names
a pickle may mention are numpy's array constructor and the bytes codec, and no length or memo index may exceed the file
(the C unpickler allocates by both before it looks). Then an unpickler runs whose every name is one of the small
stand-ins below: nothing of numpy's is called.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OPCODE_NAMES = (
    "PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET "
    "PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD "
)
_OPCODES = frozenset(_OPCODE_NAMES.split())


class _Data:
    """Bytes, or the text that stands for them in protocols 0 to 2, kept as they came.

    Nothing is copied while the pickle runs: a small file could otherwise ask for one large copy per opcode.
    """

    source: bytes | bytearray | str = b""
    is_bool = False


def _encode(text: object, codec: object) -> _Data:
    """_codecs.encode(text, 'latin1')."""
    if not isinstance(text, str) or codec not in ("latin1", b"latin1", "latin-1", b"latin-1"):
        raise pickle.UnpicklingError("_codecs.encode of something else than latin1 text")
    data = _Data()
    data.source = text
    return data


class _DType:
    """Stands in for numpy.dtype: remembers the code, ignores byte order and alignment (one-byte types only)."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or text.lstrip("|") not in ("u1", "b1"):
            # Only text is shown: the repr of a nest of shared tuples has no end.
            shown = text[:20] if isinstance(text, str) else type(text).__name__
            raise pickle.UnpicklingError(f"an array of dtype {shown}; only uint8 and bool are read")
        self.is_bool = text.endswith("b1")

    def __setstate__(self, state: object) -> None:
        """The state repeats what a one-byte type cannot vary."""


class _Array(_Data):
    """Stands in for numpy.ndarray."""

    def fill(self, shape: object, dtype: object, data: object) -> None:
        source = data.source if type(data) is _Data else data
        if not (isinstance(shape, tuple) and isinstance(dtype, _DType) and isinstance(source, (bytes, bytearray, str))):
            raise pickle.UnpicklingError("an array whose state is not (shape, dtype, bytes)")
        most = max(len(source), 1)
        if len(shape) > 8 or not all(isinstance(side, int) and 0 <= side <= most for side in shape):
            raise pickle.UnpicklingError("an array of impossible shape")
        if math.prod(shape) != len(source):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(source)} bytes")
        self.source, self.is_bool = source, dtype.is_bool

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array whose state is not (version, shape, dtype, order, bytes)")
        self.fill(state[1], state[2], state[4])


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    """numpy's empty array before its state comes."""
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    """numpy's protocol-5 array."""
    array = _Array()
    array.fill(shape, dtype, data)
    return array


def _scalar(dtype: object, data: object) -> bool:
    """A numpy.bool_."""
    array = _Array()
    array.fill((1,), dtype, data)
    return array.source[0] not in (0, "\0")


def _empty_bytes() -> bytes:
    """Protocols 0 to 2 store b'' as bytes()."""
    return b""


_NAMES: dict[tuple[str, str], Callable[..., object]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty_bytes,
    ("__builtin__", "bytes"): _empty_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


def _refuse_opcodes(data: bytes) -> None:
    """Walk the opcodes without running them; raises UnpicklingError or ValueError (pickletools) for what data does not
    need."""
    for opcode, argument, position in pickletools.genops(io.BytesIO(data)):
        name = opcode.name
        if name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {name} at byte {position}")
        if name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _NAMES:
            raise pickle.UnpicklingError(f"the name {argument} at byte {position}")
        if name in ("FRAME", "PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"{name} of {argument} at byte {position}")


class _DataUnpickler(pickle.Unpickler):
    """Names resolve to the stand-ins above or not at all."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")


def _to_bytes(source: bytes | bytearray | str) -> bytes:
    return source.encode("latin1") if isinstance(source, str) else bytes(source)


def _images(items: object) -> list[bytes]:
    """One bytes object per distinct image, however often it is listed."""
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError("a first part that is no list")
    made: dict[int, bytes] = {}
    images = []
    for item in items:
        source = item.source if isinstance(item, _Data) and not item.is_bool else item
        if not isinstance(source, (bytes, bytearray, str)) or isinstance(item, str):
            raise pickle.UnpicklingError(f"an image of type {type(item).__name__.strip('_')}")
        if id(source) not in made:
            made[id(source)] = _to_bytes(source)
        images.append(made[id(source)])
    return images


def _flags(items: object) -> list[bool]:
    if isinstance(items, _Array):
        return [flag != 0 for flag in _to_bytes(items.source)]
    if not isinstance(items, (list, tuple)) or not all(isinstance(flag, int) and flag in (0, 1) for flag in items):
        raise pickle.UnpicklingError("a second part that is no list of bool")
    return [bool(flag) for flag in items]


def read_bin(path: str | os.PathLike[str]) -> tuple[list[bytes], list[bool]]:
    """Read an InsightFace .bin -> (2 n encoded images, n flags): images 2 i and 2 i + 1 are pair i, flag i says whether
    they are one person.

    Images may be bytes or uint8 arrays of any shape, pickled by Python 2 or 3, any protocol. Nothing in the file is
    executed and no length in it is trusted. Raises ValueError naming the file and what was found for anything else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"read_bin: expected a .bin file, got {os.fspath(path)}, which is no file")
    data = Path(path).read_bytes()
    try:
        _refuse_opcodes(data)
        content = _DataUnpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, (list, tuple)) or len(content) != 2:
            raise pickle.UnpicklingError("a pickle of something else")
        images, same = _images(content[0]), _flags(content[1])
    except Exception as error:  # a mutated pickle raises almost any type; none of them says which file
        raise ValueError(
            f"read_bin: expected a pickle of (list of images, list of bool) in {os.fspath(path)}, "
            f"got {str(error) or type(error).__name__}"
        ) from error
    if len(images) != 2 * len(same):
        raise ValueError(
            f"read_bin: expected two images per flag in {os.fspath(path)}, got {len(images)} images, {len(same)} flags"
        )
    return images, same
