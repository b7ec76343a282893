import json

import numpy as np
import pytest
from metrics_reference import aupro, auspro, pixel_metrics
from sklearn import metrics as sk

from twinspect.errors import DataError
from twinspect.metrics import METRICS, Evaluator
from twinspect.metrics.ranking import IMAGE_METRICS


def images(seed=0, classes=("bottle", "cable"), count=12):
    """Rows of keyword arguments: good images without mask, two defect types with masks."""
    rng = np.random.default_rng(seed)
    out = []
    for c in classes:
        for i in range(count):
            label = int(i % 3 > 0)
            mask = rng.random((16, 16)) < 0.05 if label else None
            scores = rng.lognormal(0, 3, (16, 16)).astype(np.float32)
            if mask is not None:
                mask[0, 0] = True
                scores[mask] *= 3
            row = {
                "score": float(scores.max()),
                "label": label,
                "class_name": c,
                "defect_type": ("", "crack", "stain")[i % 3],
                "map_HW": scores,
                "mask_HW": mask,
                "name": f"{c} {i}.png",
            }
            out.append(row)
    return out


def evaluated(rows, limit=128 << 20):
    evaluator = Evaluator(memory_limit=limit)
    for row in rows:
        evaluator.update(**row)
    return evaluator


def test_numbers_of_a_class_against_references():
    rows = images()
    out = evaluated(rows).compute()
    for c in ("bottle", "cable"):
        mine = [r for r in rows if r["class_name"] == c]
        scores, labels = [r["score"] for r in mine], [r["label"] for r in mine]
        maps = [r["map_HW"] for r in mine]
        masks = [np.zeros((16, 16), bool) if r["mask_HW"] is None else r["mask_HW"] for r in mine]
        got = out["classes"][c]
        assert got["image_auroc"] == pytest.approx(sk.roc_auc_score(labels, scores))
        assert got["image_ap"] == pytest.approx(sk.average_precision_score(labels, scores))
        for name, value in pixel_metrics(maps, masks).items():
            assert got[f"pixel_{name}"] == pytest.approx(value, abs=1e-9)
        assert got["aupro"] == pytest.approx(aupro(maps, masks, 0.3), abs=1e-9)
        assert got["aupro_005"] == pytest.approx(aupro(maps, masks, 0.05), abs=1e-9)
        for kind in ("crack", "stain"):
            some = [r for r in mine if r["defect_type"] in ("", kind)]
            value = sk.roc_auc_score([r["label"] for r in some], [r["score"] for r in some])
            assert out["defects"][c][kind] == pytest.approx(value)
    assert "auspro_005" not in out["classes"]["bottle"]
    assert out["error_bound"] == {"bottle": 0.0, "cable": 0.0}
    assert out["undefined"] == []
    for name, value in out["mean"].items():
        assert value == pytest.approx(np.mean([out["classes"][c][name] for c in ("bottle", "cable")]))
    assert set(out["mean"]) <= set(METRICS)


@pytest.mark.parametrize("limit", [300 << 10, 128 << 20])
def test_any_order_and_number_of_parts_give_the_same_bits(limit):
    rows = images(count=9)
    one = evaluated(rows, limit).compute()
    for seed in range(3):
        turn = np.random.default_rng(seed).permutation(len(rows))
        total = Evaluator(memory_limit=limit)
        for part in np.array_split(turn, seed + 2):
            total.merge(evaluated([rows[i] for i in part], limit))
        assert json.dumps(total.compute(), sort_keys=True) == json.dumps(one, sort_keys=True)
    if limit < 1 << 20:
        assert total.budget.drop > 1
        assert total.budget.used <= limit


def test_one_label_is_undefined_and_left_out_of_the_mean():
    rows = images() + [r | {"class_name": "zipper"} for r in images() if r["label"] == 0]
    out = evaluated(rows).compute()
    assert out["classes"]["zipper"] == {}
    assert out["mean_over"]["image_auroc"] == 2
    text = " | ".join(out["undefined"])
    assert "zipper: no AUROC and the like, as all 8 images are good; they need defects, too" in text
    assert "zipper: no pixel metrics" in text
    assert text.count("is over the 2 of 3 classes where it is defined") == 1
    assert "NaN" not in json.dumps(out, allow_nan=False)


def test_missing_masks_are_said_once():
    out = evaluated([r | {"mask_HW": None} for r in images()]).compute()
    assert set(out["classes"]["bottle"]) == {"image_auroc", "image_ap", "image_f1max"}
    assert out["undefined"] == ["no mask marks the defects: metrics of images only, none of pixels"]


def test_an_anomalous_image_without_mask_adds_to_image_metrics_only():
    rows = images(classes=("nut",))
    without = [dict(r) for r in rows]
    without[1]["mask_HW"] = None
    out, fewer = evaluated(without).compute(), evaluated(rows[:1] + rows[2:]).compute()
    for name in ("pixel_auroc", "pixel_ap", "aupro"):
        assert out["classes"]["nut"][name] == fewer["classes"]["nut"][name]
    assert out["classes"]["nut"]["image_auroc"] == evaluated(rows).compute()["classes"]["nut"]["image_auroc"]
    assert out["undefined"] == ["nut: pixel metrics leave out 1 anomalous images without mask"]


def test_empty_and_pixel_off():
    out = Evaluator().compute()
    assert out["classes"] == {}
    assert out["mean"] == {}
    off = Evaluator(pixel=False)
    for row in images():
        off.update(**row)
    out = off.compute()
    assert set(out["classes"]["bottle"]) == {"image_auroc", "image_ap", "image_f1max"}
    assert out["undefined"] == []
    assert out["images"] == {"bottle": 12, "cable": 12}


def test_sample_level_is_the_maximum_over_views():
    evaluator = Evaluator()
    rng = np.random.default_rng(0)
    samples = []
    for s in range(20):
        labels = [int(s % 2 and v == s % 5) for v in range(5)]
        scores = rng.normal(size=5) + np.array(labels)
        samples.append((scores.max(), max(labels)))
        for v in range(5):
            evaluator.update(scores[v], labels[v], "usb", group=f"sample {s}")
    evaluator.update(9.0, 1, "usb")
    samples.append((9.0, 1))
    got = evaluator.compute()["classes"]["usb"]
    assert got["sample_auroc"] == pytest.approx(sk.roc_auc_score([y for _, y in samples], [x for x, _ in samples]))
    single = evaluated([r | {"group": r["name"]} for r in images()]).compute()
    assert "sample_auroc" not in single["classes"]["bottle"]


def test_loco_saturated_overlap_per_class_and_type():
    rng = np.random.default_rng(0)
    evaluator = Evaluator()
    maps, regions, kinds = list(rng.normal(size=(9, 12, 12)).astype(np.float32)), [], []
    for i, m in enumerate(maps):
        kind = ("", "logical_anomalies", "structural_anomalies")[i % 3]
        pairs = [(rng.random((12, 12)) < 0.1, 5), (rng.random((12, 12)) < 0.05, 10**4)] if kind else []
        evaluator.update(m.max(), int(bool(kind)), "breakfast_box", kind, m, regions=pairs or None)
        regions.append(pairs)
        kinds.append(kind)
    out = evaluator.compute()
    assert out["classes"]["breakfast_box"]["auspro_005"] == pytest.approx(auspro(maps, regions, 0.05), abs=1e-9)
    for kind in ("logical_anomalies", "structural_anomalies"):
        keep = [i for i in range(9) if kinds[i] in ("", kind)]
        value = auspro([maps[i] for i in keep], [regions[i] for i in keep], 0.05)
        assert out["defects_auspro_005"]["breakfast_box"][kind] == pytest.approx(value, abs=1e-9)
    union = [np.any([np.zeros((12, 12)), *[g for g, _ in r]], axis=0) for r in regions]
    assert out["classes"]["breakfast_box"]["aupro"] == pytest.approx(aupro(maps, union, 0.3), abs=1e-9)
    assert out["classes"]["breakfast_box"]["pixel_auroc"] == pytest.approx(
        pixel_metrics(maps, union)["auroc"], abs=1e-9
    )


def test_uncertain_results_say_so():
    rng = np.random.default_rng(0)
    evaluator = Evaluator(memory_limit=1)
    mask = rng.random((40, 40)) < 0.2
    scores = (1 + 1e-4 * rng.random((40, 40))).astype(np.float32)
    evaluator.update(1.0, 1, "tile", map_HW=scores, mask_HW=mask)
    evaluator.update(0.5, 0, "tile", map_HW=scores)
    out = evaluator.compute()
    assert out["error_bound"]["tile"] > 1e-4
    assert any("certain only to" in s for s in out["undefined"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, r"odd name\.png is nan"),
        ({"label": 2}, r"odd name\.png is 2"),
        ({"label": None}, r"odd name\.png is None"),
        ({"map_HW": np.full((16, 16), np.nan)}, r"odd name\.png has 256 values"),
        ({"mask_HW": np.ones((4, 4))}, r"mask of odd name\.png has shape"),
        ({"label": 0, "mask_HW": np.ones((16, 16))}, "labelled normal"),
    ],
)
def test_bad_input_names_the_image_and_adds_nothing(change, message):
    evaluator = evaluated(images())
    before = json.dumps(evaluator.compute())
    row = {
        "score": 1.0,
        "label": 1,
        "class_name": "cable",
        "map_HW": np.ones((16, 16)),
        "name": "odd name.png",
    }
    row["mask_HW"] = np.eye(16)
    with pytest.raises(DataError, match=message):
        evaluator.update(**(row | change))
    assert json.dumps(evaluator.compute()) == before


def test_different_settings_do_not_merge():
    with pytest.raises(DataError, match="different settings"):
        Evaluator().merge(Evaluator(memory_limit=1 << 20))


def test_a_new_image_metric_is_one_function_and_one_row(monkeypatch):
    def precision_at_the_top(scores, labels):
        top = np.argsort(-scores)[: labels.sum()]
        return float(labels[top].mean())

    monkeypatch.setitem(IMAGE_METRICS, "image_top", precision_at_the_top)
    values = evaluated(images()).compute()
    for c in ("bottle", "cable"):
        rows = sorted((r for r in images() if r["class_name"] == c), key=lambda r: -r["score"])
        assert values["classes"][c]["image_top"] == np.mean([r["label"] for r in rows[:8]])
    assert values["mean_over"]["image_top"] == 2


def test_what_holds_for_several_classes_is_said_once():
    rows = images()
    for name in ("bottle", "cable"):
        next(r for r in rows if r["class_name"] == name and r["label"])["mask_HW"] = None
    said = evaluated(rows).compute()["undefined"]
    assert said == ["bottle, cable: pixel metrics leave out 1 anomalous images without mask"]
