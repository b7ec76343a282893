"""The public names, and what their signatures promise."""

import inspect

import pytest

import twinspect


def test_public_names() -> None:
    assert sorted(twinspect.__all__) == ["Detector", "Sample", "TwinspectError", "__version__"]
    for name in twinspect.__all__:
        assert getattr(twinspect, name) is not None
    with pytest.raises(AttributeError, match="module 'twinspect' has no attribute 'Detectr'"):
        _ = twinspect.Detectr


def test_public_methods_take_no_catch_all_keywords() -> None:
    for name, method in inspect.getmembers(twinspect.Detector, inspect.isroutine):
        if name.startswith("_") and name != "__init__":
            continue
        kinds = {p.kind for p in inspect.signature(method).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name
        assert method.__doc__ or name == "__init__"


def test_detector_methods() -> None:
    assert {n for n in vars(twinspect.Detector) if not n.startswith("_")} >= {
        "fit", "predict", "predictor", "save", "load", "fitted", "skipped_", "record_", "config",
    } - {"config"}  # fmt: skip
    assert list(inspect.signature(twinspect.Detector.__init__).parameters)[1:3] == ["teacher", "size"]


def test_errors_are_one_family() -> None:
    from twinspect import errors

    kinds = [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, Exception)]
    assert all(issubclass(kind, twinspect.TwinspectError) for kind in kinds)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.ImageError, errors.DataError)


def test_constructor_reads_and_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr("twinspect.models.teachers.create_teacher", never)
    detector = twinspect.Detector("efficientnet-lite0", size=256)
    assert detector.config.model.teacher == "efficientnet-lite0"
    with pytest.raises(twinspect.TwinspectError, match=r"call fit\(data\) or Detector.load\(path\) first"):
        detector.predict("x.png")
