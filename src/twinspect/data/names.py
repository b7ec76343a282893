"""What a name says about the images behind it: good, defect or mask; training, calibration or test.

People name folders, files and cells of a table in many languages and spellings. A name is cut into words
(``BottleNG-01`` into bottle, ng, 01), words that say something are looked up, and what is left names the product.
A negation turns a word round (``not_ok``, ``defect-free``, ``unbroken``). Where words disagree, mask wins over defect
and defect over good: a good image that is left out costs little, a defect that is learnt as good spoils the model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from twinspect.types import CALIBRATION, TEST, TRAIN

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
    def is_learnt(self) -> bool:
        """Whether images behind it are learnt as good."""
        return self.role == GOOD or (self.split == TRAIN and not self.role)

    @property
    def is_kind(self) -> bool:
        """Whether it says nothing that is known, so that it names a kind of defects, or a product."""
        return not self.says and not self.plain


# Whole words without accents: English; German; French, Spanish, Italian, Portuguese, Dutch; Polish, Czech, Turkish,
# Russian. Kinds of defects, and words that may as well be a part of a serial number, stand in the second list: they
# count in names of folders and cells, not in names of files.
_ROLES = {
    GOOD: """
        good goods ok okay pass passed accept accepted acceptable normal normals nominal conform conforming compliant
        healthy intact clean cleaned flawless faultless perfect correct
        gut gute guter gutes gutteil gutteile einwandfrei io
        sain saine bon bons bonne bonnes conforme conformes bueno buenos buena buenas buono buoni buona buone
        boa boas bom goed goede goedgekeurd dobry dobre dobra iyi saglam норма годен годные хорошие хороший
    """,
    BAD: """
        bad nok ng defs defective fail fails failed failing failure failures reject rejects rejected rejection
        rejections faulty fault faults flaw flaws flawed invalid abnormal abnormals abnormality abnormalities outlier
        outliers damaged scrap scraps unhealthy noncompliant nonconformity incorrect
        scrapped discard discarded quarantine rework reworked
        kaputt maengel fehlteil fehlteile nio
        mauvais mauvaise mauvaises defaut defauts rebut rebuts casse malo malos mala malas falla fallas fallo fallos
        roto rechazo rechazado rechazados scarto scarti guasto guasti cattivo
        ruim defeito defeitos rejeitado rejeitados fout fouten slecht slechte afgekeurd kapot
        zly zle wada wady wadliwy wadliwe vada vady vadny vadne zmetek zmetky spatny spatne
        kotu hatali kusurlu hasarli брак плохие плохой
    """,
    MASK: """
        mask masks masked maske masken masque masques mascara mascaras maschera maschere gt gts groundtruth
        overlay overlays heatmap heatmaps thumbnail thumbnails thumbs
    """,
    UNSORTED: """
        unsorted unlabeled unlabelled unknown unclassified unchecked unjudged todo new incoming inbox private
        misc miscellaneous pending unsure uncertain inference production
        unsortiert unbekannt neu neue neuer neues
    """,
}
_NOT_OF_FILES = {
    BAD: """
        def ko error errors wrong poor broken damage damages crack cracks cracked scratch scratches scratched dent
        dents dented stain stains stained contamination contaminations contaminated corroded corrosion rust rusty
        torn chipped deformed dirty missing misplaced misaligned misprint misprints blemish blemishes burr burrs
        diseased infected kratzer riss risse
    """,
    MASK: "label labels annotation annotations annot annots anno annos segmentation segmentations truth",
}
# Words are joined to longer ones: defective, Fehlerteile.
_BAD_START = re.compile(r"defe[ck]t|anomal(?!ib)|fehler|schlecht|ausschuss|mangel|beschae?dig|difett|uszkodz|дефект")
_SPLITS = {
    TRAIN: "train training trainset trn",
    CALIBRATION: "val valid validate validation valset calibration calib cal dev holdout heldout",
    TEST: "test testing tests testset tst eval evaluation",
}
_PICTURES = """
    image images img imgs picture pictures pic pics photo photos foto fotos bild bilder data dataset frame frames
    capture captures public set dir folder ordner all seg raw original originals
"""
_LOTS = """
    lot lots batch batches day days date dates session sessions cam cams camera cameras kamera part parts
    reference references ref golden background backup archive tmp temp result results output outputs prediction
    predictions
"""
_NOT = frozenset("no not non without ohne sans sin sem senza kein keine nicht nie bez ikke inte".split())
_GLUED_NOT = ("un", "non", "not", "no", "nicht")
_FREE = ("free", "less", "frei")
_TURNED = {GOOD: BAD, BAD: GOOD}
# Often written letter by letter. German i.O., n.i.O.: "in Ordnung", "nicht in Ordnung".
_SPELLED = {"io": GOOD, "ok": GOOD, "nio": BAD, "nok": BAD, "ng": BAD, "ko": BAD}
_TASKS = frozenset("detection detect inspection recognition classification challenge benchmark".split())
# Chinese, Japanese and Korean have no gaps between words: looked for anywhere, the first that fits counts.
_ANYWHERE = (
    (MASK, "掩膜 掩码 遮罩 标注 標注 マスク 마스크"),
    (GOOD, "无缺陷 無缺陷 无异常 异常なし 異常なし 欠陥なし 정상 양품"),
    (BAD, "不良 不合格 缺陷 瑕疵 异常 異常 欠陥 非良品 不正常 次品 废品 불량 결함 이상"),
    (GOOD, "合格 良品 良好 正常"),
)
_LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"})  # they are not composed
_WORD = re.compile(r"\d+|[a-z]+|[^\W\d_a-z]+")  # Latin letters end where others begin: NG品
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)


def _table(*groups: dict[str, str]) -> dict[str, str]:
    return {word: meaning for group in groups for meaning, words in group.items() for word in words.split()}


_OF_FILES, _SPLIT_OF = _table(_ROLES), _table(_SPLITS)
_IS_PICTURES = frozenset(_PICTURES.split())
_IS_PLAIN = _IS_PICTURES | frozenset(_LOTS.split())
_OF_FOLDERS = _OF_FILES | _table(_NOT_OF_FILES)


@lru_cache(maxsize=1 << 14)
def meaning(name: str) -> Meaning:
    """What the name of a folder, or the text of a cell, says."""
    return _meaning(name, _words(_CAMEL.sub(" ", name)), _OF_FOLDERS)


@lru_cache(maxsize=1 << 14)
def meaning_of_file(name: str) -> Meaning:
    """What the name of an image file says; serial numbers and hashes say nothing."""
    stem = _UUID.sub(" ", name.rpartition(".")[0] or name)
    chunks = [chunk.strip("0123456789") for chunk in re.split(r"[\W_]+", stem)]
    return _meaning(stem, _words(" ".join(chunk for chunk in chunks if chunk.isalpha())), _OF_FILES)


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
        elif word in _SPLIT_OF:
            split = split or _SPLIT_OF[word]
        else:
            rest.append(word)
    split = split or _SPLIT_OF.get(key(name), "")  # held-out
    if anywhere := next((role for role, texts in _ANYWHERE if any(text in name for text in texts.split())), ""):
        roles_seen.add(anywhere)
    if spelled := _SPELLED.get(key(name)):
        roles_seen, rest = {spelled}, []
    both = {GOOD, BAD} <= roles_seen and MASK not in roles_seen  # good_bad, ok-nok: holds either
    plain = _is_plain(rest)
    if rest and not plain and not split:
        roles_seen.discard(UNSORTED)  # a new_bottle is a product
    role = UNSORTED if both else next((word for word in (MASK, BAD, UNSORTED, GOOD) if word in roles_seen), "")
    return Meaning(role, split, " ".join(rest), plain, bool(rest) and _IS_PICTURES.issuperset(rest))


def _is_plain(rest: list[str]) -> bool:
    """Words for images or lots with their numbers and letters, or a date; a bare number may be a label."""
    dated = all(map(str.isdigit, rest)) and len("".join(rest)) >= 6
    return dated or (
        any(word in _IS_PLAIN for word in rest)
        and all(word in _IS_PLAIN or word.isdigit() or len(word) == 1 for word in rest)
    )


def _judged(words: list[str], roles: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Words with the role each of them has, negations applied; a number after such a word belongs to it."""
    place = 0
    while place < len(words):
        word, after = words[place], words[place + 1 : place + 2]
        role, used = _role(word, roles), 1
        if word in _NOT and after and (turned := _TURNED.get(_role(after[0], roles))):
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


def split_of(folders: tuple[str, ...]) -> str:
    """The split that the outermost of the folders above an image names; empty if none does."""
    return next((split for name in folders if (split := meaning(name).split)), "")
