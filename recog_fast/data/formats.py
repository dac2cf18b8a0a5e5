"""The names of the formats, for whoever asks without reading any: nothing is imported here."""

# What `open_dataset` reads; `register_source` adds to them. Readers: `opening.KINDS`.
SOURCES: list[str] = ["rec", "folder", "list", "zip", "tar"]
# What `convert_dataset` writes. Writers: `convert.TARGETS`.
TARGETS: tuple[str, ...] = ("rec", "tar", "folder", "list")
# Sources of the training script that are no format: drawn people, and several sources as one.
DRAWN, MIXED = "synthetic", "mixed"


def training_kinds() -> tuple[str, ...]:
    """What `data.kind` of a training run may be."""
    return (*SOURCES, DRAWN, MIXED)
