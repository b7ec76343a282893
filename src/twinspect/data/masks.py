"""Which mask belongs to which image, by the names of both and of the folders above them."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from twinspect.data.names import GOOD, MASK, meaning, role_of, split_of
from twinspect.data.scan import ScanLog

_WORDS = r"(?:masks?|maske|gt|ground[_-]?truth|labels?|seg|segmentation|annotations?|anno)"
# 000_mask, 000-mask, 000_mask_0, 000_GT; and mask_000.
_AFTER = re.compile(rf"^(?P<stem>.+?)[ ._-]{_WORDS}(?:[ ._-]?\d+)?$", re.IGNORECASE)
_BEFORE = re.compile(rf"^{_WORDS}[ ._-](?P<stem>.+)$", re.IGNORECASE)
_SURE = re.compile(r"[ ._-](?:masks?|gt|ground[_-]?truth)(?:[ ._-]?\d+)?$", re.IGNORECASE)
_OF_IMAGE = re.compile(r"^(?:(?:image|img|rgb)[ ._-](?P<a>.+)|(?P<b>.+?)[ ._-](?:image|img|rgb))$", re.IGNORECASE)


class Place(NamedTuple):
    """A file, and the names of the folders between its class and itself, the outermost first."""

    path: Path
    folders: tuple[str, ...]

    @property
    def role(self) -> str:
        """What the folders say that it is: good, bad, mask, unsorted or nothing."""
        return role_of(self.folders)

    @property
    def split(self) -> str:
        """The split that the folders name, or nothing."""
        return split_of(self.folders)


Images = dict[str, list[tuple[tuple[str, ...], Path]]]  # name of an image -> folders and path of each that has it


def masks_among(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Of files in one folder, those that are masks of others, and those that are masks of images not there."""
    stems = {_plain(image.stem) for image in images}
    masks = [image for image in images if any(stem in stems for stem in _bare(image.stem))]
    known = set(masks)
    return masks, [image for image in images if image not in known and _SURE.search(image.stem)]


def match(groups: Iterable[Sequence[Place]], masks: Sequence[Place], log: ScanLog) -> dict[Path, tuple[Path, ...]]:
    """Masks per image; a mask that belongs to none, or to one of several, is logged.

    A mask lies where its image lies, in a folder of masks instead of one of images: ``ground_truth/bad/000.png``
    belongs to ``test/bad/000.png``. Its name may say that it is a mask (``000_mask``). Several masks of one image lie
    in a folder that is named like the image, or are numbered. Where folders do not tell, the name alone decides. Of
    several groups of images, a mask that fits one of an earlier group is not another's.
    """
    named = [_by_name(group) for group in groups]
    masks_of: dict[Path, list[Path]] = defaultdict(list)
    for mask in masks:
        if any(meaning(folder).role == GOOD for folder in mask.folders):
            log.skip(mask.path, "masks of good images are not needed")
            continue
        owners: list[Path] = next((fits for images in named if (fits := _owners(mask, images))), [])
        if len(owners) == 1:
            masks_of[owners[0]].append(mask.path)
        else:
            log.skip(mask.path, "mask that fits images of several folders" if owners else "mask without image")
    return {image: tuple(sorted(paths)) for image, paths in masks_of.items()}


def _by_name(places: Sequence[Place]) -> Images:
    images: Images = defaultdict(list)
    known = [(_telling(folders), path) for path, folders in places]
    for folders, path in known:
        for name in (path.stem, path.name):  # a mask of 000.jpg may be 000.jpg.png
            images[_plain(name)].append((folders, path))
    for folders, path in known:
        if other := _OF_IMAGE.match(path.stem):  # img_000, unless another image is called 000
            same_name = images[_plain(other["a"] or other["b"])]
            if all(place != folders for place, _ in same_name):
                same_name.append((folders, path))
    return images


def _owners(mask: Place, images: Images) -> list[Path]:
    """Images that a mask may belong to, the best fit only."""
    # Without folders of masks; and with what these are called besides: bad of bad_mask.
    bare = _telling(folder for folder in mask.folders if meaning(folder).role != MASK)
    full = _telling("".join(_bare(folder)[:1]) if meaning(folder).role == MASK else folder for folder in mask.folders)
    stems = [_plain(mask.path.stem), *_bare(mask.path.stem)]
    for folders in dict.fromkeys((full, bare)):
        tries = [(stem, folders) for stem in stems]
        if folders:
            tries.append((folders[-1], folders[:-1]))  # 000/0.png, 000/1.png
        for stem, above in tries:
            if fits := [image for place, image in images.get(stem, ()) if place == above]:
                return fits
    fits = [image for stem in stems for place, image in images.get(stem, ()) if set(bare) <= set(place)]
    return list(dict.fromkeys(fits))


def _telling(folders: Iterable[str]) -> tuple[str, ...]:
    """Names of folders that tell images of one class apart: kinds of defects, lots of one kind."""
    known = [(folder, meaning(folder)) for folder in folders if folder]
    return tuple(_plain(folder) for folder, meant in known if meant.role or (meant.rest and not meant.pictures))


def _bare(stem: str) -> list[str]:
    """``scratch`` of ``scratch_mask`` or ``mask_scratch``, nothing of ``ground_truth``."""
    return [_plain(parts["stem"]) for pattern in (_AFTER, _BEFORE) if (parts := pattern.match(stem))]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
