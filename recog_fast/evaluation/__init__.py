"""Evaluation: 1:1 verification, 1:N identification, templates, error-versus-reject, plots and a report page (math.md
section 6).

Stands alone: NumPy and torch only; matplotlib is imported when a plot is drawn.
"""

from recog_fast.evaluation.embed import (
    VerificationResult,
    embed_images,
    evaluate_bin,
    post_processing,
    to_input,
    verification_result,
)
from recog_fast.evaluation.erc import error_versus_reject
from recog_fast.evaluation.identification import identification, mean_average_precision
from recog_fast.evaluation.templates import template_embeddings
from recog_fast.evaluation.verification import equal_error_rate, roc_curve, tar_at_far, verification_accuracy

__all__ = [
    "VerificationResult",
    "embed_images",
    "equal_error_rate",
    "error_versus_reject",
    "evaluate_bin",
    "identification",
    "mean_average_precision",
    "post_processing",
    "roc_curve",
    "tar_at_far",
    "template_embeddings",
    "to_input",
    "verification_accuracy",
    "verification_result",
]
