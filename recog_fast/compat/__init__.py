"""The spellings of other libraries, thin over `MarginHead` and `margin_softmax_loss`: `pml` (pytorch-metric-learning),
`insightface` (arcface_torch). Neither library is needed."""
