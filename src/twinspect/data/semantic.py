"""Semantic sets: the class of the object or scene is what may be abnormal.

``class_name`` is the true class, ``label`` is None, and the split is the one on disk. A protocol
(``twinspect.data.protocols``) chooses which classes count as normal, and sets the labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twinspect.data.containers import open_container
from twinspect.data.names import UNSORTED, key
from twinspect.data.scan import Folder, ScanLog
from twinspect.data.tables import IMAGE_COLUMNS, parquet_columns
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


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A known set of classes, as container files of any kind or as class folders."""

    name: str
    classes: tuple[str, ...]  # in the official order
    train: tuple[str, ...] = ()  # names of the official container files without suffix
    test: tuple[str, ...] = ()
    open_names: bool = False  # whether other class folders are taken too

    @property
    def needed(self) -> str:
        """What must be in a folder, in words."""
        files = ", ".join(self.train + self.test)
        containers = f"the files {files}, train*.parquet and test*.parquet, or " if files else ""
        return f"{containers}train/<class>/ and test/<class>/ of images"

    def looks_like(self, root: Folder) -> bool:
        """Whether a folder holds this set in one of its shapes; class folders must carry known names."""
        if self._official_files(root) or _parquet_set(root) == self.name:
            return True
        names = {self._canonical(sub.name) for _, sub in _class_folders(root)}
        return len(names) > 1 and names <= set(self.classes)

    def read(self, root: Folder, log: ScanLog) -> list[Sample]:
        """Samples of the set, in whichever shape it is there."""
        files, official = self._official_files(root), len(self.train + self.test)
        if files and len(files) < official:
            log.note(f"{len(files)} of the {official} official files of {self.name} were found")
        samples: list[Sample] = []
        files = files or _parquet_files(root)
        for split, path in files:
            container = open_container(path)
            if len(container.labels) != container.count:
                raise DataError(
                    f"{path}: {len(container.labels):,} labels for {container.count:,} images; those of IDX files "
                    "are in the file labels-idx1 beside them; copy both again"
                )
            classes = enumerate(self._class(label, path) for label in container.labels)
            samples += [Sample(path, split, name, None, record=record) for record, name in classes]
        if files:
            return samples
        folders = _class_folders(root)
        for split, sub in folders:
            name = self._canonical(sub.name)
            if name in self.classes or self.open_names:
                samples += [Sample(image, split, name, None) for image in sub.images_below(log)]
            else:
                log.skip(sub.path, f"not a class of {self.name}")
        for sub in root.folders:
            if not any(used.path.is_relative_to(sub.path) for _, used in folders):
                official_rest = sub.name == "seg_pred" or sub.meant.role == UNSORTED or not sub.has_images_below
                (log.skip if official_rest else log.leave)(sub.path, "holds no class folders of train or test")
        return samples

    def _official_files(self, root: Folder) -> list[tuple[str, Path]]:
        for place in (root, *root.folders):
            there = {path.name.lower(): path for path in place.files}
            for suffix in ("", ".gz"):
                named = [(TRAIN, stem + suffix) for stem in self.train] + [
                    (TEST, stem + suffix) for stem in self.test
                ]
                if files := [(split, there[name]) for split, name in named if name in there]:
                    return files
        return []

    def _class(self, label: int | str, path: Path) -> str:
        if isinstance(label, int) and 0 <= label < len(self.classes):
            return self.classes[label]
        name = self._canonical(label) if isinstance(label, str) else ""
        if name not in self.classes:
            raise DataError(f"{path}: label {label!r}; {self.name} has 0 to {len(self.classes) - 1}")
        return name

    def _canonical(self, name: str) -> str:
        """The set's own spelling of a class name; unknown names come back as they are."""
        plain = key(ALIASES.get(key(name), name))
        return next((known for known in self.classes if key(known) == plain), name)


SETS = (
    # Official counts: 50,000 training and 10,000 test images of 32 x 32.
    ImageSet("cifar10", CIFAR10, tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
    # View (Intel scenes): ``seg_train/seg_train/<class>`` and ``seg_test/...``, mostly 150 x 150; images of
    # ``seg_pred`` have no class and are left out. Also reads any other set of class folders with a training and a
    # test split.
    ImageSet("view", VIEW, open_names=True),
    # 60,000 training and 10,000 test images of 28 x 28; grey becomes three channels. MNIST's files have the same
    # names, and nothing in them tells the two sets apart.
    ImageSet("fashion-mnist", FASHION, ("train-images-idx3-ubyte",), ("t10k-images-idx3-ubyte",)),
    # As CIFAR-10; ``class_name`` is the fine class, and `protocols.by_superclass` gives the 20 super-classes.
    ImageSet("cifar100", tuple(CIFAR100), ("train",), ("test",)),
)


def _parquet_files(root: Folder) -> list[tuple[str, Path]]:
    """Split and file of Parquet files with images, at most two folders deep, training first."""
    files: list[tuple[str, Path]] = []
    for place in (root, *root.folders, *(deep for sub in root.folders for deep in sub.folders)):
        for path in (path for path in place.files if path.suffix.lower() == ".parquet"):
            name = path.name.lower()
            split = next((s for s in (TRAIN, TEST) if name.startswith(s) or place.name.lower() == s), "")
            if split and set(IMAGE_COLUMNS) & set(columns := parquet_columns(path)) and "split" not in columns:
                files.append((split, path))
    return sorted(files, key=lambda file: file[0] != TRAIN)


def _parquet_set(root: Folder) -> str:
    """Which set a folder of Parquet files is: by its columns, then by the size of its first image."""
    files = _parquet_files(root)
    columns = parquet_columns(files[0][1]) if files else {}
    if "fine_label" in columns:
        return "cifar100"
    if "label" not in columns or not (first := open_container(files[0][1])).count:
        return ""
    return {32: "cifar10", 28: "fashion-mnist"}.get(first.rgb(0).shape[0], "")


def _class_folders(root: Folder) -> list[tuple[str, Folder]]:
    """Split and folder of each class, through doubled folders such as ``seg_train/seg_train``."""
    folders: list[tuple[str, Folder]] = []
    for split in (TRAIN, TEST):
        named = [sub for sub in root.folders if sub.meant.split == split and not sub.meant.role]
        place = next((sub for sub in named if sub.meant.rest in ("", "seg")), None)
        while place is not None and [sub.name for sub in place.folders] == [place.name]:
            place = place.folders[0]
        folders += [(split, sub) for sub in place.folders if sub.has_images_below] if place is not None else []
    return folders
