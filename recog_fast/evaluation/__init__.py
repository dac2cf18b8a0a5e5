"""Evaluation: 1:1 verification, 1:N identification, templates, error-versus-reject, plots and a report page (math.md
section 6).

Stands alone: NumPy and torch only; matplotlib is imported when a plot is drawn.
"""

from recog_fast.evaluation.embed import (
    VerificationResult,
    embed_images,
    evaluate_bin,
    post_processing,
    resize,
    to_input,
    verification_result,
)
from recog_fast.evaluation.erc import error_versus_reject
from recog_fast.evaluation.gallery import Gallery, GalleryItem, pair_galleries, png_data_uri, strip
from recog_fast.evaluation.identification import identification, mean_average_precision
from recog_fast.evaluation.nearest import search
from recog_fast.evaluation.report import write_report
from recog_fast.evaluation.templates import template_embeddings
from recog_fast.evaluation.verification import equal_error_rate, roc_curve, tar_at_far, verification_accuracy

__all__ = [
    "Gallery",
    "GalleryItem",
    "VerificationResult",
    "embed_images",
    "equal_error_rate",
    "error_versus_reject",
    "evaluate_bin",
    "identification",
    "mean_average_precision",
    "pair_galleries",
    "png_data_uri",
    "post_processing",
    "resize",
    "roc_curve",
    "search",
    "strip",
    "tar_at_far",
    "template_embeddings",
    "to_input",
    "verification_accuracy",
    "verification_result",
    "write_report",
]
