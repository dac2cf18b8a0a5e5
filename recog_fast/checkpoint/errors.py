"""What a checkpoint can be refused for."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit what it is loaded into."""
