"""Literal transcription of the definitions: every threshold, every region, loops."""

import numpy as np
from scipy import ndimage
from sklearn import metrics as sk


def false_positive_rate(maps, masks, threshold):
    wrong = sum(int(((m >= threshold) & ~g).sum()) for m, g in zip(maps, masks, strict=True))
    return wrong / sum(int((~g).sum()) for g in masks)


def area(fpr, value, limit):
    """Trapezoids up to the limit, the last one cut by linear interpolation."""
    total = 0.0
    for i in range(1, len(fpr)):
        x0, x1, y0, y1 = fpr[i - 1], fpr[i], value[i - 1], value[i]
        if x1 <= limit:
            total += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            y = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            total += (limit - x0) * (y0 + y) / 2
    return total / limit


def thresholds(maps):
    return np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]


def aupro(maps, masks, limit):
    regions = []
    for m, g in zip(maps, masks, strict=True):
        labels, count = ndimage.label(g, structure=np.ones((3, 3)))
        regions += [m[labels == i + 1] for i in range(count)]
    fpr, pro = [0.0], [0.0]
    for t in thresholds(maps):
        fpr.append(false_positive_rate(maps, masks, t))
        pro.append(np.mean([(r >= t).mean() for r in regions]))
    return area(fpr, pro, limit)


def auspro(maps, regions, limit):
    masks = [np.any([np.zeros(m.shape), *[g for g, _ in r]], axis=0) for m, r in zip(maps, regions, strict=True)]
    each = [(m[g], min(s, g.sum())) for m, r in zip(maps, regions, strict=True) for g, s in r]
    fpr, spro = [0.0], [0.0]
    for t in thresholds(maps):
        fpr.append(false_positive_rate(maps, masks, t))
        spro.append(np.mean([min((scores >= t).sum() / s, 1) for scores, s in each]))
    return area(fpr, spro, limit)


def pixel_metrics(maps, masks):
    scores = np.concatenate([np.asarray(m, np.float64).ravel() for m in maps])
    truth = np.concatenate([g.ravel() for g in masks])
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    f1 = np.divide(2 * precision * recall, precision + recall, out=np.zeros_like(recall), where=recall > 0)
    return {
        "auroc": sk.roc_auc_score(truth, scores),
        "ap": sk.average_precision_score(truth, scores),
        "f1max": f1.max(),
    }
