"""Folders of images as people have them: benchmark sets of parts, and plain folders with names in any language.

One reader for all of them. It finds the classes (products) of a folder, and asks of every image what the names of the
folders above it say (`names.meaning`): which split, good or defect, image or mask. Each class is judged by itself, so
that one root may hold several layouts. ``mvtec-ad``, ``mvtec-loco`` and ``mvtec-ad-2`` (whose private test images
have label None and their folder as ``defect_type``) only say which classes are meant; ``folder`` takes all.

What a name calls a defect or a mask is never a good image. Good images without a split are the training split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from twinspect.data.manifest import PREDICTED
from twinspect.data.names import BAD, GOOD, MASK, UNSORTED, meaning, meaning_of_file
from twinspect.data.samples import Place, marks_a_defect, masks_among, match
from twinspect.data.scan import Folder, ScanLog
from twinspect.data.tables import SUFFIXES, has_columns
from twinspect.errors import DataError, listed
from twinspect.files import open_text
from twinspect.types import CALIBRATION, SPLITS, TEST, TRAIN, Sample

LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"
MVTEC_AD, MVTEC_AD_2, MVTEC_LOCO, FOLDER = "mvtec-ad", "mvtec-ad-2", "mvtec-loco", "folder"
# Names of which one means good, and nobody can tell which.
_PAIRS = ({"0", "1"}, {"yes", "no"}, {"true", "false"}, {"positive", "negative"}, {"pos", "neg"}, {"p", "n"})
_UNCLEAR = frozenset("true false positive positives negative negatives pos neg".split())
_SPREADSHEETS = frozenset(".xlsx .xls .ods .parquet".split())
_TEXTS = frozenset(".json .jsonl .xml .yaml .yml .csv .tsv .txt .lst".split())
_SIDECARS = frozenset(".json .xml .txt .yaml .yml".split())  # 000.json beside 000.png
_IMAGE_NAME = re.compile(r"""[^\s,;:|/\\"'<>=]+\.(?:png|jpe?g|bmp|tiff?|webp|gif)\b""", re.IGNORECASE)
_LIST_HEAD = 1 << 16  # characters of a text file in which names of images are looked for
_LIST_WORDS = frozenset("label labels annotation annotations manifest meta train test val split gt coco".split())


def good_files(paths: Iterable[Path]) -> list[Sample]:
    """Images that are called good by being given, as training samples of one class; a name may say otherwise."""
    samples = [Sample(path, TRAIN, "normal") for path in paths]
    for sample in samples:
        folders = sample.image.parts[-3:-1]  # further up, names are those of projects: defects/2024/good/1.png
        role = next((role for name in reversed(folders) if (role := meaning(name).role)), "")
        role = role or meaning_of_file(sample.image.name).role
        if role in (BAD, MASK):
            kind = "mask" if role == MASK else "defect"
            raise DataError(
                f"{sample.image}: by its name this is a {kind}, and only good images are taken; leave such paths "
                "out, or give Sample(path, 'train', class_name, label=0) if it is good"
            )
    return samples


def layout_of(root: Folder) -> str:
    """Name of the layout that all classes at ``root`` have, ``folder`` for several; empty where nothing is said."""
    try:
        classes = find_classes(root, ScanLog())
    except DataError:
        return FOLDER  # whoever reads it says what is wrong
    if not any(_states(product) for product in classes):
        return ""
    shapes = {shape_of(product) for product in classes}
    return shapes.pop() if len(shapes) == 1 else FOLDER


def shape_of(product: Folder) -> str:
    """Name of the layout of one class."""
    inside = {sub.name.lower(): sub for sub in product.folders}
    if "test_public" in inside:
        return MVTEC_AD_2
    if "test" in inside and {sub.name.lower() for sub in inside["test"].folders} & {LOGICAL, STRUCTURAL}:
        return MVTEC_LOCO
    good = {sub.meant.split for sub in inside.values() if not sub.meant.role and _holds_good(sub)}
    masks = any(sub.meant.role == MASK for sub in inside.values())
    return MVTEC_AD if TRAIN in good or (TEST in good and masks) else FOLDER


# ------------------------------------------------------------------------------------- which classes there are


def find_classes(root: Folder, log: ScanLog) -> list[Folder]:
    """The classes at a folder: itself, or folders in it; a DataError where these may as well be good images."""
    inner = []
    for sub in root.folders:
        if sub.has_images_below:
            inner.append(sub)
        else:
            log.skip(sub.path, "folder without images")
            sub.images_below(log)  # a folder that cannot be listed says so
    speaking = [sub for sub in inner if _speaks(sub, inner)]
    silent = [sub for sub in inner if sub not in speaking]
    learnt = [sub for sub in speaking if sub.meant.role == GOOD or (sub.meant.split == TRAIN and not sub.meant.role)]
    if len({sub.meant.rest for sub in learnt if not sub.meant.plain} - {""}) > 1:
        raise DataError(
            f"{root.path}: {listed([sub.name for sub in learnt])} are good images of several products; give each "
            "product a folder, with good in it: bottle/good in place of bottle_good"
        )
    stated = any(_states(sub) for sub in silent)
    wrapped = all(sub.meant.pictures and not _holds_classes(sub) for sub in silent)  # images/ beside masks/
    if learnt or wrapped or (root.images and not stated):
        return [root] if inner or root.images else []
    _refuse_pair(root.path, silent)
    classes = []
    for sub in silent:
        if _holds_classes(sub):
            log.leave(sub.path, "holds classes itself; give this folder alone")
        elif names := _unnamed_training(sub):
            log.leave(sub.path, f"its training part holds {names}, and none of them is called good")
        else:
            classes.append(sub)
    for sub in speaking:
        if sub.meant.role == BAD:
            log.leave(sub.path, "its name says defects, and not of which class; move it into its class, or rename it")
        else:
            log.skip(sub.path, "its name does not say to which class it belongs")
    for image in root.images if classes else ():
        log.skip(image, "image beside the folders of classes")
    return classes


def _refuse_pair(place: Path, folders: Sequence[Folder]) -> None:
    names = sorted(folder.name for folder in folders)
    if {name.lower() for name in names} in _PAIRS:
        raise DataError(
            f"{place}: nobody can tell which of {' and '.join(names)} is good; rename the folder of good images to "
            "good and the other to bad"
        )


def _speaks(sub: Folder, beside: Sequence[Folder]) -> bool:
    """Whether the name of a folder says what is in it, and does not only name a product, as test_tube does."""
    meant = sub.meant
    if meant.role in (BAD, MASK, UNSORTED) and any(
        part.meant.split == TRAIN and _holds_good(part) for part in sub.folders
    ):
        return False  # a product: label/train/good
    if not meant.says or meant.role in (BAD, MASK, UNSORTED) or not meant.rest or meant.plain:
        return meant.says
    others = [other.meant for other in beside if other is not sub]
    if any(other.says and other.rest == meant.rest for other in others):  # bottle_good and bottle_bad
        return True
    if meant.role == GOOD and not all(other.says for other in others):
        raise DataError(
            f"{sub.path}: is it the name of a product, or are its images good, and those beside it not? Give a "
            "folder good with folders of defects beside it, or a folder for each product with good in it"
        )
    return meant.role == GOOD


def _states(place: Folder) -> bool:
    """Whether folders in a folder say what its images are; words for images are looked through."""
    inner = [sub for sub in place.folders if sub.has_images_below]
    return any(sub.meant.says or (sub.meant.pictures and _states(sub)) for sub in inner)


def _holds_classes(place: Folder) -> bool:
    """Whether a folder is no class, but a folder of classes that say what their images are."""
    if place.images or _states(place):
        return False
    return any(_states(sub) or _holds_classes(sub) for sub in place.folders)


def _holds_good(place: Folder) -> bool:
    return any(sub.meant.role == GOOD for sub in place.folders)


def _unnamed_training(place: Folder) -> str:
    """Names of folders in a training part that say nothing, where none says good: classes of scenes, or parts."""
    for sub in place.folders:
        if sub.meant.split == TRAIN and not sub.meant.role and not _holds_good(sub):
            if any(inner.meant.is_kind and inner.has_images_below for inner in sub.folders):
                return sub.listing()
            if names := _unnamed_training(sub):  # seg_train/seg_train
                return names
    return ""


# --------------------------------------------------------------------------------------------- reading


def read_folders(root: Folder, log: ScanLog, layout: str = FOLDER) -> list[Sample]:
    """Samples of all classes at a folder that have a layout; `FOLDER` takes every class."""
    classes = find_classes(root, log)
    if layout != FOLDER:
        accepted = (MVTEC_AD, MVTEC_LOCO) if layout == MVTEC_AD else (layout,)
        for product in [product for product in classes if shape_of(product) not in accepted]:
            classes.remove(product)
            log.skip(product.path, f"not a class folder of {layout}")
    samples: list[Sample] = []
    assumed: dict[str, int] = {}
    for product in classes:
        try:
            reader = _ClassReader(product, log)
            samples += reader.samples()
        except DataError as error:
            if len(classes) == 1:
                raise
            log.leave(product.path, str(error))
            continue
        if reader.assumed and product.meant.role != GOOD:
            assumed[product.name] = reader.assumed
    if len(classes) > 1:
        _report_lists(_unread_lists(root), bool(assumed), log)
    if assumed:
        log.note(
            f"nothing says which images of {listed(list(assumed))} are good: "
            f"all {sum(assumed.values()):,} are taken as good"
        )
    return samples


class _ClassReader:
    def __init__(self, product: Folder, log: ScanLog) -> None:
        self._name, self._log = product.name, log
        self.assumed = 0  # images that are taken as good only because nothing says otherwise
        self._images: list[Place] = []
        self._masks: list[Place] = []
        self._lists: list[tuple[Path, str]] = []
        if names := _unnamed_training(product):
            raise DataError(
                f"{product.path}: train/ holds the folders {names} and none is called good. For parts, rename the "
                "folder of good images to good; for classes of objects or scenes with a test split type "
                "--layout view"
            )
        for here in product.walk(log):
            self._gather(here, here.path.relative_to(product.path).parts)
        self._good_in = {place.split for place in self._images if place.role == GOOD}
        self._trains = any(place.split == TRAIN and place.role in (GOOD, "") for place in self._images)

    def _gather(self, here: Folder, folders: tuple[str, ...]) -> None:
        _refuse_pair(here.path, here.folders)
        if here.images and (unclear := [sub.name for sub in here.folders if sub.name.lower() in _UNCLEAR]):
            raise DataError(
                f"{here.path}: images beside the folder {unclear[0]}, which may be good ones or not; "
                "rename it to good or bad"
            )
        is_mask = Place(here.path, folders).role == MASK
        masks, lost = (here.images, []) if is_mask else masks_among(here.images)
        for path in lost:
            self._log.skip(path, "a mask by its name, of an image that is not there")
        no_images = {*masks, *lost}
        self._masks += [Place(path, folders) for path in masks]
        self._images += [Place(path, folders) for path in here.images if path not in no_images]
        self._lists += _unread_lists(here)
        if is_mask and here.others and not here.images:
            self._lists.append(
                (here.path, f"labels that are no pictures are not read, such as {here.others[0].name}")
            )

    def samples(self) -> list[Sample]:
        """All of them, training first, each part in the order of paths."""
        judged = [(place, sample) for place in self._images if (sample := self._judge(place)) is not None]
        # Good images often have the names of defects in other folders, and masks of those are not theirs.
        defects = [place for place, sample in judged if sample.label == 1]
        others = [place for place, sample in judged if sample.label is None or (sample.label == 0 and not place.role)]
        masks = match((defects, others), self._masks, self._log)
        read = [self._masked(place, sample, masks.get(place.path, ())) for place, sample in judged]
        used = [sample for split in SPLITS for sample in read if sample is not None and sample.split == split]
        _report_lists(self._lists, bool(self.assumed), self._log)
        unknown = [s for s in used if s.label is None and not s.defect_type.startswith("test_private")]
        if unknown:
            names = sorted({sample.image.parent.name for sample in unknown})
            self._log.note(
                f"{len(unknown):,} images of {self._name} are neither learnt nor tested, as nothing says whether "
                f"they are good ({', '.join(names[:5])}); folders called good and bad in there would"
            )
        return used

    def _judge(self, place: Place) -> Sample | None:
        """An image by the folders above it, then by its own name; None, with a log entry, if it is not used."""
        path, split, role, by_name = place.path, place.split, place.role, meaning_of_file(place.path.name).role
        kinds = any(meaning(name).is_kind for name in place.folders)
        if role == GOOD and by_name == BAD:
            self._log.skip(path, "its name says defect, and its folder good")
            return None
        if not role and by_name in (GOOD, BAD) and (by_name == BAD or not kinds):
            role = by_name
            self._log.note(
                "some images are good, or defects, by a word in their own names, such as ok, normal, ng or defect"
            )
        if split in (TRAIN, CALIBRATION):
            if role in (BAD, UNSORTED) or (not role and (split in self._good_in or kinds)):
                self._log.skip(path, f"only good images are used for {split}")
                return None
            if not role and split == CALIBRATION and self._good_in & {TRAIN, ""}:  # good is said of others only
                return Sample(path, TEST, self._name, None)
        elif role == UNSORTED:
            kind = next(name for name in place.folders if meaning(name).role == UNSORTED)
            return Sample(path, TEST, self._name, None, kind)
        elif role == BAD or (not role and kinds and (split == TEST or "" in self._good_in)):  # a kind beside good/
            return Sample(path, TEST, self._name, 1, _kind(place))
        elif not role and (split == TEST or "" in self._good_in):
            return Sample(path, TEST, self._name, None)
        elif not role and self._trains:
            self._log.skip(path, "neither in the training nor in the test part")
            return None
        self.assumed += not role
        return Sample(path, split or TRAIN, self._name)

    def _masked(self, place: Place, sample: Sample, masks: tuple[Path, ...]) -> Sample | None:
        """A defect with its masks; an image of which nothing else is said, by what its masks say."""
        if not masks or sample.label == 1:
            return replace(sample, masks=masks)
        marks = marks_a_defect(masks)
        if marks is None:
            self._log.skip(sample.image, "its mask cannot be read, and nothing else says whether it is good")
            return None
        if not marks:
            return replace(sample, label=0)
        if place.split and sample.split != TEST:
            self._log.skip(sample.image, f"its mask marks a defect; only good images are used for {sample.split}")
            return None
        self._log.note("images of which only a mask says whether they are good are defects if it marks a pixel")
        return replace(sample, split=TEST, label=1, defect_type=sample.defect_type or "anomaly", masks=masks)


def _kind(place: Place) -> str:
    """Name of the kind of defect: the first folder that names one; below a plain ``bad/``, what stands in it."""
    named = [name for name in place.folders if meaning(name).is_kind or meaning(name).role == BAD]
    if len(named) > 1 and not place.split and meaning(named[0]).role == BAD:
        return named[1]
    return named[0] if named else "anomaly"


def _unread_lists(folder: Folder) -> Iterator[tuple[Path, str]]:
    """Files directly in a folder that may say which images are good, and what to do if they shall."""
    advice = "a table with the columns image, label is read if it is given in place of the folder"
    stems = {name for image in folder.images for name in (image.stem, image.name)}
    beside = [path for path in folder.others if path.suffix.lower() in _SIDECARS and path.stem in stems]
    if 0 < len(beside) < len(folder.images):  # one for every image says no more than when and how it was taken
        yield (
            beside[0],
            f"{len(beside)} of {len(folder.images)} images have such a file, as if for a defect; {advice}",
        )
    for path in folder.others:
        if path not in beside and _may_list(path, folder):
            yield path, f"it seems to list images; {advice}"


def _may_list(path: Path, folder: Folder) -> bool:
    """Whether a file is called like a list, or names images that lie in or below its folder."""
    suffix = path.suffix.lower()
    if suffix not in _TEXTS | _SPREADSHEETS or path.name.endswith(".train.jsonl"):
        return False
    if suffix in SUFFIXES and has_columns(path, PREDICTED):
        return False
    if set(re.findall(r"[a-z]+", path.stem.lower())) & _LIST_WORDS:
        return True
    if suffix in _SPREADSHEETS:
        return meaning(path.stem).says
    with suppress(DataError), open_text(path, "replace") as file:
        names = set(_IMAGE_NAME.findall(file.read(_LIST_HEAD)))
        return bool(names) and any(image.name in names for image in folder.images_below(ScanLog()))
    return False


def _report_lists(lists: Iterable[tuple[Path, str]], decides: bool, log: ScanLog) -> None:
    """Lists that were not read: where nothing else says what is good, they may name defects, and reading stops."""
    for path, advice in lists:
        if decides:
            log.leave(path, advice)
        else:
            log.skip(path, "not used: the names of folders say which images are good")
