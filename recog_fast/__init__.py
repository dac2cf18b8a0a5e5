"""recog_fast: fused margin-softmax kernels for recognition over very many classes."""

__version__ = "0.1.0"
