"""Pictures and the report of a run: right pixels in the right places, one self-contained file, nothing required."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ldm_sg.errors import InputError
from ldm_sg.report import charts, grids, html
from ldm_sg.report.annotation import OPEN, wall
from ldm_sg.report.run import read_curves, write_report


def flat(*values: int, side: int = 8) -> torch.Tensor:
    """One flat grey image a value, uint8 [N, 3, side, side]."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side).contiguous()


# ---- pictures


def test_grid_places_images_row_by_row() -> None:
    picture = grids.grid(flat(10, 20, 30, 40, 50), columns=3, pad=2)
    assert picture.size == (3 * 8 + 4 * 2, 2 * 8 + 3 * 2)
    at = [[picture.getpixel((2 + 4 + 10 * x, 2 + 4 + 10 * y))[0] for x in range(3)] for y in range(2)]
    assert at == [[10, 20, 30], [40, 50, 255]]
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_grid_of_few_images_and_scaled() -> None:
    assert grids.grid(flat(1), columns=8).size == (12, 12)
    assert grids.grid(flat(1, 2), columns=2, pad=0, scale=3).size == (48, 24)
    assert grids.best_scale(flat(1, side=64)) == 2 and grids.best_scale(flat(1, side=256)) == 1


def test_pixels_survive_unscaled() -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    picture = grids.grid(images, columns=1, pad=0)
    assert list(picture.getdata()) == [tuple(p) for p in images[0].permute(1, 2, 0).reshape(-1, 3).tolist()]


def test_only_uint8_batches_are_drawn() -> None:
    for wrong in (flat(1).float(), flat(1)[0], flat(1)[:, :1]):
        with pytest.raises(AssertionError):
            grids.grid(wrong, 1)


def runs_of(picture: Image.Image, y: int) -> list[tuple[int, int]]:
    """(value, length) of the grey runs of one line of pixels."""
    line, found = [picture.getpixel((x, y))[0] for x in range(picture.width)], []
    for value in line:
        found = [*found[:-1], (value, found[-1][1] + 1)] if found and found[-1][0] == value else [*found, (value, 1)]
    return found


def test_cluster_picture_has_real_members_left_and_samples_right() -> None:
    real, samples = [flat(10, 20, side=32), flat(30, side=32)], [flat(110, 120, side=32), flat(130, 140, side=32)]
    picture = grids.cluster_picture([3, 250], real, samples, scale=1)
    rows = [picture.height - 2 - 16 - 34, picture.height - 2 - 16]
    for y, expected in zip(rows, ([10, 20, 110, 120], [30, 130, 140]), strict=True):
        line = [(value, n) for value, n in runs_of(picture, y + 12) if n >= 20 and value < 255]
        assert [value for value, _ in line] == expected and {n for _, n in line} == {32}
    gap = [n for value, n in runs_of(picture, rows[0] + 12) if value == 255]
    assert max(gap[1:-1]) == grids.GAP
    caption = picture.crop((0, rows[1] - 16, 40, rows[1] + 16)).convert("L")
    assert min(caption.getdata()) < 120  # something is written there


def test_labelled_rows_with_and_without_headers() -> None:
    rows = [flat(1, 2, 3, side=32), flat(4, 5, 6, side=32)]
    plain, headed = (
        grids.labelled_rows(["w = 0", "w = 1"], rows),
        grids.labelled_rows(["a", "b"], rows, ["1", "5", "9"]),
    )
    assert headed.height > plain.height > 2 * 64
    assert min(headed.crop((0, 0, headed.width, 20)).convert("L").getdata()) < 200


def test_pictures_appear_whole(tmp_path: Path) -> None:
    path = grids.save(grids.grid(flat(7), 1), tmp_path / "new" / "a.png")
    assert Image.open(path).size == (12, 12) and [p.name for p in path.parent.iterdir()] == ["a.png"]


# ---- html


class Page(HTMLParser):
    """Tags, attributes that load something, and whether every tag is closed."""

    VOID = {"meta", "img", "br", "path", "use", "rect", "circle", "line", "image"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.loads, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert self.stack == [], self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_text_is_escaped_and_empty_parts_vanish(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    text = html.page(evil, evil, [html.section(evil, evil, html.table([evil], [[evil]]), html.code(evil)), ""], evil)
    assert "<script" not in text and "script" not in Page(text).tags
    assert html.section("a", "text", "", "") == "" == html.pair("", "") == html.table(["a"], []) == html.facts({})
    assert html.picture(tmp_path / "none.png") == "" == html.chart("") == html.folded("a", "") == html.code(" ")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (59.96, "1 min 00 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (90061, "25 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert charts.duration(seconds) == text


def test_long_curves_are_thinned_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MOST and thinned[-1][0] == 9999
    assert all(abs(y - 0.5) < 0.05 for _, y in thinned)
    assert charts.thin(points[:3]) == points[:3]


def test_charts_draw_what_there_is() -> None:
    assert charts.losses([], [], []) == "" == charts.line([], "x") == charts.sizes([]) == charts.stages({})
    for svg in (
        charts.losses([(0, 1.0), (10, 0.5)], [(10, 0.4)], []),
        charts.losses([(5, 0.3)], [], []),
        charts.losses([(0, 0.3), (5, 0.3)], [], []),
        charts.line([(1, 0.0)], "images/s"),
        charts.line([(1, -1.0), (2, 1.0)], "x"),
        charts.sizes([0, 0]),
        charts.sizes(list(range(5000))),
        charts.stages({"train": 0.0}),
    ):
        assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>") and len(svg) < 3_000_000
    assert "held out, null" not in charts.losses([(0, 1.0)], [(0, 1.0)], [])


# ---- the report


def test_curves_survive_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(
        b"step,train_loss,val_loss_guided\n1,0.5,\n2,nan,0.4\nx,1,1\n3,inf,\n4,0.25\n5,0.2,0.3,9,9\n\xff\xfe,1,\n6,0."
    )
    curves = read_curves(path)
    assert curves["train_loss"] == [(1, 0.5), (4, 0.25), (5, 0.2), (6, 0.0)]
    assert curves["val_loss_guided"] == [(2, 0.4), (5, 0.3)]
    assert read_curves(tmp_path / "none.csv") == {}
    path.write_bytes(b"")
    assert read_curves(path) == {}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run with everything that a report can show."""
    run, annotation = tmp_path / "runs" / "my run <1>", tmp_path / "set"
    for folder in (run / "samples", run / "evaluations", annotation):
        folder.mkdir(parents=True)
    for name in (
        "clusters.png",
        "sweep_w.png",
        "trajectory.png",
        "interpolation.png",
        "samples/step_9.png",
        "samples/step_10.png",
    ):
        grids.save(grids.grid(flat(1, 2), 2), run / name)
    for k in range(3):
        grids.save(grids.strip([flat(1, 2), flat(3)]), annotation / "clusters" / f"{k:06d}.webp")
    (run / "config.yaml").write_text(yaml.safe_dump({"annotation": str(annotation), "steps": 40, "batch_size": 8}))
    (run / "metrics.csv").write_text(
        "step,train_loss,val_loss_guided,val_loss_null,images_per_s,lr\n10,0.5,,,100,0.1\n20,0.4,,,110,0.1\n20,,0.3,0.35,,\n"
    )
    evaluation = {
        "metrics": {
            "g": {
                "fd": 4.5,
                "precision": 0.7,
                "consistency": 0.4,
                "consistency_real": 0.625,
                "consistency_chance": 0.04,
            },
            "inception": {"fd": 221.0},
        },
        "samples": 100,
        "reference_images": 200,
        "judges": {"g": {"guide": True}, "inception": {"guide": False, "resize": "clean"}},
        "sampling": {"w": 2.0, "steps": 25, "scheduler": "dpmpp_2m"},
    }
    (run / "evaluations" / "a.json").write_text(json.dumps(evaluation))
    annotator = {"k": 3, "counts": [5, 1, 2], "entropy": 0.9, "nmi": 0.61}
    manifest = {
        "num_images": 8,
        "size": 64,
        "latent_shape": [8, 8, 8],
        "annotator": annotator,
        "guidance": {"num_labels": 3},
    }
    (annotation / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return run


def test_full_report_is_one_file_that_loads_nothing(full: Path) -> None:
    (full / "command.txt").write_text("ldm-sg demo --out 'a&b'\n")
    (full / "timings.json").write_text('{"train": 61.0, "pack": 2.0}')
    path = write_report(full)
    text = path.read_text()
    page = Page(text)
    pictures = [value for value in page.loads if value.startswith("data:image/")]
    assert len(pictures) == 6 + 3
    for value in pictures:
        Image.open(io.BytesIO(base64.b64decode(value.split(",")[1]))).verify()
    assert all(value.startswith(("data:", "#")) for value in page.loads), page.loads
    assert "url(http" not in text and "@import" not in text and "<link" not in text and "<script" not in text
    for word in (
        "my run <1>", "ldm-sg demo --out 'a&b'", "4.5", "40.0%", "w = 2, 25 dpmpp_2m", "100 / 200", "0.700", "g (its guide)", "inception (resize clean)", "221", "reach 62.5%", "chance 4.0%",
        "20 of 40", "8 × 8 × 8", "1 min 01 s", "held out, guided", "0.610", "1 / 5", "step 9", "batch_size: 8",
        "Entropy says", "5 images", "1 image", "nobody named them",
    ):  # fmt: skip
        assert word in page.text, word
    assert f"ldm-sg sample '{full}' --cluster 2" in page.text  # as a shell reads it
    headings = re.findall(r'<section id="(.*?)">', text)
    assert [value[1:] for value in page.loads if value.startswith("#")][: len(headings)] == headings
    assert page.text.index("step 9") < page.text.index("step 10")
    assert re.search(r"1 min 03 s", page.text)  # both stages
    assert not list(full.glob("*.tmp*"))


def test_photos_are_embedded_smaller_than_as_png(tmp_path: Path) -> None:
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 40, 40), (400, 400), mode="bicubic").clamp(0, 1)
    path = grids.save(grids.grid((noise * 255).byte(), 1), tmp_path / "photo.png")
    assert len(html.picture(path)) < path.stat().st_size / 2
    tall = grids.save(Image.new("RGB", (1, 20_000)), tmp_path / "tall.png")  # taller than WebP can be
    assert "data:image/png" in html.picture(tall)


def test_many_clusters_are_folded_away(tmp_path: Path) -> None:
    for k in range(OPEN + 5):
        grids.save(grids.strip([flat(1)]), tmp_path / "clusters" / f"{k:06d}.webp")
    manifest = {"annotator": {"kind": "clusters", "counts": [1] * (OPEN + 5) + [3]}}
    text = wall(tmp_path, manifest, "RUN")
    assert "5 more clusters" in text and text.index("--cluster 39<") < text.index("<details") < text.index(
        "--cluster 40<"
    )
    assert f"{OPEN + 5} of {OPEN + 6} are shown" in text


def test_clip_paths_of_several_charts_do_not_collide(full: Path) -> None:
    ids = re.findall(r'<clipPath id="([^"]+)"', write_report(full).read_text())
    assert len(ids) == len(set(ids)) >= 3


def test_every_part_is_optional(full: Path, tmp_path: Path) -> None:
    everything = sorted(p for p in full.rglob("*") if p.is_file())
    for missing in everything:
        content = missing.read_bytes()
        missing.unlink()
        Page(write_report(full).read_text())
        missing.write_bytes(content)
    (tmp_path / "bare").mkdir()
    page = Page(write_report(tmp_path / "bare").read_text())
    assert "h1" in page.tags and "h2" not in page.tags and "img" not in page.tags


def test_manifests_with_little_in_them_do(full: Path, tmp_path: Path) -> None:
    for manifest in (
        {},
        {"annotator": None, "guidance": None, "features": None},
        {"annotator": {"counts": [4]}, "size": 3},
    ):
        (tmp_path / "set" / "manifest.yaml").write_text(yaml.safe_dump(manifest))
        Page(write_report(full).read_text())


def test_the_command_and_timings_can_lie_in_the_run(full: Path) -> None:
    (full / "command.txt").write_text("ldm-sg train x.yaml\n")
    (full / "timings.json").write_text('{"train": 7000, "odd": null}')
    text = Page(write_report(full).read_text()).text
    assert "ldm-sg train x.yaml" in text and "1 h 56 min" in text


def test_wrong_runs_are_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "none")
    for name, content in (("evaluations/a.json", "{"), ("evaluations/a.json", "[1]"), ("config.yaml", "a: [")):
        before = (full / name).read_text()
        (full / name).write_text(content)
        with pytest.raises(InputError, match=name):
            write_report(full)
        (full / name).write_text(before)
