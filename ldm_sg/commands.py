"""What a person asks of the other verbs, one class a verb, whose docstring is the verb's help on the command line."""

import math
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_sg.errors import InputError
from ldm_sg.options import ADDRESS, CHECKPOINT, DEVICE, EXECUTOR, argument, numbers, option
from ldm_sg.sampling.options import SampleOptions


def shapes(flag: str, text: str) -> list[tuple[int, int]]:
    """'64x64,80x48' -> [(64, 64), (80, 48)]."""
    sides = [part.strip().partition("x")[::2] for part in text.split(",")]
    if not all(width.isdecimal() and height.isdecimal() for width, height in sides):
        raise InputError(f"{flag} {text!r}: WIDTHxHEIGHT in pixels, with commas between, for example 64x64,80x48,48x80")
    return [(int(width), int(height)) for width, height in sides]


def of_concepts(flag: str, texts: list[str], form: str, example: str) -> dict[int | str, Any]:
    """CONCEPT=NUMBERS -> a number or a list of them by the concept: an id, or a word of a prompt."""
    found: dict[int | str, Any] = {}
    for text in texts:
        name, _, typed = text.partition("=")
        given = numbers(f"{flag} {name}=", typed)
        if not name or len(given) != len(form.split(",")) or not all(map(math.isfinite, given)):
            raise InputError(f"{flag} {text}: CONCEPT={form}, for example cat={example}, or 5={example} of a run")
        concept = int(name) if name.isdecimal() and len(name) < 10 else name.lower()
        if concept in found:
            raise InputError(f"{flag} {text}: {name} is named twice: give one {flag} of it")
        found[concept] = given if len(given) > 1 else given[0]
    return found


@dataclass
class PackOptions:
    """Images -> webdataset shards: centre crop, antialiased resize; boxes and masks go with them.

    Examples:
      ldm-sg pack ~/photos data/photos256 --size 256
      ldm-sg pack ~/photos data/photos256 --annotations boxes.json --masks ~/masks --ignore-index 11
      ldm-sg pack VOCdevkit/VOC2012 data/voc256 --split train
      ldm-sg pack train2017 data/coco256 --annotations instances_train2017.json --masks stuffthingmaps/train2017 --merge cocostuff27
    """

    src: str = argument("Image folder, list file (.txt), LSUN LMDB folder, shards (glob), or Pascal VOC folder.")
    dst: Path = argument("Folder of the new shards.")
    size: int = option(256, "Side of the square images, pixels.")
    crop: str = option("square", "square (centre), or none: whole images, --size is their short side.")
    buckets: list[tuple[int, int]] = option(
        [],
        "In place of --size, shapes as 64x64,80x48,48x80: each image goes to the one nearest to its own, for annotate "
        "buckets=true.",
        parse=shapes,
    )
    shard_size: int = option(1000, "Images a shard.")
    format: str = option("jpg", "jpg, png or webp.")
    quality: int = option(95, "JPEG quality.")
    max_skipped: float = option(0.01, "Share of unreadable images above which packing fails.")
    workers: int = option(-1, "Processes; -1 = one a core (ray: as the cluster has room for).")
    executor: str = option("local", EXECUTOR)
    address: str | None = option(None, ADDRESS)
    annotations: Path | None = option(
        None, 'Boxes: COCO\'s instances JSON, or {"FILE NAME": [[x0, y0, x1, y1, label], ...], ...}.'
    )
    masks: Path | None = option(None, "Folder of index PNGs called like the images.")
    merge: str | None = option(None, "cocostuff27: COCO-Stuff's pixel maps -> the 27 classes of its hierarchy.")
    ignore_index: int | None = option(None, "Index of the masks that becomes 255, ignore.")
    split: str | None = option(
        None, "Of a VOC folder: a list in ImageSets/, as train or Segmentation/train. Else: a file of image names."
    )
    allow_damaged: bool = option(False, "Of shards that are cut off, take what is whole.")


@dataclass
class ConfigOptions:
    """What every verb with a config takes."""

    config: Path = argument("YAML under configs/, or one of your own.")
    overrides: list[str] | None = argument("key=value pairs that replace the config's; --dry-run shows all keys.", None)
    dry_run: bool = option(False, "Print the resolved config and build nothing.")


@dataclass
class AnnotateOptions(ConfigOptions):
    """Shards -> latents and guidance signals (g, then f).

    Examples:
      ldm-sg annotate configs/annotate/churches256.yaml 'shards=data/churches256/*.tar' out=annotations/churches annotator.k=300
      ldm-sg annotate configs/annotate/churches256.yaml 'shards=data/churches256/*.tar' out=annotations/churches processes=8
      ldm-sg annotate configs/annotate/churches256.yaml 'shards=data/churches256/*.tar' out=annotations/churches --part 3/64
    """

    part: str | None = option(
        None, "I/N: only shards I, I + N, ... (from 0). Under a Slurm array or torchrun it is seen by itself."
    )
    finish: bool = option(False, "When all parts are done: fit f, write the set.")


@dataclass
class TrainOptions(ConfigOptions):
    """Annotation set -> run. The same command resumes; Ctrl-C saves.

    Examples:
      ldm-sg train configs/train/churches256.yaml annotation=annotations/churches out=runs/churches
    """


@dataclass
class FitAutoencoderOptions(ConfigOptions):
    """Shards -> a small KL autoencoder of your own.

    Examples:
      ldm-sg fit-autoencoder configs/autoencoder/fruit.yaml 'shards.mine=data/mine/*.tar' holdout.mine=100 out=autoencoders/mine
    """


@dataclass
class DistillOptions(ConfigOptions):
    """Unlabelled images + a large self-supervised teacher -> a small g.

    Examples:
      ldm-sg distill configs/distill/demo.yaml
    """


@dataclass(kw_only=True)
class SampleCommand(SampleOptions):
    """Run -> PNGs, grid.png and one JSON line an image.

    Examples:
      ldm-sg sample runs/demo --cluster 3 -n 8
      ldm-sg sample runs/churches --name 'church at night' -n 8
      ldm-sg sample runs/demo --sweep-w 0,1,2,3 -n 8
      ldm-sg sample runs/demo --interpolate 3,17 -n 8
      ldm-sg sample runs/demo --trajectory -n 4
      ldm-sg sample runs/demo --preset paper
      ldm-sg sample runs/demo --like photo.jpg
      ldm-sg sample runs/voc --box 40,60,200,240 --cluster 3
      ldm-sg sample runs/camvid --mask layout.png
      ldm-sg sample runs/camvid --vary content
    """

    run: str = argument("Run or pipeline folder.")
    called: str | None = option(
        None, 'Clusters by a text, "church at night": the 3 most like it, once described.', "--name"
    )
    preset: str | None = option(
        None, "paper = DDIM, 250 steps, eta 0, w 2; best = 25 steps, w 5 between noise levels 0.2 and 0.8."
    )
    out: str | None = option(None, "Folder; default RUN/samples/SETTINGS.")
    overwrite: bool = option(False, "Replace samples of other settings in --out.")


@dataclass
class EditOptions:
    """Move, resize or re-lay the concepts of an image, by the run's own attention.

    Examples:
      ldm-sg edit runs/scenes --seed 3 --move 5=0.2,0
      ldm-sg edit runs/scenes --like photo.jpg --resize 5=1.5 --strength 10,20,40
      ldm-sg edit runs/scenes --seed 3 --layout-from other.jpg
      ldm-sg edit models/sd --prompt 'a cat on a sofa' --move cat=0.2,0 --resize cat=1.5 --seed 3 --strength 5,20
      ldm-sg edit runs/scenes --seed 3 --compose recipe.yaml --move 5=0.2,0
    """

    run: str = argument("Run that was trained with a token for each concept; or see --prompt.")
    move: dict[int | str, list[float]] = option(
        {},
        "CONCEPT=DX,DY: shares of the sides, right and down. Repeatable.",
        parse=partial(of_concepts, form="DX,DY", example="0.2,0"),
    )
    resize: dict[int | str, float] = option(
        {}, "CONCEPT=TIMES its area. Repeatable.", parse=partial(of_concepts, form="TIMES", example="1.5")
    )
    prompt: str | None = option(
        None,
        "RUN is a diffusers StableDiffusion(XL)Pipeline folder, and CONCEPTs are words of this prompt. Run so far on nothing "
        "larger than the tiny random pipelines of its tests.",
    )
    like: str | None = option(None, "A photo to edit, in place of what the run draws.")
    layout_from: str | None = option(None, "A photo whose shapes are taken.")
    compose: str | None = option(
        None, "YAML, take: [{photo: FILE or seed: N, concepts: [K, ...]}, ...], all put into the source."
    )
    n: int = option(4, "Images to draw and edit.", "-n")
    seed: int = option(0, "Of the images, as in sample.")
    strength: list[float] = option([20.0], "How hard; several, with commas, make a strip.", parse=numbers)
    w: float | None = option(None, "Guidance strength; default 2, with --prompt 7.5.")
    steps: int = option(25, "Solver steps.")
    checkpoint: str | None = option(None, CHECKPOINT)
    lpips: str | None = option(None, "With --like: AlexNet's features, safetensors, to judge the unedited.")
    out: str | None = option(None, "Folder; default RUN/edits/WHAT.")
    device: str = option("auto", DEVICE)


@dataclass
class ExportOptions:
    """Run -> a folder that diffusers alone can load, with a model card; here or on the hub.

    Examples:
      ldm-sg export runs/demo exported/demo
      ldm-sg export runs/demo exported/demo --checkpoint best --onnx
      ldm-sg export runs/demo hub://USER/NAME
    """

    run: str = argument("Run or pipeline folder.")
    to: str = argument("New folder, or hub://USER/NAME.")
    checkpoint: str | None = option(None, CHECKPOINT)
    onnx: bool = option(False, "UNet and decoder as ONNX files too, compared with torch.")
    device: str = option("auto", "auto, cpu, cuda, mps: of the samples in the card.")


@dataclass
class ReproduceOptions:
    """A table of the paper as a set of runs over several seeds -> CSV, table, plots, report. The same command resumes.

    Examples:
      ldm-sg reproduce table_guidance data.photos=data/photos --dry-run
      ldm-sg reproduce table_guidance data.photos=data/photos data.inception=inception:FILE --out runs/table
      ldm-sg reproduce clusters data.photos=cifar10/train --size gpu --jobs 8
    """

    suite: str = argument("Of configs/reproduce/, or a YAML of your own.")
    overrides: list[str] | None = argument(
        "key=value pairs of the suite: data.NAME=PATH, seeds=[0], train.steps=500.", None
    )
    out: Path | None = option(None, "Folder of all it makes, which suites share; default runs/reproduce (or -gpu).")
    size: str = option("small", "small: two CPU cores; gpu.")
    jobs: int = option(1, "Cells side by side, shared out over the GPUs.")
    device: str = option("auto", DEVICE)
    dry_run: bool = option(False, "Print the cells and their commands.")


@dataclass
class ConfigsOptions:
    """List the configs that ship, with a line each.

    Examples:
      ldm-sg configs
    """


@dataclass
class DemoOptions:
    """The whole main job on the embedded fruit photos, with a report at the end.

    Examples:
      ldm-sg demo
      ldm-sg demo --config demo_masks
    """

    config: str = option("demo", "demo: clusters; demo_masks: segments.")
    out: Path | None = option(None, "Folder of everything the demo makes; default runs/CONFIG.")
    steps: int | None = option(None, "Training steps; default as in configs/train/CONFIG.yaml.")
    device: str = option("auto", DEVICE)


@dataclass
class FinetuneOptions:
    """A run -> a run on new, unlabelled images.

    Examples:
      ldm-sg finetune runs/demo ~/photos --out runs/mine
      ldm-sg finetune runs/demo ~/photos --k 12 --steps 300 --lora 16
      ldm-sg finetune runs/demo 'data/cells/*.tar' --clusters extend --k 8 --replay 0.2 lr=2e-4
    """

    run: Path = argument("Folder of a trained run.")
    images: str = argument("Photo folder, shards, or an annotation set made with the run's own g.")
    overrides: list[str] | None = argument("key=value pairs of the training config.", None)
    k: int | None = option(None, "New clusters; default one for 40 images, at most the run's.")
    clusters: str = option("refit", "refit: new ones, begun from old ones like them; reuse: the run's; extend: both.")
    steps: int = option(500, "Training steps, at most: it stops when held-out images say so.")
    lora: int = option(0, "Rank of adapters to train in place of all weights; 0 = all weights.")
    replay: float = option(0.0, "Share of the run's own images in each batch (reuse, extend).")
    out: Path | None = option(None, "Folder of the new run; default RUN-NAME beside RUN.")
    device: str = option("auto", DEVICE)


@dataclass
class DedupOptions:
    """Near-duplicates and outliers -> a list that `train leave_out=` reads, and a picture. Nothing is deleted.

    Examples:
      ldm-sg dedup annotations/photos
      ldm-sg dedup annotations/photos --threshold 0.9 --outliers 0.01
    """

    annotation: Path = argument("Annotation set.")
    threshold: float = option(0.96, "Cosine of g's features from which on two images are one.")
    outliers: float = option(0.0, "Share of the images, those farthest from all others.")
    out: Path | None = option(None, "The list; default ANNOTATION/leave_out.jsonl.")


@dataclass
class InspectOptions:
    """Annotation set -> a page to explore: clusters, their names, and a map of the images.

    Examples:
      ldm-sg inspect annotations/churches
      ldm-sg inspect annotations/churches --describe --clip ViT-B-32/laion2b_s34b_b79k
      ldm-sg inspect annotations/churches --map umap --parquet churches.parquet
    """

    annotations: Path = argument("Annotation set.")
    out: Path | None = option(None, "The page; default ANNOTATIONS/inspect.html.")
    layout: str = option("pca", "pca, or umap (needs umap-learn): where images lie.", "--map")
    describe: bool = option(False, "Name the clusters, in ANNOTATIONS/names.json.")
    clip: str | None = option(None, "open_clip model that names them: MODEL/TAG or MODEL:FILE.")
    vocabulary: Path | None = option(None, "Words to choose from, one a line; default common nouns.")
    parquet: Path | None = option(None, "A table of the images too, for embedding-atlas.")
    device: str = option("auto", DEVICE)


@dataclass
class ListOptions:
    """The shipped autoencoders and those under ./autoencoders.

    Examples:
      ldm-sg autoencoder list
    """


@dataclass
class ImportOptions:
    """A KL or VQ autoencoder of latent-diffusion, taming-transformers, Stable Diffusion or Flux -> a folder that
    autoencoder=FOLDER uses. Code that the file may hold is not run.

    Examples:
      ldm-sg autoencoder import kl-f8/model.ckpt --config kl-f8/config.yaml --out autoencoders/kl-f8
      ldm-sg autoencoder import vqgan_imagenet_f16_1024.ckpt
      ldm-sg autoencoder import v1-5-pruned.safetensors --out autoencoders/sd15
    """

    file: Path = argument("A .ckpt, .pt or .safetensors: the autoencoder, or a model around it.")
    config: Path | None = option(None, "Its yaml, which is compared with what the file holds.")
    out: Path | None = option(None, "Folder; default autoencoders/NAME OF THE FILE.")


@dataclass
class MeasureOptions:
    """How well an autoencoder gives images back (PSNR, SSIM, LPIPS, rFID), and its latents' mean and std.

    Examples:
      ldm-sg autoencoder measure demo-f8c16 --data ldm_sg/assets/fruit64 -n 200 --picture out.png
      ldm-sg autoencoder measure autoencoders/kl-f8 --data ~/photos --size 256 --inception inception.safetensors
    """

    name: str = argument("A name that `list` shows, a folder, or hub://USER/NAME.")
    data: str = option(MISSING, "Images: shards or a folder.")
    n: int = option(500, "Images, spread over the data.", "-n", "--n")
    size: int | None = option(None, "Side to which images are cropped; default the first one's.")
    picture: Path | None = option(None, "PNG: a row of images, and one of what comes back.")
    out: Path | None = option(None, "JSON file; default NAME-measured.json.")
    lpips: str | None = option(None, "AlexNet's features, safetensors; default torchvision's.")
    inception: str | None = option(None, "Inception's weights, for rFID; as in evaluate.")
    batch_size: int = option(16, "Images at once.")
    overwrite: bool = option(False, "Replace other figures in --out.")
    device: str = option("auto", DEVICE)
