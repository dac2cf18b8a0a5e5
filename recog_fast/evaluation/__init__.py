"""Evaluation: 1:1 verification, 1:N identification, templates, error-versus-reject, published protocols, class-activation
maps, plots and a report page (math.md section 6).

Stands alone: NumPy and torch only; matplotlib is imported when a plot is drawn.
"""

from recog_fast.evaluation.activation import class_activation, overlay
from recog_fast.evaluation.drawing import require_plots
from recog_fast.evaluation.embed import (
    VerificationResult,
    embed_images,
    evaluate_bin,
    post_processing,
    resize,
    to_input,
    verification_result,
)
from recog_fast.evaluation.erc import (
    QualityComparison,
    compare_qualities,
    erc_protocol,
    error_versus_reject,
    pair_minimum,
)
from recog_fast.evaluation.gallery import (
    Gallery,
    GalleryItem,
    pair_galleries,
    png_data_uri,
    strip,
)
from recog_fast.evaluation.histograms import ScoreHistograms, all_pairs
from recog_fast.evaluation.identification import (
    cumulative_match,
    fpir_threshold,
    identification,
    mean_average_precision,
)
from recog_fast.evaluation.nearest import GallerySearch, search
from recog_fast.evaluation.protocols import (
    four_forms,
    robustness,
    scface,
    survface_identification,
    survface_verification,
    template_scores,
    tinyface_identification,
    tinyface_pairs,
    ytf,
)
from recog_fast.evaluation.report import write_report
from recog_fast.evaluation.subgroups import SubgroupReport, subgroup_report
from recog_fast.evaluation.templates import template_embeddings
from recog_fast.evaluation.verification import equal_error_rate, roc_curve, tar_at_far, verification_accuracy

__all__ = [
    "Gallery",
    "GalleryItem",
    "GallerySearch",
    "QualityComparison",
    "ScoreHistograms",
    "SubgroupReport",
    "VerificationResult",
    "all_pairs",
    "class_activation",
    "compare_qualities",
    "cumulative_match",
    "embed_images",
    "equal_error_rate",
    "erc_protocol",
    "error_versus_reject",
    "evaluate_bin",
    "four_forms",
    "fpir_threshold",
    "identification",
    "mean_average_precision",
    "overlay",
    "pair_galleries",
    "pair_minimum",
    "png_data_uri",
    "post_processing",
    "require_plots",
    "resize",
    "robustness",
    "roc_curve",
    "scface",
    "search",
    "strip",
    "subgroup_report",
    "survface_identification",
    "survface_verification",
    "tar_at_far",
    "template_embeddings",
    "template_scores",
    "tinyface_identification",
    "tinyface_pairs",
    "to_input",
    "verification_accuracy",
    "verification_result",
    "write_report",
    "ytf",
]
