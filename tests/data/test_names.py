"""What names of folders, files and cells say, in the languages and spellings that people use."""

import pytest

from twinspect.data.names import BAD, GOOD, MASK, UNSORTED, meaning, meaning_of_file, role_of


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            GOOD,
            "good OK ok_front normal_dir passed gut Gutteile iO i.O. bueno conforme 良品 合格 正常 정상 годные OK品",
        ),
        (GOOD, "no_defects DefectFree defect-free non_defective nodefect ohne_Fehler fehlerfrei unbroken NonCracked"),
        (
            BAD,
            "bad NG ng2 NG品 zły hatalı NOK Not-OK nicht_ok niO fail failed rejected defective def_front bottle_bad",
        ),
        (
            BAD,
            "anomaly anomalies abnormal_dir schlecht Fehlerteile Ausschuss Défaut mauvais non_conforme malo difetti",
        ),
        (BAD, "不良品 缺陷 不合格 異常 불량 брак дефекты ungood nogood scratch broken_large logical_anomalies"),
        (
            MASK,
            "mask masks mask_dir bottle_label x_GT ground_truth GroundTruth gt annotations bad_mask overlays マスク",
        ),
        (GOOD, "O.K. i.O."),
        (BAD, "N.G. K.O. n.i.O. rework quarantine"),
        (UNSORTED, "misc production"),
        (UNSORTED, "unsorted unlabelled new pass_fail good-bad test_private test_private_mixed"),
        ("", "bottle test train images lot2 default definition norm mvtec_anomaly_detection anomalib no1 badge"),
        ("", "new_bottle okra passage gtx unit notes integral 2024-05-01"),
    ],
)
def test_folders(role: str, names: str) -> None:
    assert {name: meaning(name).role for name in names.split()} == dict.fromkeys(names.split(), role)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Training seg_train train_good"),
        ("calibration", "val valid validation Validation calib holdout held-out dev cal"),
        ("test", "test test_public testing good_test test_private"),
        ("", "good contest trainer value"),
    ],
)
def test_splits(split: str, names: str) -> None:
    assert {name: meaning(name).split for name in names.split()} == dict.fromkeys(names.split(), split)


def test_what_is_left_names_the_product() -> None:
    assert meaning("bottle2_NG01").rest == "bottle 2"
    assert meaning("good_lot2").plain
    assert meaning("images").pictures
    assert not meaning("0").plain  # may as well be a label
    assert all(meaning(name).plain for name in ("raw", "backup", "golden", "reference 2", "tmp", "predictions"))
    assert not meaning("golden_retriever").plain


def test_files() -> None:
    said = {name: meaning_of_file(name).role for name in ("NG_0001.jpg", "img-ng-2.png", "000_bad.png", "ok7.png")}
    assert said == {"NG_0001.jpg": BAD, "img-ng-2.png": BAD, "000_bad.png": BAD, "ok7.png": GOOD}
    for serial in ("3f2a1b0c-bad0-def1-fa11-0123456789ab.png", "a3def2.png", "part_def_1.png", "crack_filler.png"):
        assert meaning_of_file(serial).role == ""


def test_folders_above_each_other() -> None:
    assert role_of(("good", "masks")) == MASK
    assert role_of(("bad", "normal_light")) == BAD
    assert role_of(("new", "good")) == GOOD
    assert role_of(("test_private", "good")) == UNSORTED
    assert role_of(("train", "lot1")) == ""
