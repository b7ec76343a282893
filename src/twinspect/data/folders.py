"""Folders of images as people have them: benchmark sets of parts, and plain folders with names in any language.

One reader for all of them. It finds the classes (products) of a folder, and asks of every image what the names of the
folders above it say (`names.meaning`): which split, good or defect, image or mask. Each class is judged by itself, so
that one root may hold several layouts. ``mvtec-ad``, ``mvtec-loco`` (whose validation split calibrates, and whose
saturation areas `samples.read_regions` reads) and ``mvtec-ad-2`` (whose private test images have label None and their
folder as ``defect_type``) only say which classes are meant; ``folder`` takes all.

What a name calls a defect or a mask is never a good image. Good images without a split are the training split; if
there are defects and no good test images, the protocols hold some good images out.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from twinspect.data.manifest import label_tables, read_rows, table_rows
from twinspect.data.masks import Place, masks_among, match
from twinspect.data.names import BAD, GOOD, MASK, UNSORTED, is_of_product, meaning, meaning_of_file, role_of
from twinspect.data.samples import marks_a_defect
from twinspect.data.scan import (
    ScanLog,
    files_in,
    folder_name,
    has_images,
    has_images_below,
    listing,
    subfolders,
    walk,
    why_without_images,
)
from twinspect.errors import DataError, listed
from twinspect.types import CALIBRATION, SPLITS, TEST, TRAIN, Sample

LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"
MVTEC_AD, MVTEC_AD_2, MVTEC_LOCO, FOLDER = "mvtec-ad", "mvtec-ad-2", "mvtec-loco", "folder"
_EXPECTED = {
    MVTEC_AD: "<class>/train/good, <class>/test/<kind>",
    MVTEC_AD_2: "<class>/test_public/{good,bad}",
    MVTEC_LOCO: f"<class>/test/{LOGICAL}",
}
# Names of which one means good, and nobody can tell which.
_PAIRS = ({"0", "1"}, {"yes", "no"}, {"true", "false"}, {"positive", "negative"}, {"pos", "neg"}, {"p", "n"})
_UNCLEAR = frozenset("true false positive positives negative negatives pos neg".split())
_LIST_SUFFIXES = frozenset(".json .jsonl .xml .xlsx .xls .ods".split())  # tables that are read are not among them
_LIST_WORDS = frozenset("label labels annotation annotations manifest meta train test val split gt coco".split())
_NOT_USED = "{} is not used: the names of folders say which images are good"


class ClassFolders(NamedTuple):
    """A class and where its images lie: folders, each with names that count as if they stood above what is in it."""

    name: str
    places: list[tuple[Path, tuple[str, ...]]]


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


def layout_of(root: Path) -> str:
    """Name of the layout that all classes at ``root`` have, ``folder`` for several; empty where nothing is said."""
    if not os.path.isdir(root):
        return ""
    try:
        classes = find_classes(root, ScanLog())
    except DataError:
        return FOLDER  # whoever reads it says what is wrong
    if not any(_states(place) for product in classes for place, _ in product.places):
        return ""
    shapes = {shape_of(product) for product in classes}
    return shapes.pop() if len(shapes) == 1 else FOLDER


def shape_of(product: ClassFolders) -> str:
    """Name of the layout of one class."""
    inside = {sub.name.lower(): sub for sub in subfolders(product.places[0][0])}
    if "test_public" in inside:
        return MVTEC_AD_2
    if "test" in inside and {sub.name.lower() for sub in subfolders(inside["test"])} & {LOGICAL, STRUCTURAL}:
        return MVTEC_LOCO
    said = {name: meaning(name) for name in inside}
    good = {said[name].split for name, sub in inside.items() if not said[name].role and _holds_good(sub)}
    masks = any(meant.role == MASK for meant in said.values())
    return MVTEC_AD if TRAIN in good or (TEST in good and masks) else FOLDER


# ------------------------------------------------------------------------------------- which classes there are


def find_classes(root: Path, log: ScanLog) -> list[ClassFolders]:
    """The classes at a folder: itself, or folders in it. Folders of images that belong to none are logged."""
    inner = []
    for sub in subfolders(root):
        if has_images_below(sub):
            inner.append(sub)
        else:
            log.skip(sub, why_without_images(sub))
    speaking = [sub for sub in inner if _speaks(sub, inner)]
    silent = [sub for sub in inner if sub not in speaking]
    if products := _by_product(speaking, silent):
        return products
    learns = any(_is_learnt(sub.name) for sub in speaking)
    stated = any(_states(sub) for sub in silent)
    wrapped = all(meaning(sub.name).pictures and not _holds_classes(sub) for sub in silent)  # images/ beside masks/
    if learns or wrapped or ((has_images(root) or label_tables(root)) and not stated):
        return [ClassFolders(folder_name(root), [(root, ())])] if inner or has_images(root) else []
    return _classes_among(root, silent, speaking, log)


def _by_product(speaking: list[Path], silent: list[Path]) -> list[ClassFolders]:
    """Classes of folders such as bottle_good, bottle_bad, cap_good, cap_bad; empty for any other shape."""
    named = {meaning(sub.name).rest for sub in speaking if _is_learnt(sub.name) and not meaning(sub.name).plain}
    products = [product for product in named if not any(is_of_product(product, other) for other in named - {product})]
    owners: dict[str, list[Path]] = defaultdict(list)
    for sub in (*speaking, *silent):
        owners[next((name for name in products if is_of_product(meaning(sub.name).rest, name)), "")].append(sub)
    if "" in owners or len(owners) < 2:
        return []
    return [
        ClassFolders(product.replace(" ", "_"), [(sub, _context(sub)) for sub in subs])
        for product, subs in owners.items()
    ]


def _classes_among(root: Path, silent: list[Path], speaking: list[Path], log: ScanLog) -> list[ClassFolders]:
    """Folders beside each other as classes; folders whose names say something go to the class that they name."""
    _refuse_pair(root, [sub.name for sub in silent])
    classes = []
    for sub in silent:
        if _holds_classes(sub):
            log.leave(sub, "holds classes itself; give this folder alone")
        elif names := _unnamed_training(sub):
            log.leave(sub, f"its training part holds {names}, and none of them is called good")
        else:
            classes.append(ClassFolders(sub.name, [(sub, ())]))
    for sub in speaking:
        _give(sub, classes, log)
    for image in next(walk(root, ScanLog()))[1] if classes else ():
        log.skip(image, "image beside the folders of classes")
    return classes


def _give(sub: Path, classes: list[ClassFolders], log: ScanLog) -> None:
    """A folder whose name says what is in it, beside classes: to the class that it names, or to the only one."""
    meant = meaning(sub.name)
    owner = next((product for product in classes if is_of_product(meant.rest, meaning(product.name).rest)), None)
    owner = classes[0] if owner is None and len(classes) == 1 else owner
    inner = {child: product for child in subfolders(sub) for product in classes if child.name == product.name}
    learns = any(meaning(part.name).split == TRAIN and _holds_good(part) for part in subfolders(sub))
    if meant.role in (MASK, BAD) and learns and not inner:  # a product: label/train/good
        classes.append(ClassFolders(sub.name, [(sub, ())]))
    elif owner is not None:
        owner.places.append((sub, _context(sub)))
    elif inner:  # NG/bottle, NG/cap
        for child, product in inner.items():
            product.places.append((child, _context(sub)))
    elif meant.role == BAD:
        log.leave(
            sub, "its name says defects, and not of which class; move it into the folder of its class, or rename it"
        )
    else:
        log.skip(sub, "its name does not say to which class it belongs")


def _context(sub: Path) -> tuple[str, ...]:
    """What the name of a folder says, without the product: it counts as a folder above its images."""
    meant = meaning(sub.name)
    return (meant.split,) if meant.split and not meant.role else (sub.name,)


def _refuse_pair(place: Path, names: Iterable[str]) -> None:
    if {name.lower() for name in names} in _PAIRS:
        raise DataError(
            f"{place}: nobody can tell which of {' and '.join(sorted(names))} is good; rename the folder of good "
            "images to good and the other to bad"
        )


def _speaks(sub: Path, beside: Sequence[Path]) -> bool:
    """Whether the name of a folder says what is in it, and does not only name a product, as test_tube does."""
    meant = meaning(sub.name)
    if not meant.says or meant.role in (BAD, MASK, UNSORTED) or not meant.rest or meant.plain:
        return meant.says
    others = [meaning(other.name) for other in beside if other != sub]
    if any(is_of_product(other.rest, meant.rest) for other in others):  # bottle_good and bottle_bad, or bottle
        return True
    if meant.role == GOOD and not all(other.says for other in others):
        raise DataError(
            f"{sub}: is it the name of a product, or are its images good, and those beside it not? Give a folder "
            "good with folders of defects beside it, or a folder for each product with good in it"
        )
    return meant.role == GOOD


def _states(place: Path) -> bool:
    """Whether folders or tables in a folder say what its images are; words for images are looked through."""
    if label_tables(place):
        return True
    inner = [sub for sub in subfolders(place) if has_images_below(sub)]
    return any(meaning(sub.name).says or (meaning(sub.name).pictures and _states(sub)) for sub in inner)


def _holds_classes(place: Path) -> bool:
    """Whether a folder is no class, but a folder of classes that say what their images are."""
    if has_images(place) or _states(place):
        return False
    return any(_states(sub) or _holds_classes(sub) for sub in subfolders(place))


def _holds_good(place: Path) -> bool:
    return any(meaning(sub.name).role == GOOD for sub in subfolders(place))


def _unnamed_training(place: Path) -> str:
    """Names of folders in a training part that say nothing, where none says good: classes of scenes, or parts."""
    for sub in subfolders(place):
        meant = meaning(sub.name)
        if meant.split == TRAIN and not meant.role and not _holds_good(sub):
            if any(_is_kind(inner.name) and has_images_below(inner) for inner in subfolders(sub)):
                return listing(sub)
            if names := _unnamed_training(sub):  # seg_train/seg_train
                return names
    return ""


def _is_learnt(name: str) -> bool:
    meant = meaning(name)
    return meant.role == GOOD or (meant.split == TRAIN and not meant.role)


def _is_kind(name: str) -> bool:
    """Whether a name says nothing that is known: a kind of defects, or a product."""
    meant = meaning(name)
    return not meant.says and not meant.plain


# --------------------------------------------------------------------------------------------- reading


def read_folders(root: Path, log: ScanLog, layout: str = FOLDER) -> list[Sample]:
    """Samples of all classes at a folder that have a layout; `FOLDER` takes every class."""
    classes = find_classes(root, log)
    if layout != FOLDER:
        classes = _of_layout(root, classes, layout, log)
    samples: list[Sample] = []
    assumed: dict[str, int] = {}
    for product in classes:
        try:
            members, unsure = read_class(product, log)
        except DataError as error:
            if len(classes) == 1:
                raise
            log.leave(product.places[0][0], str(error))
            continue
        samples += members
        if unsure:
            assumed[product.name] = unsure
    if not samples and layout == FOLDER and not log.undecided:
        raise DataError(
            f"{root}: no image found in it or below; found: {listing(root)}. "
            "Give a folder of good images, or one with good/ and folders of defects"
        )
    if len(classes) > 1:
        for path, reason in _odd_lists((), files_in(root), False):
            log.skip(path, reason)
        for table in label_tables(root):
            log.note(_NOT_USED.format(table))
    if assumed:
        log.note(
            f"nothing says which images of {listed(list(assumed))} are good: "
            f"all {sum(assumed.values()):,} are taken as good"
        )
    return samples


def _of_layout(root: Path, classes: list[ClassFolders], layout: str, log: ScanLog) -> list[ClassFolders]:
    """Classes of one layout; the others are left out, because that is what was asked for."""
    accepted = (MVTEC_AD, MVTEC_LOCO) if layout == MVTEC_AD else (layout,)
    fit = [product for product in classes if shape_of(product) in accepted]
    if not fit:
        raise DataError(f"{root}: no class folder of the shape {_EXPECTED[layout]}; found: {listing(root)}")
    for product in classes:
        if product not in fit:
            log.skip(product.places[0][0], f"not a class folder ({_EXPECTED[layout]})")
    return fit


def read_class(product: ClassFolders, log: ScanLog) -> tuple[list[Sample], int]:
    """Samples of one class, and how many of them are taken as good only because nothing says otherwise."""
    reader = _ClassReader(product, log)
    return reader.samples(), reader.assumed


class _ClassReader:
    """Images of one class by what is said of them."""

    def __init__(self, product: ClassFolders, log: ScanLog) -> None:
        self._name, self._log = product.name, log
        self.assumed = 0  # images that are taken as good only because nothing says otherwise
        self._listed: list[tuple[Place, Sample]] = []
        self._images: list[Place] = []
        self._masks: list[Place] = []
        self._odd: list[tuple[Path, str]] = []
        self._tables: set[Path] = set()
        for place, context in product.places:
            if names := _unnamed_training(place):
                raise DataError(
                    f"{place}: train/ holds the folders {names} and none is called good. For parts, rename the "
                    "folder of good images to good; for classes of objects or scenes with a test split, type "
                    "--layout view"
                )
            self._gather(place, context)
        roles = [(_split(parts), role_of(parts)) for _, parts in self._images]
        self._good_in = {split for split, role in roles if role == GOOD}
        self._trains = any(split == TRAIN and role in (GOOD, "") for split, role in roles)

    def samples(self) -> list[Sample]:
        """All of them, training first, each part in the order of paths."""
        judged = [(place, sample) for place in self._images if (sample := self._judge(*place)) is not None]
        # Good images often have the names of defects in other folders, and masks of those are not theirs.
        defects = [place for place, sample in (*judged, *self._listed) if sample.label == 1]
        others = [
            place
            for place, sample in (*judged, *self._listed)
            if sample.label is None or not (sample.label or role_of(place[1]))
        ]
        masks = match((defects, others), self._masks, self._log)
        read = [self._masked(sample, masks.get(path, ()), parts) for (path, parts), sample in judged]
        for (path, _), sample in self._listed:
            own = masks.get(path, ()) if sample.label == 1 and not sample.masks else sample.masks
            read.append(replace(sample, masks=own))
        used = [sample for split in SPLITS for sample in read if sample is not None and sample.split == split]
        self._say(used)
        return used

    def _gather(self, place: Path, context: tuple[str, ...]) -> None:
        governed: dict[Path, set[Path]] = {}  # folder with tables of labels -> what they list
        for here, images, others in walk(place, self._log):
            inner = [sub.name for sub in subfolders(here)]
            _refuse_pair(here, inner)
            if images and (unclear := [name for name in inner if name.lower() in _UNCLEAR]):
                raise DataError(
                    f"{here}: images beside the folder {unclear[0]}, which may be good ones or not; "
                    "rename it to good or bad"
                )
            parts = (*context, *here.relative_to(place).parts)
            role = role_of(parts)
            tables = label_tables(here) if others and not role else []
            if tables:
                governed[here] = self._read_tables(tables, place, context)
            self._odd += _odd_lists(images, [path for path in others if path not in tables], role == MASK)
            masks, lost = (images, []) if role == MASK else masks_among(images)
            for path in lost:
                self._log.skip(path, "a mask by its name, of an image that is not there")
            in_table = next((paths for above, paths in governed.items() if here.is_relative_to(above)), None)
            self._masks += [(path, parts) for path in masks if in_table is None or path not in in_table]
            no_images = {*masks, *lost}
            for path in (path for path in images if path not in no_images):
                if in_table is None or role:  # a folder called good or bad says more than a table above it
                    self._images.append((path, parts))
                elif path not in in_table:
                    self._log.skip(path, "an image that the table of labels does not list")

    def _read_tables(self, tables: Sequence[Path], place: Path, context: tuple[str, ...]) -> set[Path]:
        """Read tables of labels in one folder; the files that they list. Rows of images in ``good/`` are not used."""

        def parts_of(image: Path) -> tuple[str, ...]:
            inside = image.parent.relative_to(place).parts if image.is_relative_to(place) else ()
            return (*context, *inside)

        def split_at(image: Path) -> str:
            return _split(parts_of(image)) or meaning(table.stem).split

        in_tables: set[Path] = set()
        for table in tables:
            samples = read_rows(
                table, table_rows(table), self._log, None, class_name=self._name, within=place, split_at=split_at
            )
            fresh = [sample for sample in samples if not role_of(parts_of(sample.image))]
            twice = next((sample.image for sample in fresh if sample.image in in_tables), None)
            if twice is not None:
                raise DataError(f"{table}: {twice} is listed twice, here or in another table beside it")
            self._listed += [((sample.image, parts_of(sample.image)), sample) for sample in fresh]
            in_tables.update(path for sample in fresh for path in (sample.image, *sample.masks))
            self._tables.add(table)
            if not fresh:
                self._log.note(_NOT_USED.format(table))
        return in_tables

    def _judge(self, path: Path, parts: tuple[str, ...]) -> Sample | None:
        """An image by the folders above it, then by its own name; None, with a log entry, if it is not used."""
        split, role, by_name = _split(parts), role_of(parts), meaning_of_file(path.name).role
        kinds = any(map(_is_kind, parts))
        if role == GOOD and by_name == BAD:
            self._log.skip(path, "its name says defect, and its folder good")
            return None
        if not role and by_name in (GOOD, BAD) and (by_name == BAD or not kinds):
            role = by_name
            self._log.note("some images are good, or defects, by their own names, such as OK_1.png and NG_1.png")
        if split in (TRAIN, CALIBRATION):
            if role in (BAD, UNSORTED) or (not role and (split in self._good_in or kinds)):
                above = meaning(path.parent.name)
                part = path if above.split and not above.role else path.parent
                self._log.skip(part, f"only good images are used for {split}")
                return None
            if not role and split == CALIBRATION and self._good_in & {TRAIN, ""}:  # good is said of others only
                return Sample(path, TEST, self._name, None)
        elif role == GOOD:
            if not split and self._trains and parts:
                self._log.note(f"{Path(*parts)} is learnt as well: its name says good, and neither training nor test")
        elif role == UNSORTED:
            return Sample(path, TEST, self._name, None, next(p for p in parts if meaning(p).role == UNSORTED))
        elif role == BAD or (kinds and (split == TEST or "" in self._good_in)):  # a kind of its own beside good/
            return Sample(path, TEST, self._name, 1, _kind(parts))
        elif split == TEST or "" in self._good_in:
            return Sample(path, TEST, self._name, None)
        elif self._trains:
            self._log.skip(path.parent, "neither in the training nor in the test part")
            return None
        self.assumed += not role
        return Sample(path, split or TRAIN, self._name)

    def _masked(self, sample: Sample, masks: tuple[Path, ...], parts: tuple[str, ...]) -> Sample | None:
        """A defect with its masks; an image of which nothing else is said, by what its masks say."""
        if not masks or sample.label == 1:
            return replace(sample, masks=masks)
        marks = marks_a_defect(masks)
        if marks is None:
            self._log.skip(sample.image, "its mask cannot be read, and nothing else says whether it is good")
            return None
        if not marks:
            return replace(sample, label=0)
        if _split(parts) and sample.split != TEST:
            self._log.skip(sample.image, f"its mask marks a defect; only good images are used for {sample.split}")
            return None
        self._log.note("images of which only a mask says whether they are good are defects if it marks a pixel")
        return replace(sample, split=TEST, label=1, defect_type=sample.defect_type or "anomaly", masks=masks)

    def _say(self, used: Sequence[Sample]) -> None:
        for path in (*self._tables, *(path for path, _ in self._odd)):
            self._log.take_back(path)
        for path, reason in self._odd:  # a list that is not read may name defects among what is taken as good
            (self._log.leave if self.assumed else self._log.skip)(path, reason)
        unknown = [s for s in used if s.label is None and not s.defect_type.startswith("test_private")]
        if unknown:
            places = sorted({sample.image.parent.name for sample in unknown})
            self._log.note(
                f"{len(unknown):,} images of {self._name} are neither learnt nor tested, as nothing says whether "
                f"they are good ({', '.join(places[:5])}); folders called good and bad in there would"
            )


def _split(parts: Iterable[str]) -> str:
    return next((split for part in parts if (split := meaning(part).split)), "")


def _kind(parts: Sequence[str]) -> str:
    """Name of the kind of defect: the first folder that names one; below a plain ``bad/``, what stands in it."""
    named = [part for part in parts if _is_kind(part) or meaning(part).role == BAD]
    if len(named) > 1 and not _split(parts) and meaning(named[0]).role == BAD:
        return named[1]
    return named[0] if named else "anomaly"


def _odd_lists(images: Sequence[Path], others: Sequence[Path], in_masks: bool) -> Iterator[tuple[Path, str]]:
    """Files that list images by their names, or mark defects in another way than by masks, and are not read."""
    for path in others:
        words = set(re.findall(r"[a-z]+", path.stem.lower()))
        ours = path.name.endswith(".train.jsonl")  # the log of a training run
        if path.suffix.lower() in _LIST_SUFFIXES and words & _LIST_WORDS and not ours:
            yield path, "it seems to list images, and it is not read; a CSV with the columns image, label would be"
    if in_masks and not images and others:
        yield others[0].parent, f"labels that are no pictures are not read, such as {others[0].name}"
