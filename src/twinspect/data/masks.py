"""Which mask belongs to which image, by the names of both and of the folders above them."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from twinspect.data.names import GOOD, MASK, meaning
from twinspect.data.scan import ScanLog

_WORDS = r"(?:masks?|maske|gt|ground[_-]?truth|labels?|seg|segmentation|annotations?|anno)"
# 000_mask, 000-mask, 000_mask_0, 000_GT; and mask_000.
_AFTER = re.compile(rf"^(?P<stem>.+?)[ ._-]{_WORDS}(?:[ ._-]?\d+)?$", re.IGNORECASE)
_BEFORE = re.compile(rf"^{_WORDS}[ ._-](?P<stem>.+)$", re.IGNORECASE)
_SURE = re.compile(r"[ ._-](?:masks?|gt|ground[_-]?truth)(?:[ ._-]?\d+)?$", re.IGNORECASE)
_OF_IMAGE = re.compile(r"^(?:(?:image|img|rgb)[ ._-](?P<a>.+)|(?P<b>.+?)[ ._-](?:image|img|rgb))$", re.IGNORECASE)

Place = tuple[Path, tuple[str, ...]]  # a file, and the names of the folders between its class and itself


def masks_among(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Of files in one folder, those that are masks of others, and those that are masks of images not there."""
    stems = {_plain(image.stem) for image in images}
    mine = [image for image in images if any(stem in stems for stem in _bare(image.stem))]
    known = set(mine)
    return mine, [image for image in images if image not in known and _SURE.search(image.stem)]


def match(groups: Iterable[Sequence[Place]], masks: Sequence[Place], log: ScanLog) -> dict[Path, tuple[Path, ...]]:
    """Masks per image; a mask that belongs to none, or to one of several, is logged.

    A mask lies where its image lies, in a folder of masks instead of one of images: ``ground_truth/bad/000.png``
    belongs to ``test/bad/000.png``. Its name may say that it is a mask (``000_mask``). Several masks of one image lie
    in a folder that is named like the image, or are numbered. Where folders do not tell, the name alone decides. Of
    several groups of images, a mask that fits one of an earlier group is not another's.
    """
    names = [_Names(group) for group in groups]
    kinds = {kind for group in names for kind in group.kinds}
    masks_of: dict[Path, list[Path]] = defaultdict(list)
    for path, parts in masks:
        if any(meaning(part).role == GOOD for part in parts):
            in_masks = any(meaning(part).role == MASK for part in parts)
            log.skip(path.parent if in_masks else path, "masks of good images are not needed")
            continue
        hard = _folders(part for part in parts if meaning(part).role != MASK)
        soft = _folders("".join(_bare(part)[:1]) if meaning(part).role == MASK else part for part in parts)
        owners: list[Path] = next((fits for group in names if (fits := group.owners(path, soft, hard))), [])
        if len(owners) == 1:
            masks_of[owners[0]].append(path)
        elif owners:
            log.skip(path, "mask that fits images of several folders")
        elif hard and not kinds & set(hard):
            log.skip(path.parent, "masks of a kind that has no images")
        else:
            log.skip(path, "mask without image")
    return {image: tuple(sorted(paths)) for image, paths in masks_of.items()}


class _Names:
    """Images by the folders that tell them apart, and by their own names."""

    def __init__(self, images: Iterable[Place]) -> None:
        self._exact: dict[tuple[tuple[str, ...], str], list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[tuple[tuple[str, ...], Path]]] = defaultdict(list)
        places = [(path, _folders(parts)) for path, parts in images]
        self.kinds = {folder for _, folders in places for folder in folders}
        for path, folders in places:
            for name in (path.stem, path.name):  # a mask of 000.jpg may be 000.jpg.png
                self._exact[folders, _plain(name)].append(path)
        for path, folders in places:
            if other := _OF_IMAGE.match(path.stem):  # img_000, unless another image is called 000
                self._exact.setdefault((folders, _plain(other["a"] or other["b"])), [path])
        for (folders, stem), paths in self._exact.items():
            self._by_stem[stem] += [(folders, path) for path in paths]

    def owners(self, mask: Path, soft: tuple[str, ...], hard: tuple[str, ...]) -> list[Path]:
        """Images that a mask may belong to, the best fit only.

        ``hard`` are the folders above it that are no folders of masks; ``soft`` has also what folders of masks are
        called besides (``bad`` of ``bad_mask``).
        """
        stems = [_plain(mask.stem), *_bare(mask.stem)]
        for folders in dict.fromkeys((soft, hard)):
            for stem in stems:
                if owners := self._exact.get((folders, stem)):
                    return owners
            if folders and (owners := self._exact.get((folders[:-1], folders[-1]))):  # 000/0.png, 000/1.png
                return owners
        fits = (
            image for stem in stems for folders, image in self._by_stem.get(stem, ()) if set(hard) <= set(folders)
        )
        return list(dict.fromkeys(fits))


def _folders(parts: Iterable[str]) -> tuple[str, ...]:
    """Names of folders that tell images of one class apart: kinds of defects, lots of one kind."""
    known = [(part, meaning(part)) for part in parts if part]
    return tuple(_plain(part) for part, meant in known if meant.role or (meant.rest and not meant.pictures))


def _bare(stem: str) -> list[str]:
    """``scratch`` of ``scratch_mask`` or ``mask_scratch``, nothing of ``ground_truth``."""
    return [_plain(parts["stem"]) for pattern in (_AFTER, _BEFORE) if (parts := pattern.match(stem))]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
