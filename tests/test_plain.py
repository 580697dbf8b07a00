"""pack of images with plain boxes and masks beside them, and every kind of bad input in those."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SHARED
from packing import by_key, classes, halves, index_png, mask_of, meta, pictures, reasons, run, samples, write
from PIL import Image

from ldm_sg.cli import app
from ldm_sg.data.shards import ShardWriter
from ldm_sg.data.sources import make_key
from ldm_sg.errors import InputError


def test_plain_boxes(tmp_path, capsys):
    src = pictures(tmp_path / "src", "a.png", "b/a.png", "b/c.png", "d.png")
    boxes = {
        "a": [[10, 2, 16, 12, "pear"], {"label": "fig", "xyxy": [20.5, 0, 32, 8]}],  # a stem
        "b/c.png": [[8, 0, 24, 16, "fig"], [0, 0, 8, 16, "pear"]],
        "b/a.png": [],
        "gone.png": [[0, 0, 1, 1, "grape"]],
    }
    path, dst = write(tmp_path / "boxes.json", boxes), tmp_path / "dst"
    run(src, dst, annotations=path, shard_size=3, workers=1)
    out = capsys.readouterr().out
    assert "3 classes, 4 boxes, 2 images without boxes, 1 names in the annotations match no image, 0 skipped" in out
    assert classes(dst) == {"classes": ["fig", "grape", "pear"]}
    assert meta(dst, "a.png") == {"labels": [0, 2], "boxes": [[1, 1, 4, 6, 2], [6.25, 0, 8, 4, 0]]}
    assert meta(dst, "b/c.png") == {"labels": [0], "boxes": [[0, 0, 8, 8, 0]]}
    assert meta(dst, "b/a.png") == meta(dst, "d.png") == {"labels": [], "boxes": []}


@pytest.mark.parametrize(("label", "want"), [([], 0), ([3], 3)])
def test_labels_that_are_numbers_or_missing(tmp_path, label, want):
    src = pictures(tmp_path / "src", "a.png")
    run(src, tmp_path / "dst", annotations=write(tmp_path / "b.json", {"a.png": [[8, 0, 24, 16, *label]]}))
    assert meta(tmp_path / "dst", "a.png") == {"labels": [want], "boxes": [[0, 0, 8, 8, want]]}
    assert not (tmp_path / "dst" / "classes.json").exists()


def test_boxes_without_area_are_left_out_and_counted(tmp_path, capsys):
    src, dst = pictures(tmp_path / "src", "a.png"), tmp_path / "dst"
    nan, inf = float("nan"), float("inf")
    odd = [
        [nan, 0, 16, 16, 1],
        [9, 0, nan, 16, 1],
        [40, 0, 50, 9, 1],
        [9, -9, 12, 0, 1],
        [12, 3, 12, 9, 2],
        [14, 3, 12, 9, 2],
    ]
    good = [
        [-50, 4, 16, 99, 3],
        [8, 0, inf, 16, 3],
        [0, 0, 8, 8, 4],
    ]  # clipped twice; cropped away, which is not counted
    path = write(tmp_path / "b.json", {"a": odd + good})
    for _ in range(2):
        assert run(src, dst, annotations=path).empty_boxes == 6
        assert "9 boxes, 6 boxes without area in their image left out, 0 skipped" in capsys.readouterr().out
    assert meta(dst, "a.png") == {"labels": [3], "boxes": [[0, 2, 4, 8, 3], [0, 0, 8, 8, 3]]}
    assert yaml.safe_load((dst / "pack.yaml").read_text())["done"]["empty_boxes"] == 6


def test_shards_with_any_json_are_packed_again(tmp_path):
    src = pictures(tmp_path / "src", "a.png") / "a.png"
    with ShardWriter(tmp_path / "0.tar") as shard:
        shard.write("a", {"png": src.read_bytes(), "json": b'["no boxes"]'})
        shard.write("b", {"png": src.read_bytes(), "json": b'{"boxes": [[9, 0, 9, 9, 1], [8, 0, 24, 16, 2]]}'})
    assert run(tmp_path / "0.tar", tmp_path / "dst").empty_boxes == 1
    assert [sample.meta for sample in samples(tmp_path / "dst")] == [
        ["no boxes"],
        {"boxes": [[0, 0, 8, 8, 2]]},
    ]


def test_masks_and_the_void_index(tmp_path):
    src = pictures(tmp_path / "src", "a.jpg", "b/c.jpg")
    index_png(tmp_path / "masks" / "a.png", halves(3, 11))
    index_png(tmp_path / "masks" / "b" / "c.png", halves(11, 255), palette=True)
    run(src, tmp_path / "dst", masks=tmp_path / "masks", ignore_index=11)
    got = by_key(tmp_path / "dst")
    assert np.array_equal(mask_of(got[make_key("a.jpg")]), halves(3, 255)[:8, 12:20])
    assert np.array_equal(mask_of(got[make_key("b/c.jpg")]), halves(255, 255)[:8, 12:20])
    assert all(sample.meta is None for sample in got.values())
    run(src, tmp_path / "kept", masks=tmp_path / "masks")
    assert set(np.unique(mask_of(by_key(tmp_path / "kept")[make_key("a.jpg")]))) == {3, 11}


def test_bad_masks(tmp_path, capsys):
    src, masks = pictures(tmp_path / "src", *(f"{c}.jpg" for c in "abcde")), tmp_path / "masks"
    index_png(masks / "a.png", halves(1, 2))
    index_png(masks / "b.png", halves(1, 2)[:, :20])
    Image.new("RGB", (32, 16)).save(masks / "c.png")
    write(masks / "d.png", "no PNG")
    index_png(masks / "z.png", halves(1, 2))
    with pytest.raises(InputError, match=r"more than max_skipped.*the first: [bcde]\.jpg: .*mask"):
        run(src, tmp_path / "dst", masks=masks)
    assert run(src, tmp_path / "dst", masks=masks, max_skipped=0.8).images == 1
    assert "1 masks match no image" in capsys.readouterr().out
    got = reasons(tmp_path / "dst")
    for name, word in {
        "b": "20 x 16, the image 32 x 16",
        "c": "mode RGB",
        "d": "decoded",
        "e": "no mask e.png",
    }.items():
        assert word in got[f"{name}.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "boxes.json: cannot be read: No such file"),
        ("{'a': 1}", "boxes.json is damaged: not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        (b"\xff\xfe\x00".decode("latin1"), "not readable JSON"),
        ("[1, 2]", "a mapping of keys to values is expected"),
        ({"a": 3}, '"a" has no list of boxes; expected COCO'),
        ({"a": [[1, 2, 3]]}, r'box 0 of "a" is \[1, 2, 3\]: expected \[x0, y0, x1, y1, label\]'),
        ({"a": [[1, 2, 3, "4"]]}, 'box 0 of "a"'),
        ({"a": [[1, 2, 3, 4, -1]]}, 'box 0 of "a"'),
        ({"a": [[1, 2, 3, 4, None]]}, 'box 0 of "a"'),
        ({"a": [[1, 2, 3, 4], {"bbox": [1, 2, 3, 4]}]}, 'box 1 of "a"'),
        ({"a": [{"xyxy": [1, 2, 3, 4], "lable": "cat"}]}, 'box 0 of "a"'),
        ('{"a": [[1, 2, 3, 4]], "a": [[5, 6, 7, 8]]}', "'a' is in one mapping twice"),
        ({"a": [[10**400, 2, 3, 4]]}, 'box 0 of "a"'),
        ({"a": [[1, 2, 3, 4, "cat"], [1, 2, 3, 4, 5]]}, "some labels are names"),
        ({"x": [], "y": [[1, 2, 3, 4]]}, "it names 2 images, none of them in .*src; the first: 'x'"),
        ({}, "it names 0 images"),
    ],
)
def test_annotations_that_are_wrong(tmp_path, content, message):
    src, path = pictures(tmp_path / "src", "a.jpg"), tmp_path / "boxes.json"
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=message) as caught:
        run(src, tmp_path / "dst", annotations=path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and not (tmp_path / "dst").exists()


def test_the_command_line_says_it_in_one_line(tmp_path):
    from typer.testing import CliRunner

    src = pictures(tmp_path / "src", "a.jpg")
    result = CliRunner().invoke(
        app, ["pack", str(src), str(tmp_path / "dst"), "--annotations", str(tmp_path / "x.json")]
    )
    assert result.exit_code == 2 and "x.json: cannot be read" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "dst").exists()
    path = write(tmp_path / "x.json", {"a": [[8, 0, 24, 16]]})
    options = ["--annotations", str(path), "--size", "8", "--workers", "0"]
    result = CliRunner().invoke(app, ["pack", str(src), str(tmp_path / "dst"), *options])
    assert result.exit_code == 0 and "1 images of 8 x 8 in 1 shards, 1 boxes, 0 skipped" in result.stdout


def shared(name: str) -> Path:
    if not (SHARED / "data" / name).is_dir():
        pytest.skip(f"needs the shared {name}")
    return SHARED / "data" / name


@pytest.mark.parametrize(
    ("name", "images", "boxes", "empty", "names"),
    [("pennfudan_256", 170, 423, 0, None), ("bccd_240", 364, 4888, 2, ["Platelets", "RBC", "WBC"])],
)
def test_shared_boxes(tmp_path, capsys, name, images, boxes, empty, names):
    src, dst = shared(name), tmp_path / "dst"
    summary = run(src / "images", dst, annotations=src / "boxes.json", size=32)
    assert (summary.images, summary.skipped, summary.empty_boxes) == (images, 0, empty)
    assert f" {boxes} boxes" in capsys.readouterr().out and (names is None) == (not (dst / "classes.json").exists())
    assert names is None or classes(dst) == {"classes": names}
    metas = [sample.meta for sample in samples(dst)]
    kept = np.array([box for m in metas for box in m["boxes"]])
    assert 0.6 * boxes < len(kept) <= boxes and kept[:, :4].min() >= 0 and kept[:, :4].max() <= 32
    assert (kept[:, :2] < kept[:, 2:4]).all()


def test_shared_masks(tmp_path):
    src, dst = shared("camvid_256"), tmp_path / "dst"
    summary = run(src / "train", dst, masks=src / "train_masks", ignore_index=11, size=32)
    assert (summary.images, summary.skipped) == (367, 0)
    assert set(np.unique([mask_of(sample) for sample in samples(dst)])) == {*range(11), 255}
