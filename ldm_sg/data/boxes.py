"""Boxes as data sets ship them (COCO's instances JSON, a plain JSON, Pascal VOC's XML) -> `Boxes`, one an image."""

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ldm_sg.data.images import BadImage, Size, fitted, part_of, sides
from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping

EXPECTED = (
    "expected COCO's instances (lists of images, annotations and categories) or "
    '{"FILE NAME": [[x0, y0, x1, y1, label], ...], ...}'
)
_PLAIN = 'expected [x0, y0, x1, y1, label] or {"xyxy": [x0, y0, x1, y1], "label": none, a name or 0, 1, ...}'
_MAX_XML = 2**22  # bytes; VOC's largest file has 2**14
_WRONG = (AttributeError, KeyError, OverflowError, TypeError, ValueError)  # what reading an unexpected form raises


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes of one image, 40 bytes each."""

    flat: array  # float64 [5 n]: x0, y0, x1, y1 in pixels from the upper left corner (x1, y1 exclusive), label
    size: tuple[int, int] | None = None  # width, height of the image that they were drawn in, where it is known

    def meta(self) -> dict[str, Any]:
        """What KEY.json holds, in the image's own pixels: `boxes` and their `labels`."""
        rows = [[*self.flat[i : i + 4], int(self.flat[i + 4])] for i in range(0, len(self.flat), 5)]
        return {"labels": sorted({row[4] for row in rows}), "boxes": rows}


@dataclass
class Annotations:
    """The boxes of a data set, by the name of their image."""

    images: dict[str, Boxes]
    classes: list[str] = field(default_factory=list)  # names of the labels 0, 1, ..., where they have names
    crowds: int = 0  # COCO's boxes around crowds, left out


def read_json(path: Path) -> Annotations:
    """COCO's instances or a plain JSON; InputError, naming what is expected, where it is neither."""
    content = read_mapping(path, pairs=_without_outline)
    try:
        if isinstance(content.get("images"), list) and not content.keys().isdisjoint(("annotations", "categories")):
            return _coco(content)
        return _plain(content)
    except ValueError as err:
        raise InputError(f"--annotations {path}: {err}") from err


def _without_outline(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """COCO's outlines are nine tenths of its JSON and are not wanted: each is dropped as soon as it is read. A name that
    comes twice would lose what it had first."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in one mapping twice")
    entry.pop("segmentation", None)
    return entry


def _coco(content: dict[str, Any]) -> Annotations:
    """Category ids become 0, 1, ... in their order; [x, y, width, height] becomes corners; crowds are left out."""
    missing = [part for part in ("annotations", "categories") if not isinstance(content.get(part), list)]
    if missing:
        raise ValueError(f"COCO's form, but without a list of {missing[0]}; {EXPECTED}")
    names: dict[int, str] = {}
    images: dict[int, tuple[str, Boxes]] = {}

    def category(entry: dict[str, Any]) -> None:
        names[_new(entry["id"], names)] = str(entry["name"])

    def image(entry: dict[str, Any]) -> None:
        size = (int(entry.get("width") or 0), int(entry.get("height") or 0))
        boxes = Boxes(array("d"), size if min(size) > 0 else None)
        images[_new(entry["id"], images)] = (str(entry["file_name"]), boxes)

    def box(entry: dict[str, Any]) -> int:
        if entry.get("iscrowd"):
            return 1
        x, y, width, height = entry["bbox"]
        images[entry["image_id"]][1].flat.extend((x, y, x + width, y + height, index[entry["category_id"]]))
        return 0

    _each(content, "categories", "a number of its own as id and a name", category)
    index = {number: i for i, number in enumerate(sorted(names))}
    _each(content, "images", "a number of its own as id and a file_name", image)
    known = "image_id and category_id that exist and a bbox [x, y, width, height] in pixels"
    crowds = _each(content, "annotations", known, box)
    by_name = dict(images.values())
    if len(by_name) < len(images):
        raise ValueError(f"{len(images)} images, but only {len(by_name)} file names")
    return Annotations(by_name, [names[number] for number in index], crowds)


def _each(content: dict[str, Any], part: str, expected: str, read: Callable[[Any], int | None]) -> int:
    """The sum of read(entry) over `content[part]`; ValueError naming the first entry that is not as expected."""
    total = 0
    for number, entry in enumerate(content[part]):
        try:
            total += read(entry) or 0
        except _WRONG:
            raise ValueError(f"{part}[{number}] should have {expected}: {_short(entry)}") from None
    return total


def _new(number: Any, there: dict[int, Any]) -> int:
    if type(number) is not int or number in there:
        raise ValueError(number)
    return number


def _plain(content: dict[str, Any]) -> Annotations:
    """{"FILE NAME": [box, ...], ...}; labels that are names are numbered in alphabetical order."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for name, entries in content.items():
        if not isinstance(entries, list):
            raise ValueError(f"{_short(name)} has no list of boxes; {EXPECTED}")
        rows[name] = [_plain_box(name, number, entry) for number, entry in enumerate(entries)]
    labels = {row[4] for boxes in rows.values() for row in boxes}
    classes = sorted(label for label in labels if isinstance(label, str))
    if classes and len(classes) < len(labels):
        raise ValueError(f"some labels are names ({classes[0]!r}), others are numbers or missing: choose one way")
    index = {label: i for i, label in enumerate(classes)} if classes else {label: label for label in labels}
    flat = {name: [v for row in boxes for v in (*row[:4], index[row[4]])] for name, boxes in rows.items()}
    return Annotations({name: Boxes(array("d", values)) for name, values in flat.items()}, classes)


def _plain_box(name: str, number: int, entry: Any) -> tuple[Any, ...]:
    """x0, y0, x1, y1, label (a name, or a number; 0 where there is none)."""
    corners, label = entry, 0
    if isinstance(entry, dict) and "xyxy" in entry and ("label" in entry or len(entry) == 1):
        corners, label = entry["xyxy"], entry.get("label", 0)
    elif isinstance(entry, list) and len(entry) == 5:
        *corners, label = entry
    try:
        if not all(type(value) in (int, float) for value in corners):
            raise ValueError
        if type(label) not in (int, str) or (isinstance(label, int) and not 0 <= label < 2**31):
            raise ValueError
        x0, y0, x1, y1 = map(float, corners)
    except _WRONG:
        raise ValueError(f"box {number} of {_short(name)} is {_short(entry)}: {_PLAIN}") from None
    return x0, y0, x1, y1, label


def _short(entry: Any) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 80 else text[:77] + "..."


def read_xml(data: bytes) -> tuple[list[tuple[str, list[float]]], tuple[int, int] | None]:
    """A Pascal VOC annotation -> (name, [x0, y0, x1, y1]) of its objects, and the image's width and height where they
    are given. VOC counts pixels from 1 and its last one belongs to the box: x0 = xmin - 1, x1 = xmax here.

    Objects marked difficult or truncated are kept; parts of an object (VOC's heads and hands) are not objects. Raises
    BadImage where it is not such an XML."""
    root = _parse(data)
    if root.tag != "annotation":
        raise BadImage(f"its XML is a <{root.tag[:40]}>, not VOC's <annotation>")
    objects = []
    for number, entry in enumerate(root.findall("object")):
        name = (entry.findtext("name") or "").strip()
        ends = [entry.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = (float(end) for end in ends if end is not None)
        except ValueError:
            raise BadImage(f"object {number} of its XML has no bndbox with xmin, ymin, xmax, ymax") from None
        if not name:
            raise BadImage(f"object {number} of its XML has no name")
        objects.append((name, [x0 - 1, y0 - 1, x1, y1]))
    try:
        size = (int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0))
    except ValueError:
        size = (0, 0)
    return objects, size if min(size) > 0 else None


def _parse(data: bytes) -> ElementTree.Element:
    """XML without a document type: that is where entities, which read files or grow without end, are declared."""
    if len(data) > _MAX_XML:
        raise BadImage(f"its XML has {len(data):,} bytes, more than {_MAX_XML:,}")
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, LookupError, ValueError) as err:  # the last two: encodings that are not known
        raise BadImage(f"its XML is malformed: {err}") from None


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, *declaration: Any) -> None:
        raise BadImage("its XML has a DOCTYPE, which may hide entities: VOC's have none")


def crop_meta(meta: dict[str, Any], original: tuple[int, int], size: Size, crop: bool = True) -> dict[str, Any]:
    """A sample's json after `crop_resize`, or without `crop` `fit_resize`: boxes in the new pixels, clipped; those that are
    cropped away are left out, and so is a label all of whose boxes are. Raises BadImage where `boxes` is not a list of [x0, y0, x1, y1, label]."""
    if not isinstance(meta, dict) or "boxes" not in meta:
        return meta
    part = part_of(*original, size) if crop else (0, 0, *original)
    new = sides(size) if crop else fitted(*original, size)
    start, old = part[:2], (part[2] - part[0], part[3] - part[1])
    kept = []
    try:
        for *corners, label in meta["boxes"]:
            moved = [(x - start[i % 2]) * new[i % 2] / old[i % 2] for i, x in enumerate(corners)]
            box = [min(max(corner, 0.0), float(new[i % 2])) for i, corner in enumerate(moved)]
            x0, y0, x1, y1 = box
            if x0 < x1 and y0 < y1:
                kept.append([*box, label])
        gone = {box[4] for box in meta["boxes"]} - {box[4] for box in kept}
        labels = {"labels": [label for label in meta["labels"] if label not in gone]} if "labels" in meta else {}
    except (TypeError, ValueError, OverflowError) as err:
        raise BadImage("its json has boxes that are not [x0, y0, x1, y1, label], or no list of labels") from err
    return {**meta, **labels, "boxes": kept}


def count_empty(meta: dict[str, Any], size: tuple[int, int]) -> int:
    """How many boxes of a sample's json have no area inside an image of `size` = (width, height); NaN has none."""
    (width, height), boxes = size, meta.get("boxes", ()) if isinstance(meta, dict) else ()
    return sum(not (max(x0, 0) < min(x1, width) and max(y0, 0) < min(y1, height)) for x0, y0, x1, y1, _ in boxes)
