"""What a head costs on any number of devices: memory, messages, least time; from one model that tests hold to what is sent and held."""

from .devices import DEVICES, PROCESS, Device
from .model import HEADER, Head, Item, Message, Times, buckets, flops, memory, messages, times, traffic
from .report import Option, Report, crossover, estimate, even
from .stored import Measured, measured
from .text import format_table, scale_table, seconds, size, text

__all__ = [
    "DEVICES",
    "HEADER",
    "PROCESS",
    "Device",
    "Head",
    "Item",
    "Measured",
    "Message",
    "Option",
    "Report",
    "Times",
    "buckets",
    "crossover",
    "estimate",
    "even",
    "flops",
    "format_table",
    "measured",
    "memory",
    "messages",
    "scale_table",
    "seconds",
    "size",
    "text",
    "times",
    "traffic",
]
