"""The explorer: what its page, its table and its names say is what is so."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_annotate import SIZE, config, make_shards, png
from test_features import TINY_CLIP
from test_train import config as train_config
from typer.testing import CliRunner

from ldm_sg.annotate import names
from ldm_sg.cli import app
from ldm_sg.config import AnnotatorConfig
from ldm_sg.configfile import ASSETS
from ldm_sg.data.images import to_float
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.photos import images_at
from ldm_sg.report import explore
from ldm_sg.report.annotation import about, extremes
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.train import train

EVIL = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return annotate(config(folder, make_shards(folder / "source"), annotator=AnnotatorConfig(k=4)))


@pytest.fixture
def annotations(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "annotations"))


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def data(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


def points(latents: LatentSet) -> np.ndarray:
    found = latents.features().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_the_page_knows_every_image_and_cluster(annotations: Path) -> None:
    code, output = invoke("inspect", annotations)
    assert code == 0 and output.strip() == str(annotations / "inspect.html")
    latents, found = LatentSet(annotations), data(annotations / "inspect.html")
    columns, ids = found["columns"], latents.signals.k.numpy()
    assert columns["key"] == [f"image{i:04d}" for i in range(18)] and columns["k"] == ids.tolist()
    assert columns["class"] == [i % 3 for i in range(18)] and "name" not in columns
    xy = np.array([columns["x"], columns["y"]])
    assert xy.shape == (2, 18) and np.isfinite(xy).all() and xy.min() == 0 and xy.max() == 1
    centroids = load_file(annotations / "annotator" / "centroids.safetensors")["centroids"].numpy()
    apart = np.linalg.norm(points(latents) - centroids[ids], axis=1)
    assert np.allclose(columns["distance"], apart, atol=1e-4)
    for k, cluster in enumerate(found["clusters"]):
        counts = np.bincount(np.arange(18)[ids == k] % 3, minlength=3)
        assert cluster["size"] == counts.sum() == columns["cluster_size"][int(np.flatnonzero(ids == k)[0])]
        assert cluster["purity"] == counts.max() / counts.sum() and counts[cluster["label"]] == counts.max()
        far = np.linalg.norm(centroids - centroids[k], axis=1)
        assert (
            cluster["like"] == [int(i) for i in np.argsort(far) if i != k][: len(cluster["like"])] and cluster["like"]
        )
    text = (annotations / "inspect.html").read_text()
    assert not re.search(r"""(src|href)=["']?http""", text) and text.count('class="row"') == 4
    for k, cluster in enumerate(found["clusters"]):
        assert f"{cluster['purity']:.0%} of class {cluster['label']}<" in text and f'id="cluster-{k}"' in text


def test_pca_is_numpys_up_to_the_sign() -> None:
    cloud = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    left, size, _ = np.linalg.svd(cloud - cloud.mean(0))
    found = explore.pca(torch.from_numpy(cloud).float())
    assert np.allclose(np.abs(found), np.abs(left[:, :2] * size[:2]), atol=1e-4)


def test_images_are_spread_over_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = np.repeat(np.arange(1000), 7)
    assert explore.spread(shards, 10_000).shape == (700,)  # of 100 shards
    few = explore.spread(shards, 50)
    assert len(set(few)) == 50 and few[0] == 0 and few[-1] == 6999 and np.diff(few).max() < 300
    assert explore.spread(shards[:20], 50).tolist() == list(range(20))


def test_what_is_left_out_is_said(annotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "MAPPED", 5)
    assert invoke("inspect", annotations)[0] == 0
    text = (annotations / "inspect.html").read_text()
    assert "5 of 18 images are shown" in text and len(data(annotations / "inspect.html")["columns"]["key"]) == 5


def test_the_table_is_what_embedding_atlas_opens(annotations: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    code, output = invoke("inspect", annotations, "--parquet", tmp_path / "t.parquet", "--out", tmp_path / "page.html")
    assert (
        code == 0 and f"embedding-atlas {tmp_path}/t.parquet --image image --x x --y y --neighbors neighbors" in output
    )
    rows, latents = parquet.read_table(tmp_path / "t.parquet").to_pylist(), LatentSet(annotations)
    assert [row["key"] for row in rows] == [f"image{i:04d}" for i in range(18)]
    assert [row["k"] for row in rows] == latents.signals.k.tolist()
    cosines = points(latents) @ points(latents).T
    for i, row in enumerate(rows):
        thumb = np.array(Image.open(io.BytesIO(row["image"]["bytes"])).resize((SIZE, SIZE))).astype(int)
        assert abs(thumb - np.array(Image.open(io.BytesIO(png(i)))).astype(int)).mean() < 25
        ids, apart = row["neighbors"]["ids"], row["neighbors"]["distances"]
        assert len(ids) == 16 and i in ids and np.allclose(apart, 1 - cosines[i, ids], atol=1e-3)
        assert np.allclose(np.sort(apart), apart) and apart[-1] <= np.sort(1 - cosines[i])[15] + 1e-3
    assert not (annotations / "inspect.html").exists() and (tmp_path / "page.html").is_file()


class Colours:
    """A CLIP whose answers are known: an image lies where its mean colour is, a word where its colour is."""

    sha256, name = "0" * 64, "colours"
    words = {
        "red": (1, 0, 0),
        "green": (0, 1, 0),
        "blue": (0, 0, 1),
        EVIL: (-1, -1, -1),
        "green at night": (0.1, 0.9, 0.3),
    }

    def __init__(self, *_: object) -> None:
        self.visual = type("visual", (), {"size": SIZE})

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)) + 1, dim=1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor([self.words[text] for text in texts]).float(), dim=1)


def test_clusters_are_named_by_what_is_nearest(
    annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "Clip", Colours)
    (tmp_path / "words.txt").write_text(f"# colours\n\nred\n green \nblue\nred\n{EVIL}\n")
    before = LatentSet(annotations).hash
    code, output = invoke(
        "inspect", annotations, "--describe", "--clip", "colours", "--vocabulary", tmp_path / "words.txt"
    )
    assert code == 0 and "4 clusters named by 4 words" in output, output
    latents = LatentSet(annotations)
    assert latents.hash == before
    found, said = about(annotations, latents.manifest), json.loads((annotations / "names.json").read_text())
    for k, cluster in enumerate(found):
        members = torch.tensor(extremes(latents, [k])[k][0])
        colour = torch.bincount(members % 3, minlength=3).argmax()  # what most of the typical images are
        assert cluster["names"][0] == ["red", "green", "blue"][colour] and cluster["names"] == said["names"][k]
        assert len(cluster["names"]) == 3 and EVIL not in cluster["names"]
    said["names"][0] = [EVIL]  # names.json is a file that people edit
    (annotations / "names.json").write_text(json.dumps(said))
    assert invoke("inspect", annotations)[0] == 0
    text = (annotations / "inspect.html").read_text()
    at = text.find(EVIL)
    assert at < 0, text[at - 300 : at + 50]
    assert "Cluster 0: &lt;/script&gt;" in text and text.count("<script") == 2
    assert EVIL in data(annotations / "inspect.html")["columns"]["name"]
    said["set"] = "another"
    (annotations / "names.json").write_text(json.dumps(said))
    assert [cluster["names"] for cluster in about(annotations, latents.manifest)] == [[]] * 4  # of the set as it was


def tiny_clip(folder: Path) -> tuple[str, torch.nn.Module]:
    text = TINY_CLIP["text_cfg"] | {"vocab_size": 49408, "context_length": 16}
    (folder / "tiny-words.json").write_text(json.dumps(TINY_CLIP | {"text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-words.json")
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-words", pretrained=None).eval()
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "clip.safetensors")
    return f"tiny-words:{folder / 'clip.safetensors'}", clip


def test_names_are_those_of_open_clip_itself(annotations: Path, tmp_path: Path) -> None:
    name, clip = tiny_clip(tmp_path)
    assert invoke("inspect", annotations, "--describe", "--clip", name)[0] == 0
    words = names.read_vocabulary(ASSETS / "nouns.txt")
    assert 300 < len(words) == len(set(words)) and all(0 < len(word) < 40 for word in words)
    latents, visual = LatentSet(annotations), clip.visual
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (visual.image_mean, visual.image_std))
    tokens = open_clip.get_tokenizer("tiny-words")([f"a photo of {word}" for word in words])
    with torch.no_grad():
        texts = clip.encode_text(tokens, normalize=True)
    said, kept = (
        json.loads((annotations / "names.json").read_text())["names"],
        load_file(annotations / "names.safetensors"),
    )
    for k in range(4):
        near = extremes(latents, [k])[k][0]
        photos = to_float(torch.stack(list(images_at(latents, near, 32).values())))
        with torch.no_grad():
            own = clip.encode_image((photos / 2 + 0.5 - mean) / std, normalize=True).mean(0)
        own = own / own.norm()
        assert torch.allclose(kept["clusters"][k], own, atol=1e-4)
        assert said[k] == [words[i] for i in (texts @ own).topk(3).indices.tolist()]


@pytest.fixture(scope="module")
def trained(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    copy = shutil.copytree(colours, folder / "set")
    return train(train_config(copy, folder / "run", steps=2))


def test_a_text_picks_clusters_for_sampling(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("sample", trained, "--name", "green at night", "-n", "1", "--steps", "2", "--out", tmp_path / "s")
    code, output = invoke(*asked)
    assert (
        code == 2 and "have not been described" in output and "--describe" in output and not (tmp_path / "s").exists()
    )
    folder = trained.parent / "set"
    said = {
        "set": LatentSet(folder).hash,
        "clip": "colours",
        "sha256": Colours.sha256,
        "names": [["a"], ["b"], [], ["d"]],
    }
    vectors = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]])  # cluster 2: without images
    (folder / "names.json").write_text(json.dumps(said))
    save_file({"clusters": vectors}, folder / "names.safetensors")
    monkeypatch.setattr(names, "Clip", Colours)
    code, output = invoke(*asked)
    cosines = Colours().texts(["green at night"])[0]
    assert code == 0 and f"clusters 3 d ({cosines[1]:.3f}), 0 a ({cosines[2]:.3f}), 1 b ({cosines[0]:.3f})" in output
    assert [json.loads(line)["k"] for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()] == [3, 0, 1]
    code, output = invoke(*asked, "--interpolate", "0,1")
    assert code == 2 and "leave --cluster" in output
    (folder / "names.json").write_text(json.dumps(said | {"sha256": "1" * 64}))
    assert "not the model that described" in invoke(*asked)[1]
    (folder / "names.json").write_text(json.dumps(said))
    (trained / "annotation.json").write_text(json.dumps({"hash": "another"}))
    assert "annotated anew" in invoke(*asked)[1]
    (tmp_path / "bare").mkdir()
    assert "at hand" in invoke("sample", tmp_path / "bare", "--name", "x")[1]


def test_bad_input_is_named(annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    monkeypatch.setitem(sys.modules, "umap", None)
    described = ("--describe", "--clip", "ViT-B-32/openay")
    for given, told in (
        (("--describe",), "go together"),
        (("--clip", "ViT-B-32/openai"), "go together"),
        ((*described, "--vocabulary", tmp_path / "empty.txt"), "no word in it"),
        ((*described, "--vocabulary", tmp_path / "latin.txt"), "UTF-8"),
        ((*described, "--vocabulary", tmp_path / "none.txt"), "none.txt"),
        (described, "openai"),
        (("--describe", "--clip", "ViT-B-33/openai"), "ViT-B-32"),
        (("--describe", "--clip", f"{tiny_clip(tmp_path)[0]}x"), "no such file"),
        (("--map", "pac"), "did you mean 'pca'"),
        (("--map", "umap"), "pip install 'ldm-sg[umap]'"),
        (("--out", tmp_path / "page.txt"), "NAME.html"),
        (("--parquet", tmp_path / "table.csv"), "NAME.parquet"),
    ):
        code, output = invoke("inspect", annotations, *given)
        assert code == 2 and told in output and output.count("\n") == 1, (given, output)
    assert not (annotations / "inspect.html").exists() and not (annotations / "names.json").exists()
    assert "no finished" in invoke("inspect", tmp_path / "nowhere")[1] or invoke("inspect", tmp_path)[0] == 2
    said = yaml.safe_load((annotations / "manifest.yaml").read_text())
    (annotations / "manifest.yaml").write_text(yaml.safe_dump(said | {"annotator": None}))
    assert "manifest.yaml: annotator: a mapping" in invoke("inspect", annotations)[1]
    (annotations / "manifest.yaml").write_text(yaml.safe_dump(said))
    (annotations / "tally.npz").write_bytes(b"PK no zip")
    assert "is damaged" in invoke("inspect", annotations)[1]


def test_sets_without_features_or_clusters_have_a_page_too(annotations: Path, tmp_path: Path) -> None:
    shutil.rmtree(annotations / "features")
    assert invoke("inspect", annotations)[0] == 0
    text = (annotations / "inspect.html").read_text()
    assert "no features of g" in text and "<script" not in text and text.count('class="row"') == 4
    code, output = invoke("inspect", annotations, "--parquet", tmp_path / "t.parquet")
    assert code == 2 and "features" in output and not (tmp_path / "t.parquet").exists()
    shards = make_shards(tmp_path / "source")
    vectors = annotate(
        config(tmp_path, shards, out=str(tmp_path / "vectors"), annotator=AnnotatorConfig(kind="features"))
    )
    assert invoke("inspect", vectors)[0] == 0 and "k" not in data(vectors / "inspect.html")["columns"]
    code, output = invoke("inspect", vectors, "--describe", "--clip", "ViT-B-32/openai")
    assert code == 2 and "single cluster" in output


def test_umap_places_images_where_it_is_installed(annotations: Path) -> None:
    pytest.importorskip("umap", reason="pip install 'ldm-sg[umap]'")
    assert invoke("inspect", annotations, "--map", "umap")[0] == 0
    columns = data(annotations / "inspect.html")["columns"]
    assert np.isfinite(columns["x"]).all() and np.isfinite(columns["y"]).all() and len(columns["x"]) == 18


def test_the_script_is_whole() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to read JavaScript with")
    script = Path(explore.__file__).parents[1] / "assets" / "explore.js"
    done = subprocess.run(
        [node, "--check", "--input-type=module", "-"], input=script.read_text(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
