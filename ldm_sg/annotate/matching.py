"""Predicted classes against true ones when their numbers mean nothing: Hungarian matching, then mIoU and accuracy."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ldm_sg.annotate.clusters import contingency
from ldm_sg.guidance.spatial import VOID


def confusion(predicted: np.ndarray, truth: np.ndarray, k: int, classes: int) -> np.ndarray:
    """Index masks uint8 [...] of one shape -> how many pixels of true class c were predicted as p, int64 [K, C].

    Pixels whose truth is VOID are left out."""
    counted = truth != VOID
    return contingency(predicted[counted], truth[counted], (k, classes))


def match(table: np.ndarray) -> dict[str, Any]:
    """Confusion [K, C] -> `miou` and `accuracy` after the one-to-one matching that puts most pixels right, as STEGO and PiCIE
    measure; `assignment` [K] is the true class of each predicted one, -1 = none, `iou` [C] each true class's own.

    What unmatched predictions (K > C) cover is wrong. Classes that do not occur have NaN and do not count in the mean;
    an unmatched class that does (K < C) has 0."""
    rows, columns = linear_sum_assignment(table, maximize=True)
    assignment = np.full(table.shape[0], -1)
    assignment[rows] = columns
    right, covered = np.zeros((2, table.shape[1]))
    right[columns], covered[columns] = table[rows, columns], table.sum(1)[rows]
    true = table.sum(0)
    iou = np.full(table.shape[1], np.nan)
    np.divide(right, true + covered - right, out=iou, where=true > 0)
    miou = float(np.nanmean(iou)) if true.any() else 0.0
    return {"miou": miou, "accuracy": float(right.sum() / max(true.sum(), 1)), "assignment": assignment, "iou": iou}
