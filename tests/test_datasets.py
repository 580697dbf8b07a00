"""pack of Pascal VOC and COCO, and every kind of bad input in them."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from packing import by_key, classes, halves, index_png, mask_of, meta, pictures, reasons, run, write

from ldm_sg.data import cocostuff
from ldm_sg.data import pack as module
from ldm_sg.data.datasets import VOC_CLASSES
from ldm_sg.data.sources import make_key
from ldm_sg.errors import InputError

# Pascal VOC


def voc_object(name: str, xmin, ymin, xmax, ymax, more: str = "") -> str:
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def voc_xml(root: Path, stem: str, *objects: str, size: tuple[int, int] = (32, 16)) -> Path:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return write(root / "Annotations" / f"{stem}.xml", f"<annotation>\n {head}\n{''.join(objects)}</annotation>")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    pictures(root / "JPEGImages", "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    voc_xml(
        root,
        "a",
        voc_object("person", 11, 3, 16, 12, "<difficult>1</difficult>" + part),  # 10, 2, 16, 12
        voc_object("cat", 1, 1, 8, 16),  # 0, 0, 8, 16: left of the square
        voc_object("cat", 21.5, 1, 32, 8),  # 20.5, 0, 32, 8
    )
    voc_xml(root, "b")
    voc_xml(root, "c", voc_object("dog", 9, 1, 24, 16))  # the square itself
    voc_xml(root, "d", voc_object("aeroplane", 10, 1, 10, 1))  # one pixel
    for stem in "ac":
        index_png(root / "SegmentationClass" / f"{stem}.png", halves(15, 255), palette=True)
    for kind, split, stems in (("Main", "train", "ab"), ("Main", "val", "cd"), ("Segmentation", "train", "ac")):
        folder = root / "ImageSets" / kind
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))
    write(root / "ImageSets" / "Main" / "cat_train.txt", "a  1\nb -1\n")
    return root


def test_voc(voc, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert run(voc, dst).images == 4
    assert "20 classes, 5 boxes, 1 images without boxes, 2 masks, 0 skipped" in capsys.readouterr().out
    person, cat, dog, aeroplane = (VOC_CLASSES.index(name) for name in ("person", "cat", "dog", "aeroplane"))
    assert (aeroplane, cat, dog, person) == (0, 7, 11, 14)
    assert meta(dst, "a.jpg") == {"labels": [cat, person], "boxes": [[1, 1, 4, 6, person], [6.25, 0, 8, 4, cat]]}
    assert meta(dst, "b.jpg") == {"labels": [], "boxes": []}
    assert meta(dst, "c.jpg") == {"labels": [dog], "boxes": [[0, 0, 8, 8, dog]]}
    assert meta(dst, "d.jpg") == {"labels": [aeroplane], "boxes": [[0.5, 0, 1, 0.5, aeroplane]]}
    got = by_key(dst)
    for name in ("a.jpg", "c.jpg"):
        assert np.array_equal(mask_of(got[make_key(name)]), halves(15, 255)[:8, 12:20])
    assert got[make_key("b.jpg")].mask is None and all(sample.cls is None for sample in got.values())
    assert classes(dst) == {"classes": [*VOC_CLASSES], "mask_classes": ["background", *VOC_CLASSES]}


@pytest.mark.parametrize(
    ("split", "stems"),
    [("train", "ab"), ("val", "cd"), ("Segmentation/train", "ac"), ("Main/train", "ab"), ("cat_train", "a")],
)
def test_voc_splits(voc, tmp_path, split, stems):
    run(voc, tmp_path / "dst", split=split)
    assert set(by_key(tmp_path / "dst")) == {make_key(f"{stem}.jpg") for stem in stems}


def test_voc_split_that_is_wrong(voc, tmp_path):
    for split, message in (("trian", "did you mean 'train'"), ("../../secret", "choose one of: Main/cat_train")):
        with pytest.raises(InputError, match=message):
            run(voc, tmp_path / "dst", split=split)
    write(voc / "ImageSets" / "Main" / "lost.txt", "x\ny\n")
    with pytest.raises(InputError, match="--split lost: none of its 2 images is in"):
        run(voc, tmp_path / "dst", split="lost")
    for path in voc.glob("ImageSets/*/*.txt"):
        path.unlink()
    with pytest.raises(InputError, match=r"no such list in .*ImageSets"):
        run(voc, tmp_path / "dst", split="train")
    assert not (tmp_path / "dst").exists()


def test_voc_other_names_follow_the_twenty_or_stand_alone(voc, tmp_path):
    voc_xml(voc, "b", voc_object("zebra", 9, 1, 24, 16), voc_object("apple", 9, 1, 24, 16))
    run(voc, tmp_path / "mixed")
    assert classes(tmp_path / "mixed") == {"classes": [*VOC_CLASSES, "apple", "zebra"]}
    assert meta(tmp_path / "mixed", "b.jpg")["labels"] == [20, 21]
    for stem in "acd":
        voc_xml(voc, stem)
    run(voc, tmp_path / "own")
    assert classes(tmp_path / "own") == {"classes": ["apple", "zebra"]}


BOMB = '<!DOCTYPE a [<!ENTITY a0 "boom">{}]>'.format(
    "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(12))
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB + "<annotation><object><name>&a12;</name></object></annotation>", "DOCTYPE"),
        ('<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation>&f;</annotation>', "DOCTYPE"),
        ("<annotation><object>", "malformed: no element found"),
        ("", "malformed"),
        ('<?xml version="1.0" encoding="nothing"?><annotation/>', "malformed"),
        ("<annotation>&f;</annotation>", "malformed: undefined entity"),
        ("<html></html>", "not VOC's <annotation>"),
        ("<annotation><object><name>cat</name></object></annotation>", "object 0 of its XML has no bndbox"),
        (f"<annotation>{voc_object('cat', 'one', 1, 2, 2)}</annotation>", "object 0 of its XML has no bndbox"),
        (f"<annotation>{voc_object(' ', 1, 1, 2, 2)}</annotation>", "object 0 of its XML has no name"),
        ("<annotation>" + " " * 2**22 + "</annotation>", "more than 4,194,304"),
        (None, "no a.xml"),
    ],
)
def test_voc_xml_that_cannot_be_used(voc, tmp_path, content, reason):
    path = voc / "Annotations" / "a.xml"
    path.unlink()
    if content is not None:
        write(path, content)
    start = time.monotonic()
    with pytest.raises(InputError, match="1 of 4 images could not be used"):
        run(voc, tmp_path / "dst")
    assert run(voc, tmp_path / "dst", max_skipped=0.3).images == 3 and time.monotonic() - start < 5
    assert list(reasons(tmp_path / "dst")) == ["a.jpg"] and reason in reasons(tmp_path / "dst")["a.jpg"]


def test_voc_pieces_that_do_not_fit(voc, tmp_path, capsys):
    voc_xml(voc, "a", size=(16, 32))
    voc_xml(voc, "nobody")
    write(voc / "ImageSets" / "Segmentation" / "all.txt", "a\nb\nc\nx\n")
    run(voc, tmp_path / "dst", max_skipped=0.3)
    assert "1 XMLs match no image" in capsys.readouterr().out
    assert reasons(tmp_path / "dst") == {"a.jpg": "its boxes are of 16 x 32 pixels, the image has 32 x 16"}
    run(voc, tmp_path / "seg", split="Segmentation/all", max_skipped=0.8)
    assert "1 XMLs match no image" in capsys.readouterr().out  # d's belongs to an image that the list leaves out
    got = reasons(tmp_path / "seg")
    assert set(got) == {"a.jpg", "b.jpg", "x"} and "not in JPEGImages" in got["x"] and "no mask b.png" in got["b.jpg"]
    for path in voc.glob("Annotations/[abcd].xml"):
        path.unlink()
    with pytest.raises(InputError, match="none of the 4 images has an XML of its name"):
        run(voc, tmp_path / "dst2")


# COCO


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    pictures(tmp_path / "images", "001.jpg", "002.jpg", "003.jpg")
    content = {
        "info": {},
        "images": [{"id": 10 + i, "file_name": f"00{i}.jpg", "width": 32, "height": 16} for i in (1, 2, 3)],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"image_id": 11, "category_id": 17, "bbox": [10, 2, 6, 10], "iscrowd": 0, "segmentation": [[1, 2]]},
            {"image_id": 11, "category_id": 90, "bbox": [20.5, 0, 20, 8]},
            {"image_id": 11, "category_id": 1, "bbox": [8, 0, 16, 16], "iscrowd": 1},
            {"image_id": 13, "category_id": 1, "bbox": [8, 0, 16, 16]},
        ],
    }
    return write(tmp_path / "instances.json", content)


def test_coco(coco, tmp_path, capsys):
    dst = tmp_path / "dst"
    run(tmp_path / "images", dst, annotations=coco, shard_size=2)
    out = capsys.readouterr().out
    assert "3 classes, 3 boxes, 1 crowd boxes left out, 1 images without boxes, 0 skipped" in out
    assert meta(dst, "001.jpg") == {"labels": [1, 2], "boxes": [[1, 1, 4, 6, 1], [6.25, 0, 8, 4, 2]]}
    assert meta(dst, "002.jpg") == {"labels": [], "boxes": []}
    assert meta(dst, "003.jpg") == {"labels": [0], "boxes": [[0, 0, 8, 8, 0]]}
    assert classes(dst) == {"classes": ["person", "cat", "toothbrush"]}
    run(dst, tmp_path / "again")
    assert classes(tmp_path / "again") == classes(dst) and meta(tmp_path / "again", "001.jpg") == meta(dst, "001.jpg")
    with (dst / "000001.tar").open("ab") as shard:
        shard.write(bytes(512))
    with pytest.raises(InputError, match=r"belongs to another config: settings\.source\."):
        run(dst, tmp_path / "again")


def change(path: Path, part: str, number: int, **fields) -> Path:
    content = json.loads(path.read_text())
    content[part][number].update(fields)
    return write(path, content)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("annotations", {"category_id": 5}, r"annotations\[0\] should have image_id and category_id that exist"),
        ("annotations", {"image_id": 99}, r"annotations\[0\] should have image_id"),
        ("annotations", {"bbox": [1, 2, 3]}, r"annotations\[0\] .* a bbox \[x, y, width, height\]"),
        ("annotations", {"bbox": ["1", "2", "3", "4"]}, r"annotations\[0\]"),
        ("annotations", {"bbox": [10**400, 2, 3, 4]}, r"annotations\[0\]"),
        ("categories", {"id": 17}, r"categories\[2\] should have a number of its own"),
        ("categories", {"id": "x"}, r"categories\[0\] should have a number of its own"),
        ("images", {"file_name": "002.jpg"}, "3 images, but only 2 file names"),
    ],
)
def test_bad_coco_entries(coco, tmp_path, part, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path / "images", tmp_path / "dst", annotations=change(coco, part, 0, **fields))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and not (tmp_path / "dst").exists()


def test_coco_without_its_lists(coco, tmp_path):
    content = json.loads(coco.read_text())
    del content["annotations"]
    with pytest.raises(InputError, match="COCO's form, but without a list of annotations; expected COCO's instances"):
        run(tmp_path / "images", tmp_path / "dst", annotations=write(coco, content))


def test_a_list_takes_some_images_of_a_folder(coco, tmp_path, capsys):
    """As COCO_20K is chosen from COCO's training images."""
    pictures(tmp_path / "images", "my photo.jpg")
    names = write(tmp_path / "some.txt", "\ufeff001\nmy photo.jpg\n\nimages/003.jpg\n004\n")
    beside = {"annotations": coco, "split": str(names)}
    run(tmp_path / "images", tmp_path / "dst", **beside, max_skipped=0.3)
    assert set(by_key(tmp_path / "dst")) == {make_key(name) for name in ("001.jpg", "my photo.jpg", "003.jpg")}
    out = capsys.readouterr().out
    assert "1 skipped" in out and "match no image" not in out
    assert reasons(tmp_path / "dst") == {"004": f"in the list of --split {names}, but not in images/"}
    run(tmp_path / "images", tmp_path / "all", annotations=coco)
    for name in ("001.jpg", "003.jpg", "my photo.jpg"):
        assert meta(tmp_path / "dst", name) == meta(tmp_path / "all", name)
    write(names, "001\n")
    with pytest.raises(InputError, match=r"belongs to another config: settings\.source\."):
        run(tmp_path / "images", tmp_path / "dst", **beside)


def test_coco_stuff_maps(coco, tmp_path, capsys):
    """Chosen classes of COCO-Stuff's hierarchy, by their number in the pixel maps."""
    wanted = {  # number - 1 in COCO-Stuff's list of labels
        **{0: "person-things", 1: "vehicle-things", 16: "animal-things", 58: "food-things", 71: "electronic-things"},
        **{105: "sky-stuff", 123: "plant-stuff", 148: "ground-stuff", 154: "water-stuff", 181: "solid-stuff"},
        **{94: "building-stuff", 170: "wall-stuff", 130: "textile-stuff", 112: "structural-stuff"},
    }
    indices = np.resize([*wanted, 255], (8, 8))
    for i in (1, 2, 3):
        index_png(tmp_path / "maps" / f"00{i}.png", np.pad(np.kron(indices, np.ones((2, 2))), ((0, 0), (8, 8))))
    dst = tmp_path / "dst"
    run(tmp_path / "images", dst, annotations=coco, masks=tmp_path / "maps", merge="cocostuff27")
    assert "3 masks" in capsys.readouterr().out
    names = np.array([*cocostuff.NAMES, *[""] * 228, "ignored"])
    got = names[mask_of(by_key(dst)[make_key("001.jpg")])]
    assert got.tolist() == np.vectorize({**wanted, 255: "ignored"}.get)(indices).tolist()
    assert classes(dst)["mask_classes"] == list(cocostuff.NAMES) and len(classes(dst)["mask_classes"]) == 27
    index_png(tmp_path / "maps" / "002.png", halves(0, 182))
    run(tmp_path / "images", tmp_path / "odd", masks=tmp_path / "maps", merge="cocostuff27", max_skipped=0.5)
    assert reasons(tmp_path / "odd") == {"002.jpg": "its mask has index 182, which --merge does not know"}


def test_the_merge_is_a_whole_table():
    assert len(cocostuff.TABLE) == 256 and set(cocostuff.TABLE[:182]) == set(range(27))
    assert set(cocostuff.TABLE[182:255]) == {-1} and cocostuff.TABLE[255] == 255
    assert all(coarse < 12 for coarse in cocostuff.TABLE[:91]) and all(c >= 12 for c in cocostuff.TABLE[91:182])


# both


def test_flags_that_do_not_belong(voc, coco, tmp_path):
    src, dst = tmp_path / "images", tmp_path / "dst"
    index_png(tmp_path / "maps" / "001.png", halves(0, 1))
    paths = {"annotations": coco, "masks": tmp_path / "maps"}
    write(tmp_path / "list.txt", "images/001.jpg\n")
    run(src, tmp_path / "packed")
    for source, options, message in (
        (
            src,
            {"split": "train"},
            "--split belongs to .*, with --annotations or --masks, or to a Pascal VOC folder .with JPEGImages",
        ),
        (
            src,
            {**paths, "split": "train"},
            "--split train: cannot be read as a list of images: No such file or directory",
        ),
        (
            src,
            {**paths, "split": str(write(tmp_path / "nobody.txt", "x\n"))},
            "none of its 1 images is in .*images, where '00..jpg' is; the first: 'x'",
        ),
        (
            src,
            {**paths, "split": str(write(tmp_path / "blank.txt", "\n"))},
            "none of its 0 images is in .*images",
        ),
        (src, {"merge": "cocostuff27"}, "--merge belongs to an image folder .*, with --masks; .*images is none"),
        (src, {"annotations": coco, "ignore_index": 3}, "--ignore-index belongs to an image folder .*, with --masks"),
        (src, {**paths, "merge": "cocostuff"}, "--merge 'cocostuff': did you mean 'cocostuff27'"),
        (src, {**paths, "ignore_index": 256}, "ignore_index=256: from 0 to 255"),
        (src, {**paths, "masks": tmp_path / "none"}, "the masks' folder .*none is not there"),
        (
            src,
            {**paths, "masks": voc / "SegmentationClass"},
            "none of its 2 PNGs is called like an image of .*00.\\.png",
        ),
        (src, {"annotations": tmp_path / "instance.json"}, "instance.json: cannot be read: No such file"),
        (voc, {"annotations": coco}, "--annotations belongs to an image folder that is not Pascal VOC's; .* is none"),
        (voc, {"masks": tmp_path / "maps"}, "--masks belongs to an image folder that is not Pascal VOC's; .* is none"),
        (tmp_path / "list.txt", paths, "--annotations belongs to an image folder .*list.txt is none"),
        (
            tmp_path / "packed",
            {"masks": tmp_path / "maps"},
            "holds shards: boxes and masks are read beside an image folder",
        ),
        (f"{tmp_path}/packed/*.tar", {"split": "train"}, "--split belongs to an image folder .* with --annotations"),
    ):
        with pytest.raises(InputError, match=message):
            run(source, dst, **options)
        assert not dst.exists()
    assert run(src, dst, masks=tmp_path / "maps", max_skipped=0.7).images == 1


def test_a_second_run_does_nothing_and_a_changed_source_is_another(voc, coco, tmp_path, monkeypatch):
    images, maps = tmp_path / "images", tmp_path / "maps"
    for i in (1, 2, 3):
        index_png(maps / f"00{i}.png", halves(0, i))
    beside = {"annotations": coco, "masks": maps, "merge": "cocostuff27"}
    run(voc, tmp_path / "voc")
    run(images, tmp_path / "coco", **beside)
    with monkeypatch.context() as patch:
        patch.setattr(module, "pack_item", lambda *a: pytest.fail("made again"))
        assert run(voc, tmp_path / "voc").images == 4 and run(images, tmp_path / "coco", **beside).images == 3
    for source, dst, options in ((voc, tmp_path / "voc", {}), (images, tmp_path / "coco", beside)):
        before = (dst / "000000.tar").read_bytes()
        (dst / "000000.tar").unlink()
        run(source, dst, **options)
        assert (dst / "000000.tar").read_bytes() == before
    other = pytest.raises(InputError, match=r"belongs to another config: settings\.source\.")
    for options in ({}, {**beside, "merge": None}, {**beside, "ignore_index": 1}, {"masks": maps}):
        with other:
            run(images, tmp_path / "coco", **options)
    with other:
        run(voc, tmp_path / "voc", split="train")
    change(coco, "annotations", 0, bbox=[1, 2, 3, 4])
    voc_xml(voc, "b", voc_object("dog", 1, 2, 3, 4))
    for source, dst, options in ((images, "coco", beside), (voc, "voc", {})):
        with other:
            run(source, tmp_path / dst, **options)
