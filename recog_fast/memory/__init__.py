"""Prototype memory (VPL, QAFace) and the momentum encoder that feeds it: math.md section 2."""

from .entries import Entries, Injection
from .momentum import MomentumEncoder
from .policies import VPL, MemoryPolicy, NormStatistics, QAFace
from .prototypes import PrototypeMemory

__all__ = [
    "VPL",
    "Entries",
    "Injection",
    "MemoryPolicy",
    "MomentumEncoder",
    "NormStatistics",
    "PrototypeMemory",
    "QAFace",
]
