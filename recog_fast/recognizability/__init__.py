"""Recognizability: the score of an embedding (ERS), the learned index (RI), and the centre of unrecognizable faces
both need (math.md sections 4 and 5)."""

from .attention import PerceptibilityAttention
from .branches import RecognizabilityBranches, RecognizabilityModel, RecognizabilityTerms
from .ers import ThresholdRow, embedding_recognizability, pair_decision, threshold_table
from .index import (
    IndexDiversionLoss,
    RecognizabilityRegressor,
    attention_loss,
    project_away,
    recognizability_index,
    regression_loss,
)
from .ui_center import ClusterRow, cluster_labels, cluster_table, unrecognizable_center

__all__ = [
    "ClusterRow",
    "IndexDiversionLoss",
    "PerceptibilityAttention",
    "RecognizabilityBranches",
    "RecognizabilityModel",
    "RecognizabilityRegressor",
    "RecognizabilityTerms",
    "ThresholdRow",
    "attention_loss",
    "cluster_labels",
    "cluster_table",
    "embedding_recognizability",
    "pair_decision",
    "project_away",
    "recognizability_index",
    "regression_loss",
    "threshold_table",
    "unrecognizable_center",
]
