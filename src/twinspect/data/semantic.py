"""Semantic sets: the class of the object or scene is what may be abnormal.

Convention: ``class_name`` is the true class, ``label`` is None, and the split is the one on disk. Which
classes count as normal is the protocol's choice (``twinspect.data.protocols``), which sets the labels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twinspect.data.containers import open_container, parquet_columns, parquet_labels, read_idx
from twinspect.data.images import ImageLimits
from twinspect.data.names import UNSORTED, key, meaning
from twinspect.data.scan import (
    ScanLog,
    existing_folder,
    files_in,
    has_images_below,
    images_below,
    listing,
    subfolders,
)
from twinspect.errors import DataError
from twinspect.types import TEST, TRAIN, Sample

# Classes in the official order, which is also the order of the numeric labels.
CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
# Officially "T-shirt/top" and "Ankle boot"; these can be file names.
FASHION = tuple("t-shirt-top trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split())
VIEW = tuple("buildings forest glacier mountain sea street".split())
CIFAR100_SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
# The official numeric labels of the fine classes are their alphabetical order.
CIFAR100 = dict(sorted((fine, coarse) for coarse, fines in CIFAR100_SUPERCLASSES.items() for fine in fines))

ALIASES = {"plane": "airplane", "car": "automobile", "tshirt": "t-shirt-top"}
Files = dict[str, list[Path]]  # split -> files


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A known set of classes: python version (restricted unpickler), binary version, IDX, Parquet or class folders.

    Attributes:
        name: layout name.
        classes: in the official order.
        folders: names of the folder that an official archive unpacks to.
        files: split -> names of the official container files without suffix.
        open_names: whether other class folders are taken too.
    """

    name: str
    classes: tuple[str, ...]
    folders: tuple[str, ...] = ()
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    open_names: bool = False

    def looks_like(self, root: Path) -> bool:
        """Whether a folder holds this set in one of its shapes; class folders must carry known names."""
        if not os.path.isdir(root):
            return False
        if _container_files(root, self) or _parquet_set(root) == self.name:
            return True
        folders = {sub.name for subs in _class_folders(root).values() for sub in subs}
        names = {_canonical(name, self) for name in folders}
        return len(names) > 1 and not any(map(str.isdigit, folders)) and names <= set(self.classes)

    def read(self, root: Path, log: ScanLog) -> list[Sample]:
        """Samples of the set, in whichever shape it is there."""
        root = existing_folder(root)
        if files := _container_files(root, self):
            return _from_containers(files, log, self)
        if files := _parquet_files(root):
            return [
                sample
                for split, paths in files.items()
                for path in paths
                for sample in _records(path, split, parquet_labels(path), self)
            ]
        folders = _class_folders(root)
        if any(folders.values()):
            return _from_folders(root, folders, log, self)
        names = ", ".join(stem for _, stems in self.files for stem in stems)
        containers = f"the files {names} (python or binary), train*.parquet and test*.parquet, or " if names else ""
        raise DataError(
            f"{root}: not {self.name} in any shape known; found: {listing(root)}. "
            f"Accepted: {containers}train/<class>/ and test/<class>/ of images"
        )


SETS = (
    # Official counts: 50,000 training and 10,000 test images of 32 x 32.
    ImageSet(
        "cifar10",
        CIFAR10,
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        ((TRAIN, tuple(f"data_batch_{i}" for i in range(1, 6))), (TEST, ("test_batch",))),
    ),
    # View (Intel scenes): ``seg_train/seg_train/<class>`` and ``seg_test/...``, mostly 150 x 150; images of
    # ``seg_pred`` have no class and are left out. Also reads any other set of class folders with a training and a
    # test split.
    ImageSet("view", VIEW, open_names=True),
    # 60,000 training and 10,000 test images of 28 x 28; grey becomes three channels. MNIST's files have the same
    # names, and nothing in them tells the two sets apart.
    ImageSet(
        "fashion-mnist",
        FASHION,
        ("raw", "FashionMNIST", "fashion"),
        ((TRAIN, ("train-images-idx3-ubyte",)), (TEST, ("t10k-images-idx3-ubyte",))),
    ),
    # As CIFAR-10; ``class_name`` is the fine class, and `protocols.by_superclass` gives the 20 super-classes.
    ImageSet(
        "cifar100",
        tuple(CIFAR100),
        ("cifar-100-python", "cifar-100-binary"),
        ((TRAIN, ("train",)), (TEST, ("test",))),
    ),
)


# --------------------------------------------------------------------------------- official containers


def _container_files(root: Path, image_set: ImageSet) -> Files:
    for place in (root, *(root / name for name in image_set.folders), root / "FashionMNIST" / "raw"):
        for suffix in ("", ".bin", ".gz"):
            files = {split: _named(place, stems, suffix) for split, stems in image_set.files}
            if any(files.values()):
                return files
    return {}


def _named(place: Path, stems: Sequence[str], suffix: str) -> list[Path]:
    there = {path.name.lower(): path for path in files_in(place)}
    return [there[name] for stem in stems if (name := stem + suffix) in there]


def _from_containers(files: Files, log: ScanLog, image_set: ImageSet) -> list[Sample]:
    official = sum(len(stems) for _, stems in image_set.files)
    present = sum(len(paths) for paths in files.values())
    if present < official:
        log.note(f"{present} of the {official} official files of {image_set.name} were found")
    samples: list[Sample] = []
    for split, paths in files.items():
        for path in paths:
            labels = _idx_labels(path) if "idx3" in path.name else (open_container(path).labels or ())
            samples += _records(path, split, labels, image_set)
    return samples


def _idx_labels(images: Path) -> Sequence[int | str]:
    path = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; the classes of {images.name} are in it")
    labels: Sequence[int | str] = [int(x) for x in read_idx(path).ravel()]
    count = open_container(images).count
    if len(labels) != count:
        raise DataError(f"{path}: {len(labels):,} labels for the {count:,} images of {images.name}; copy both again")
    return labels


def _records(path: Path, split: str, labels: Sequence[int | str], image_set: ImageSet) -> list[Sample]:
    return [Sample(path, split, _name_of(x, image_set, path), None, record=i) for i, x in enumerate(labels)]


def _name_of(label: int | str, image_set: ImageSet, path: Path) -> str:
    if isinstance(label, int) and 0 <= label < len(image_set.classes):
        return image_set.classes[label]
    name = _canonical(label, image_set) if isinstance(label, str) else ""
    if name not in image_set.classes:
        raise DataError(f"{path}: label {label!r}; {image_set.name} has 0 to {len(image_set.classes) - 1}")
    return name


# -------------------------------------------------------------------------------------------- Parquet


def _parquet_files(root: Path) -> Files:
    files: Files = {TRAIN: [], TEST: []}
    for place in (root, *subfolders(root), *(s for sub in subfolders(root) for s in subfolders(sub))):
        for path in (path for path in files_in(place) if path.suffix.lower() == ".parquet"):
            split = next((s for s in files if path.name.lower().startswith(s) or place.name.lower() == s), None)
            if split and {"img", "image"} & set(columns := parquet_columns(path)) and "split" not in columns:
                files[split].append(path)
    return files if any(files.values()) else {}


def _parquet_set(root: Path) -> str:
    """Which set a folder of Parquet files is: by its columns, then by the size of its first image."""
    files = _parquet_files(root)
    paths = [path for part in files.values() for path in part]
    if not paths:
        return ""
    columns = parquet_columns(paths[0])
    if "fine_label" in columns:
        return "cifar100"
    container = open_container(paths[0])
    if "label" not in columns or container.count == 0:
        return ""
    return {32: "cifar10", 28: "fashion-mnist"}.get(container.rgb(0, ImageLimits()).shape[0], "")


# -------------------------------------------------------------------------------------- class folders


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """Folders of images per split, through doubled folders such as ``seg_train/seg_train``."""
    folders: dict[str, list[Path]] = {}
    for split in (TRAIN, TEST):
        named = ((sub, meaning(sub.name)) for sub in subfolders(root))
        place = next((sub for sub, m in named if m.split == split and not m.role and m.rest in ("", "seg")), None)
        while place is not None and os.path.isdir(place / place.name) and len(subfolders(place)) == 1:
            place = place / place.name
        folders[split] = [sub for sub in subfolders(place) if has_images_below(sub)] if place is not None else []
    return folders


def _from_folders(root: Path, folders: dict[str, list[Path]], log: ScanLog, image_set: ImageSet) -> list[Sample]:
    samples: list[Sample] = []
    for split, subs in folders.items():
        for sub in subs:
            name = _canonical(sub.name, image_set)
            if name not in image_set.classes and not image_set.open_names:
                log.skip(sub, f"not a class of {image_set.name}")
                continue
            samples += [Sample(image, split, name, None) for image in images_below(sub, log)]
    for sub in subfolders(root):
        if not any(used.is_relative_to(sub) for subs in folders.values() for used in subs):
            official = sub.name == "seg_pred" or meaning(sub.name).role == UNSORTED or not has_images_below(sub)
            (log.skip if official else log.leave)(sub, "holds no class folders of train or test")
    return samples


def _canonical(name: str, image_set: ImageSet) -> str:
    """The set's own spelling of a class name or number; unknown names come back as they are."""
    if name.isdecimal() and int(name) < len(image_set.classes) and not image_set.open_names:
        return image_set.classes[int(name)]
    plain = key(ALIASES.get(key(name), name))
    return next((known for known in image_set.classes if key(known) == plain), name)
