"""Image folders with boxes, masks or both: a Pascal VOC folder, or any folder with a JSON of boxes (COCO's, or a
plain one) and a folder of index PNGs. Boxes are read here, once; an item carries those of its own image."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm_sg.data import cocostuff
from ldm_sg.data.boxes import Annotations, Boxes, read_json, read_xml
from ldm_sg.data.images import BadImage, read_bytes
from ldm_sg.data.sources import (
    FileSource,
    Item,
    LmdbSource,
    ShardSource,
    Source,
    digest,
    files_digest,
    open_folder,
    open_list,
    walk,
)
from ldm_sg.data.tars import is_remote
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import file_sha256

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
MERGES = {"cocostuff27": (cocostuff.NAMES, cocostuff.TABLE)}
_NONE = Boxes(array("d"))
_FOLDER, _VOC = "an image folder that is not Pascal VOC's", "a Pascal VOC folder"
_BELONGS = {
    "annotations": _FOLDER,
    "masks": _FOLDER,
    "merge": f"{_FOLDER}, with --masks",
    "ignore_index": f"{_FOLDER}, with --masks, or to {_VOC} with masks in SegmentationClass/",
    "split": f"{_FOLDER}, with --annotations or --masks, or to {_VOC} (with JPEGImages/ and Annotations/ in it)",
}


@dataclass(frozen=True)
class Beside:
    """What the flags of `pack` say of boxes and masks."""

    annotations: Path | None = None
    masks: Path | None = None
    merge: str | None = None
    ignore_index: int | None = None
    split: str | None = None

    def check(self, src: str, path: Path) -> None:
        """InputError for a flag that is given and says nothing of such a source."""
        said: set[str] = set()
        if _is_voc(path):
            said = {"split", *["ignore_index"] * (path / "SegmentationClass").is_dir()}
        elif path.is_dir() and not _is_lmdb(path):
            said = {"annotations", "masks", *["split"] * bool(self.annotations or self.masks)}
            said |= {"merge", "ignore_index"} if self.masks else set()
        for flag, belongs in _BELONGS.items():
            if getattr(self, flag) is not None and flag not in said:
                raise InputError(f"--{flag.replace('_', '-')} belongs to {belongs}; {src} is none")

    def table(self) -> tuple[int, ...]:
        """[256] what each index of a mask becomes (-1: it must not occur), or () when all stay as they are."""
        if self.merge is not None and self.merge not in MERGES:
            raise InputError(f"--merge {self.merge!r}: {choices(self.merge, MERGES)}")
        if self.merge is None and self.ignore_index is None:
            return ()
        table = list(range(256) if self.merge is None else MERGES[self.merge][1])
        if self.ignore_index is not None:
            table[self.ignore_index] = 255
        return tuple(table)


def open_source(src: str, beside: Beside | None = None, allow_damaged: bool = False) -> Source:
    """What `src` names, with the boxes and masks beside it; InputError when there is nothing. `allow_damaged`: of shards that
    are cut off, what is whole."""
    path, beside = Path(src).expanduser(), beside or Beside()
    try:
        beside.check(src, path)
        source = _open(src, path, beside)
    except OSError as err:  # a folder or list that may not be read
        raise InputError(f"{err.filename or src} cannot be read: {err.strerror or err}") from err
    if isinstance(source, ShardSource):
        source.allow_damaged = allow_damaged
    return source


def _open(src: str, path: Path, beside: Beside) -> Source:
    if _is_lmdb(path):
        return LmdbSource.open(path)
    if _is_voc(path):
        return DatasetSource.open_voc(path, beside)
    if path.is_dir():
        return DatasetSource.open_folder(path, beside) if beside.annotations or beside.masks else open_folder(path)
    if path.is_file() and path.suffix == ".txt":
        return open_list(path)
    if is_remote(src) or path.suffix in (".tar", ".gz", ".tgz") or any(mark in src for mark in "*?[{"):
        return ShardSource.open(src)
    there = "is a file" if path.is_file() else "not found"
    raise InputError(f"source {src!r} {there}: pack takes a folder, a .txt list, an LMDB's folder, or .tar shards")


def _is_lmdb(path: Path) -> bool:
    return (path / "data.mdb").is_file()


def _is_voc(path: Path) -> bool:
    return (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir()


@dataclass
class DatasetSource(FileSource):
    """Images with boxes, masks or both. Sub-folders are no classes here: `classes` are those of the boxes."""

    boxes: dict[str, Boxes] | None = None  # image -> its boxes; an image that is not in there has none
    masks: dict[str, str] = field(default_factory=dict)  # image -> path of its mask
    table: tuple[int, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)  # image -> why it cannot be packed
    others: set[str] = field(default_factory=set)  # images that `--split` leaves out, with and without the suffix

    def item(self, record: str) -> Item:
        boxes = None if self.boxes is None else self.boxes.get(record, _NONE)
        beside = {"mask": self.masks.get(record, ""), "boxes": boxes, "table": self.table}
        return replace(super().item(record), problem=self.problems.get(record, ""), **beside)

    @classmethod
    def of(cls, folder: FileSource, beside: Beside, chosen: list[str] | None) -> "DatasetSource":
        """The folder's images, or those `chosen` by `--split`, with or without the suffix; what it names in vain cannot be
        packed."""
        names, lost, others = folder.names, [], set()
        if chosen is not None:
            wanted = set(chosen)
            names = [name for name in folder.names if not wanted.isdisjoint((name, _stem(name)))]
            lost = sorted(wanted.difference(names, map(_stem, names)))
            left = set(folder.names).difference(names)
            others = left.union(map(_stem, left))
            if not names:
                said = f"none of its {len(wanted)} images is in {folder.root}, where {folder.names[0]!r} is"
                raise InputError(f"--split {beside.split}: {said}; the first: {min(wanted, default='')!r}")
        names = [*names, *lost]
        identity = folder.identity
        if names != folder.names:
            identity = identity | {"images": len(names), "digest": files_digest(folder.root, names)}
        source = cls(identity, len(names), [], folder.ignored, root=folder.root, names=names)
        source.problems = dict.fromkeys(lost, f"in the list of --split {beside.split}, but not in {folder.root.name}/")
        source.others, source.table = others, beside.table()
        return source

    @classmethod
    def open_folder(cls, root: Path, beside: Beside) -> "DatasetSource":
        """Any image folder; what is beside it, and a list of some of its images, goes by the images' relative paths, with
        or without the suffix. Such a list may name the folder too, as COCO_20K's does (train2014/NAME.jpg)."""
        chosen = None
        if beside.split is not None:
            chosen = [line.removeprefix(f"{root.name}/") for line in read_lines(Path(beside.split).expanduser())]
        source = cls.of(open_images(root), beside, chosen)
        if beside.annotations is not None:
            source.add_boxes(beside.annotations.expanduser())
        if beside.masks is not None:
            source.add_masks(beside.masks.expanduser(), beside, required=True)
        return source

    @classmethod
    def open_voc(cls, root: Path, beside: Beside) -> "DatasetSource":
        """A Pascal VOC folder; `--split train` is ImageSets/Main/train.txt, or Segmentation/train.txt where that is
        missing; `--split Segmentation/train` the latter, whose images must have masks. Others may have masks."""
        folder, masks = open_images(root / "JPEGImages"), root / "SegmentationClass"
        path = None if beside.split is None else find_split(root, beside.split)
        source = cls.of(folder, beside, None if path is None else read_split(path))
        source.identity |= {"kind": "voc", "split": f"{path.parent.name}/{path.stem}" if path else None}
        stems = {_stem(name) for name in source.names if name not in source.problems}
        xmls = {_stem(name): name for name in walk_files(root / "Annotations", ".xml")}
        if not xmls.keys() & stems:
            raise InputError(f"{root}: none of the {len(stems)} images has an XML of its name in Annotations/")
        source._add_voc_boxes(root / "Annotations", xmls)
        segmentation = path is not None and path.parent.name == "Segmentation"
        if masks.is_dir() or segmentation:
            source.add_masks(masks, beside, required=segmentation)
            if source.masks and set(source.classes) <= set(VOC_CLASSES):
                source.mask_classes = ["background", *VOC_CLASSES]
        return source

    def add_boxes(self, path: Path) -> None:
        """Gives the images the boxes of a JSON; InputError when it is of none of them."""
        read = read_json(path)
        keys = {name: name if name in read.images else _stem(name) for name in self.names}
        boxes = {name: read.images[key] for name, key in keys.items() if key in read.images}
        if not boxes:
            said = f"{len(read.images)} images, none of them in {self.root}; the first: {next(iter(read.images), '')!r}"
            raise InputError(f"--annotations {path}: it names {said}")
        self.identity["annotations"] = file_sha256(path)
        self._set_boxes(Annotations(boxes, read.classes, read.crowds))
        self._note_unmatched(read.images.keys(), set(keys.values()), "names in the annotations")

    def _add_voc_boxes(self, folder: Path, xmls: dict[str, str]) -> None:
        content = hashlib.sha256()
        objects, sizes = {}, {}
        for name in self.names:
            if name in self.problems:
                continue
            try:
                data = read_bytes(folder / xmls[_stem(name)], "its XML ")
                content.update(f"{name}\t{len(data)}\n".encode("utf-8", "surrogateescape") + data)
                objects[name], sizes[name] = read_xml(data)
            except KeyError:
                self.problems[name] = f"no {_stem(name)}.xml in Annotations/"
            except BadImage as err:
                self.problems[name] = err.reason
        self.identity["annotations"] = content.hexdigest()
        occurring = {name for found in objects.values() for name, _ in found}
        voc = VOC_CLASSES if not occurring or occurring & set(VOC_CLASSES) else ()  # a set of its own in VOC's form
        classes = [*voc, *sorted(occurring.difference(voc))]
        index = {name: i for i, name in enumerate(classes)}
        boxes = {
            name: Boxes(array("d", [v for label, box in found for v in (*box, index[label])]), sizes[name])
            for name, found in objects.items()
        }
        self._set_boxes(Annotations(boxes, classes))
        self._note_unmatched(xmls.keys(), set(map(_stem, self.names)), "XMLs")

    def _set_boxes(self, read: Annotations) -> None:
        self.boxes, self.classes = read.images, read.classes
        self.notes.append(f"{sum(len(boxes.flat) for boxes in read.images.values()) // 5} boxes")
        self._note(read.crowds, "crowd boxes left out")
        filled = sum(len(boxes.flat) > 0 for name, boxes in read.images.items() if name not in self.problems)
        self._note(len(self.names) - len(self.problems) - filled, "images without boxes")

    def add_masks(self, folder: Path, beside: Beside, required: bool) -> None:
        """Gives each image the PNG of its name; where it is `required` and missing, the image cannot be packed."""
        if not folder.is_dir():
            raise InputError(f"the masks' folder {folder} is not there")
        pngs = {_stem(name): name for name in walk_files(folder, ".png")}
        self.masks = {name: str(folder / pngs[_stem(name)]) for name in self.names if _stem(name) in pngs}
        if required and not self.masks:
            said = f"none of its {len(pngs)} PNGs is called like an image of {self.root}"
            raise InputError(f"{folder}: {said}, for example {_stem(self.names[0])}.png")
        for name in self.names if required else ():
            if name not in self.masks:
                self.problems.setdefault(name, f"no mask {_stem(name)}.png in {folder}")
        sizes = [Path(path).stat().st_size for path in self.masks.values()]
        self.identity["masks"] = digest(list(self.masks), sizes)
        self.identity |= {"merge": beside.merge, "ignore_index": beside.ignore_index}
        if beside.merge is not None:
            self.mask_classes = list(MERGES[beside.merge][0])
        self._note(len(self.masks), "masks")
        if required:
            self._note_unmatched(pngs.keys(), set(map(_stem, self.masks)), "masks")

    def _note(self, count: int, what: str) -> None:
        if count > 0:
            self.notes.append(f"{count} {what}")

    def _note_unmatched(self, there: Set[str], used: Set[str], what: str) -> None:
        self._note(len(there - used - self.others), f"{what} match no image")


def open_images(root: Path) -> FileSource:
    """The images of a folder, shuffled with a fixed seed; InputError when there are none."""
    folder = open_folder(root)
    if not isinstance(folder, FileSource):
        raise InputError(f"{root} holds shards: boxes and masks are read beside an image folder")
    return folder


def find_split(root: Path, split: str) -> Path:
    """The list of a VOC split; InputError with what there is."""
    there: dict[str, Path] = {}
    for kind in ("Main", "Segmentation"):
        for path in sorted((root / "ImageSets" / kind).glob("*.txt")):
            there[f"{kind}/{path.stem}"] = path
            there.setdefault(path.stem, path)
    if split not in there:
        raise InputError(f"--split {split!r}: no such list in {root / 'ImageSets'}; {choices(split, there)}")
    return there[split]


def read_split(path: Path) -> list[str]:
    """The images of a VOC list: one a line; in the lists of a class (`cat_train.txt`) those not marked -1."""
    rows = [line.split() for line in read_lines(path)]
    return [row[0] for row in rows if row[1:] != ["-1"]]


def read_lines(path: Path) -> list[str]:
    """The lines of a list of images, less empty ones; InputError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as err:
        raise InputError(f"--split {path}: cannot be read as a list of images: {err.strerror or err}") from err
    return [line.strip() for line in lines if line.strip()]


def walk_files(folder: Path, suffix: str) -> Iterable[str]:
    """Relative paths of the files below `folder` that end like that."""
    others: list[str] = []
    return [name for name in (*walk(folder, others), *others) if name.lower().endswith(suffix)]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 (relative, with / in it)
