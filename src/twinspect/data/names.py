"""What a name says about the images behind it: good, defect or mask; training, calibration or test.

People name folders, files and cells of a table in many languages and spellings. A name is cut into words
(``BottleNG-01`` into bottle, ng, 01), words that say something are looked up, and what is left names the product.
A negation turns a word round (``not_ok``, ``defect-free``, ``unbroken``). Where words disagree, mask wins over defect
and defect over good: a good image that is left out costs little, a defect that is learnt as good spoils the model.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from twinspect.types import TEST

GOOD, BAD, MASK, UNSORTED = "good", "bad", "mask", "unsorted"


class Meaning(NamedTuple):
    """What a name says."""

    role: str = ""  # good, bad (defects), mask, unsorted (nobody has judged these images), or empty
    split: str = ""  # train, calibration, test, or empty
    rest: str = ""  # the words that say neither, in lower case: a product, or a kind of defect
    plain: bool = False  # whether the rest is no more than a word for images, a lot or a camera (images, lot2)
    pictures: bool = False  # whether it is no more than a word for images

    @property
    def says(self) -> bool:
        """Whether it says anything of what lies behind it."""
        return bool(self.role or self.split)

    @property
    def is_kind(self) -> bool:
        """Whether it says nothing that is known, so that it names a kind of defects, or a product."""
        return not self.says and not self.plain


# Words are joined to longer ones: defective, Fehlerteile.
_BAD_START = re.compile(r"defe[ck]t|anomal(?!ib)|fehler|schlecht|ausschuss|mangel|beschae?dig|difett|uszkodz|дефект")
_GLUED_NOT = ("un", "non", "not", "no", "nicht")
_FREE = ("free", "less", "frei")
_TURNED = {GOOD: BAD, BAD: GOOD}
# Often written letter by letter. German i.O., n.i.O.: "in Ordnung", "nicht in Ordnung".
_SPELLED = {"io": GOOD, "ok": GOOD, "nio": BAD, "nok": BAD, "ng": BAD, "ko": BAD}
_LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"})  # they are not composed
_WORD = re.compile(r"\d+|[a-z]+|[^\W\d_a-z]+")  # Latin letters end where others begin: NG品
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)


_TABLE = tomllib.loads(files("twinspect").joinpath("data/words.toml").read_text(encoding="utf-8"))
_ROLES_OF_FILES, _more, _SPLITS = (
    {word: meant for meant, words in _TABLE[name].items() for word in words.split()}
    for name in ("roles", "roles_of_folders", "splits")
)
_ROLES_OF_FOLDERS = _ROLES_OF_FILES | _more
_PICTURES, _lots = (frozenset(_TABLE["plain"][name].split()) for name in ("pictures", "lots"))
_PLAIN = _PICTURES | _lots
_ANYWHERE = [(role, words.split()) for role, words in _TABLE["anywhere"]["words"]]
_NEGATIONS, _TASKS = (frozenset(_TABLE["grammar"][name].split()) for name in ("not", "tasks"))


@lru_cache(maxsize=1 << 14)
def meaning(name: str) -> Meaning:
    """What the name of a folder, or the text of a cell, says."""
    return _meaning(name, _words(_CAMEL.sub(" ", name)), _ROLES_OF_FOLDERS)


@lru_cache(maxsize=1 << 14)
def meaning_of_file(name: str) -> Meaning:
    """What the name of an image file says; serial numbers and hashes say nothing."""
    stem = _UUID.sub(" ", name.rpartition(".")[0] or name)
    chunks = [chunk.strip("0123456789") for chunk in re.split(r"[\W_]+", stem)]
    return _meaning(stem, _words(" ".join(chunk for chunk in chunks if chunk.isalpha())), _ROLES_OF_FILES)


def key(text: str) -> str:
    """Letters and digits of a text in lower case, without accents: names that differ in nothing else are one."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in plain if c.isalnum() and not unicodedata.combining(c))


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", name).casefold().translate(_LETTERS)
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def _meaning(name: str, words: list[str], roles: dict[str, str]) -> Meaning:
    if _TASKS & set(words):  # mvtec_anomaly_detection is a project, and not a folder of anomalies
        return Meaning(rest=" ".join(words))
    roles_seen: set[str] = set()
    split, rest = "", []
    for word, role in _judged(words, roles):
        if role:
            roles_seen.add(role)
        elif word in _SPLITS:
            split = split or _SPLITS[word]
        else:
            rest.append(word)
    split = split or _SPLITS.get(key(name), "")  # held-out
    if anywhere := next((role for role, texts in _ANYWHERE if any(text in name for text in texts)), ""):
        roles_seen.add(anywhere)
    if spelled := _SPELLED.get(key(name)):
        roles_seen, rest = {spelled}, []
    both = {GOOD, BAD} <= roles_seen and MASK not in roles_seen  # good_bad, ok-nok: holds either
    plain = _is_plain(rest)
    if rest and not plain and not split:
        roles_seen.discard(UNSORTED)  # a new_bottle is a product
    role = UNSORTED if both else next((word for word in (MASK, BAD, UNSORTED, GOOD) if word in roles_seen), "")
    return Meaning(role, split, " ".join(rest), plain, bool(rest) and _PICTURES.issuperset(rest))


def _is_plain(rest: list[str]) -> bool:
    """Words for images or lots with their numbers and letters, or a date; a bare number may be a label."""
    dated = all(map(str.isdigit, rest)) and len("".join(rest)) >= 6
    return dated or (
        any(word in _PLAIN for word in rest)
        and all(word in _PLAIN or word.isdigit() or len(word) == 1 for word in rest)
    )


def _judged(words: list[str], roles: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Words with the role each of them has, negations applied; a number after such a word belongs to it."""
    place = 0
    while place < len(words):
        word, after = words[place], words[place + 1 : place + 2]
        role, used = _role(word, roles), 1
        if word in _NEGATIONS and after and (turned := _TURNED.get(_role(after[0], roles))):
            role, used = turned, 2
        elif word == "ground" and after == ["truth"]:
            role, used = MASK, 2
        elif role and after and after[0] in _FREE:
            role, used = _TURNED.get(role, role), 2
        yield word, role
        place += used
        if role and place < len(words) and words[place].isdigit():
            place += 1


def _role(word: str, roles: dict[str, str]) -> str:
    """Role of a word, which may be joined from two: defectfree, unbroken."""
    if word in roles:
        return roles[word]
    for end in _FREE:
        if word.endswith(end) and _role(word.removesuffix(end), roles) == BAD:
            return GOOD
    if _BAD_START.match(word):
        return BAD
    for start in _GLUED_NOT:
        if word.startswith(start) and (turned := _TURNED.get(_role(word.removeprefix(start), roles))):
            return turned
    return ""


@lru_cache(maxsize=1 << 14)
def role_of(folders: tuple[str, ...]) -> str:
    """What the names of the folders above an image say together: mask, else bad, else good, else unsorted.

    A test that its owner keeps private (``test_private``) stays unsorted whatever is in it.
    """
    meanings = [meaning(name) for name in folders]
    roles = {meant.role for meant in meanings}
    private = any(meant.role == UNSORTED and meant.split == TEST for meant in meanings)
    order = (MASK, BAD, UNSORTED) if private else (MASK, BAD, GOOD, UNSORTED)
    return next((role for role in order if role in roles), "")
