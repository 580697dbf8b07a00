"""The command line. Torch is imported inside the verbs, so that --help answers at once."""

import errno
import math
import os
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ldm_sg import __version__
from ldm_sg.errors import InputError

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its remarks on how we call it are not the user's


class ExitCodes(TyperGroup):
    """0 done, 2 wrong input (one line on stderr), 130 interrupted, 1 a bug (traceback)."""

    def invoke(self, ctx: Any) -> Any:
        # libgomp's threads spin for 300,000 rounds at a barrier, which takes the cores from other jobs; benchmarks/RESULTS.md
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        try:
            return super().invoke(ctx)
        except InputError as err:
            print(f"ldm-sg: {err}", file=sys.stderr)
            ctx.exit(2)
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
                raise
            print(f"ldm-sg: {err.filename or 'while writing'}: {err.strerror}", file=sys.stderr)
            ctx.exit(2)
        except KeyboardInterrupt as err:
            print(f"ldm-sg: {str(err) or 'interrupted'}", file=sys.stderr)
            ctx.exit(130)


app = typer.Typer(
    cls=ExitCodes,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with `ldm-sg demo`. Every verb has --help with examples; configs/annotate/ and configs/train/ hold a config "
    "for each data set, under the same name, and README.md a table of them.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ldm-sg {__version__}")
        raise typer.Exit


@app.callback()
def ldm_sg(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Label-free, self-guided latent diffusion: pack, annotate, train, sample, evaluate."""


def examples(*commands: str) -> str:
    """The end of a verb's help, a command a line."""
    return "\n".join(["\b", "Examples:", *(f"  ldm-sg {command}" for command in commands)])


Config = Annotated[Path, typer.Argument(help="YAML under configs/, or one of your own.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value pairs that replace the config's; --dry-run shows all keys.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="Step whose EMA weights the run keeps (keep_every=), or best: by fd. Default: its pipeline."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Processes = Annotated[int, typer.Option(help="At once; 0 = one a GPU (ray: of the cluster's), or one.")]
Executor = Annotated[str, typer.Option(help="local, or ray.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster, ray://HOST:PORT; default $RAY_ADDRESS, or none.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and build nothing.")]


def _config_verb(
    schema: str, module: str, config: Path, overrides: list[str] | None, dry_run: bool, **more: Any
) -> None:
    """Load the config as `ldm_sg.config.SCHEMA` and hand it to ldm_sg.verbs.MODULE.MODULE."""
    from ldm_sg import config as configs
    from ldm_sg.configfile import load, to_yaml

    loaded: Any = load(getattr(configs, schema), config, overrides)
    if dry_run:
        if schema == "TrainConfig":
            loaded.model = configs.model_config(loaded.model)
        print(to_yaml(loaded), end="")
        return
    _verb(module)(loaded, **more)


def _verb(module: str, name: str | None = None) -> Any:
    """ldm_sg.verbs.MODULE.NAME, which takes what its command does, under the same names."""
    return getattr(import_module(f"ldm_sg.verbs.{module}"), name or module)


@app.command(
    epilog=examples(
        "pack ~/photos data/photos256 --size 256",
        "pack ~/photos data/photos256 --annotations boxes.json --masks ~/masks --ignore-index 11",
        "pack VOCdevkit/VOC2012 data/voc256 --split train",
        "pack train2017 data/coco256 --annotations instances_train2017.json --masks stuffthingmaps/train2017 --merge cocostuff27",
    )
)
def pack(
    src: Annotated[
        str,
        typer.Argument(help="Image folder, list file (.txt), LSUN LMDB folder, shards (glob), or Pascal VOC folder."),
    ],
    dst: Annotated[Path, typer.Argument(help="Folder of the new shards.")],
    size: Annotated[int, typer.Option(help="Side of the square images, pixels.")] = 256,
    crop: Annotated[
        str, typer.Option(help="square (centre), or none: whole images, --size is their short side.")
    ] = "square",
    buckets: Annotated[
        str | None,
        typer.Option(
            help="In place of --size, shapes as 64x64,80x48,48x80: each image goes to the one nearest to its own, for "
            "annotate buckets=true."
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Images a shard.")] = 1000,
    image_format: Annotated[str, typer.Option("--format", help="jpg, png or webp.")] = "jpg",
    quality: Annotated[int, typer.Option(help="JPEG quality.")] = 95,
    max_skipped: Annotated[float, typer.Option(help="Share of unreadable images above which packing fails.")] = 0.01,
    workers: Annotated[int, typer.Option(help="Processes; -1 = one a core (ray: as the cluster has room for).")] = -1,
    executor: Executor = "local",
    address: Address = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help='Boxes: COCO\'s instances JSON, or {"FILE NAME": [[x0, y0, x1, y1, label], ...], ...}.'),
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of index PNGs called like the images.")] = None,
    merge: Annotated[
        str | None, typer.Option(help="cocostuff27: COCO-Stuff's pixel maps -> the 27 classes of its hierarchy.")
    ] = None,
    ignore_index: Annotated[int | None, typer.Option(help="Index of the masks that becomes 255, ignore.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Of a VOC folder: a list in ImageSets/, as train or Segmentation/train. Else: a file of image names."
        ),
    ] = None,
    allow_damaged: Annotated[
        bool, typer.Option("--allow-damaged", help="Of shards that are cut off, take what is whole.")
    ] = False,
) -> None:
    """Images -> webdataset shards: centre crop, antialiased resize; boxes and masks go with them."""
    from ldm_sg.verbs.pack import pack as run

    run(src, dst, size=size, shard_size=shard_size, format=image_format, quality=quality, max_skipped=max_skipped,
        workers=workers, annotations=annotations, masks=masks, merge=merge, ignore_index=ignore_index,
        split=split, crop=crop, allow_damaged=allow_damaged, executor=executor, address=address,
        buckets=_shapes("--buckets", buckets) if buckets is not None else [])  # fmt: skip


@app.command(
    epilog=examples(
        "annotate configs/annotate/churches256.yaml 'shards=data/churches256/*.tar' out=annotations/churches annotator.k=300",
        "annotate configs/annotate/churches256.yaml 'shards=data/churches256/*.tar' out=annotations/churches processes=8",
        "annotate configs/annotate/churches256.yaml 'shards=data/churches256/*.tar' out=annotations/churches --part 3/64",
    )
)
def annotate(
    config: Config,
    overrides: Overrides = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="I/N: only shards I, I + N, ... (from 0). Under a Slurm array or torchrun it is seen by itself."
        ),
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="When all parts are done: fit f, write the set.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Shards -> latents and guidance signals (g, then f)."""
    from ldm_sg.executor import read_part

    if part and finish:
        raise InputError(f"--part {part} --finish: one after the other, --finish when all parts are done")
    share = None if finish else read_part(part)
    _config_verb("AnnotateConfig", "annotate", config, overrides, dry_run, part=share, finish=finish)


@app.command(epilog=examples("train configs/train/churches256.yaml annotation=annotations/churches out=runs/churches"))
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Annotation set -> run. The same command resumes; Ctrl-C saves."""
    _config_verb("TrainConfig", "train", config, overrides, dry_run)


@app.command(
    epilog=examples(
        "sample runs/demo --cluster 3 -n 8",
        "sample runs/churches --name 'church at night' -n 8",
        "sample runs/demo --sweep-w 0,1,2,3 -n 8",
        "sample runs/demo --interpolate 3,17 -n 8",
        "sample runs/demo --trajectory -n 4",
        "sample runs/demo --preset paper",
        "sample runs/demo --like photo.jpg",
        "sample runs/voc --box 40,60,200,240 --cluster 3",
        "sample runs/camvid --mask layout.png",
        "sample runs/camvid --vary content",
    )
)
def sample(
    run: Annotated[str, typer.Argument(help="Run or pipeline folder.")],
    cluster: Annotated[
        list[int] | None,
        typer.Option(help="Cluster id; may be repeated. Default: drawn from the training distribution."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help='Clusters by a text, "church at night": the 3 most like it, once described.')
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="Where the object is, in pixels: x0,y0,x1,y1 (runs with boxes).")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Index PNG of any size: which class is where (runs with masks).")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Image whose signal, by the run's own g and f, is taken.")] = None,
    vary: Annotated[
        str | None, typer.Option(help="layout: other signals, the same noise; content: one signal, other noise.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Images (of each cluster).")] = 16,
    w: Annotated[float, typer.Option("--w", "-w", help="Guidance strength: 0 unconditional, 1 conditional.")] = 2.0,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = 25,
    scheduler: Annotated[str, typer.Option(help="dpmpp_2m, ddim, ddpm, unipc or euler.")] = "dpmpp_2m",
    eta: Annotated[float, typer.Option(help="DDIM's noise share.")] = 0.0,
    preset: Annotated[str | None, typer.Option(help="paper = DDIM, 250 steps, eta 0, w 2.")] = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at once; changes the speed, not the images.")] = 64,
    precision: Annotated[
        str, typer.Option(help="fp32; bf16 or auto: up to 2.5 times as fast, a grey level off.")
    ] = "fp32",
    sweep_w: Annotated[str | None, typer.Option(help="One row a strength: 0,1,2,3")] = None,
    interpolate: Annotated[str | None, typer.Option(help="Walk between two clusters: 3,17")] = None,
    spacing: Annotated[
        str, typer.Option(help="Where the solver evaluates: log_snr, trailing, or uniform as the paper's code.")
    ] = "log_snr",
    strategy: Annotated[str, typer.Option(help="How w is applied: cfg, cfg_zero or apg.")] = "cfg",
    rescale: Annotated[float, typer.Option(help="cfg: share of the guided std brought back, 0 to 1.")] = 0.0,
    interval: Annotated[str | None, typer.Option(help="w is 1 outside these noise levels: 0.2,0.8")] = None,
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Rows of predicted images over the steps.")] = False,
    checkpoint: Checkpoint = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT of the images, where not the run's own: 320x256. Far from it objects repeat."),
    ] = None,
    lora: Annotated[str | None, typer.Option(help="lora/ folder of a run that was fine-tuned from this one.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder; default RUN/samples/SETTINGS.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples of other settings in --out.")] = False,
    device: Device = "auto",
) -> None:
    """Run -> PNGs, grid.png and one JSON line an image."""
    given = {**locals()}
    for flag, kind in (("box", float), ("interval", float), ("sweep_w", float), ("interpolate", int)):
        given[flag] = _numbers(f"--{flag.replace('_', '-')}", given[flag], kind)
    given |= {"cluster": list(cluster or []), "size": _numbers("--size", size.replace("x", ",") if size else None, int)}
    from ldm_sg.sampling.request import SampleOptions, apply_preset

    if name is not None:
        if cluster or interpolate or like or mask:
            raise InputError(
                f"--name {name!r} picks the clusters: leave --cluster, --interpolate, --like and --mask out"
            )
        given["cluster"] = _verb("inspect", "clusters_named")(run, name, device)
    options = SampleOptions(**{field.name: given[field.name] for field in fields(SampleOptions)})
    print(_verb("sample")(run, apply_preset(options, preset), out, overwrite) / "grid.png")


@app.command(
    epilog=examples(
        "edit runs/scenes --seed 3 --move 5=0.2,0",
        "edit runs/scenes --like photo.jpg --resize 5=1.5 --strength 10,20,40",
        "edit runs/scenes --seed 3 --layout-from other.jpg",
        "edit models/sd --prompt 'a cat on a sofa' --move cat=0.2,0 --resize cat=1.5 --seed 3 --strength 5,20",
        "edit runs/scenes --seed 3 --compose recipe.yaml --move 5=0.2,0",
    )
)
def edit(
    run: Annotated[str, typer.Argument(help="Run that was trained with a token for each concept; or see --prompt.")],
    move: Annotated[
        list[str] | None, typer.Option(help="CONCEPT=DX,DY: shares of the sides, right and down. Repeatable.")
    ] = None,
    resize: Annotated[list[str] | None, typer.Option(help="CONCEPT=TIMES its area. Repeatable.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="RUN is a diffusers StableDiffusion(XL)Pipeline folder, and CONCEPTs are words of this prompt. Run so far on "
            "nothing larger than the tiny random pipelines of its tests."
        ),
    ] = None,
    like: Annotated[str | None, typer.Option(help="A photo to edit, in place of what the run draws.")] = None,
    layout_from: Annotated[str | None, typer.Option(help="A photo whose shapes are taken.")] = None,
    compose: Annotated[
        str | None,
        typer.Option(help="YAML, take: [{photo: FILE or seed: N, concepts: [K, ...]}, ...], all put into the source."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images to draw and edit.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the images, as in sample.")] = 0,
    strength: Annotated[str, typer.Option(help="How hard; several, with commas, make a strip.")] = "20",
    w: Annotated[float | None, typer.Option(help="Guidance strength; default 2, with --prompt 7.5.")] = None,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = 25,
    checkpoint: Checkpoint = None,
    lpips: Annotated[
        str | None, typer.Option(help="With --like: AlexNet's features, safetensors, to judge the unedited.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder; default RUN/edits/WHAT.")] = None,
    device: Device = "auto",
) -> None:
    """Move, resize or re-lay the concepts of an image, by the run's own attention."""
    from ldm_sg.verbs.edit import EditOptions
    from ldm_sg.verbs.edit import edit as run_edit

    moves = {k: (v[0], v[1]) for k, v in _pairs("--move", move, 2, bool(prompt)).items()}
    sizes = {k: v[0] for k, v in _pairs("--resize", resize, 1, bool(prompt)).items()}
    strengths = _numbers("--strength", strength, float)
    w = w if w is not None else 7.5 if prompt else 2.0
    options = EditOptions(
        moves, sizes, prompt, like, layout_from, compose, n, seed, strengths, w, steps, device, checkpoint, lpips
    )
    print(run_edit(run, options, out) / "edits.png")


def _pairs(flag: str, texts: list[str] | None, count: int, words: bool) -> dict[Any, list[float]]:
    """CONCEPT=NUMBERS, each concept once."""
    found: dict[Any, list[float]] = {}
    for text in texts or []:
        concept, equals, values = text.partition("=")
        numbers = (
            _numbers(flag, values, float) if equals and (words or (concept.isdecimal() and len(concept) < 10)) else []
        )
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise InputError(
                f"{flag} {text}: CONCEPT={'DX,DY' if count == 2 else 'TIMES'}, for example "
                f"{'cat' if words else 5}={'0.2,0' if count == 2 else '1.5'}"
            )
        key = concept.lower() if words else int(concept)
        if key in found:
            raise InputError(f"{flag} {text}: {concept} is named twice: give one {flag} of it")
        found[key] = numbers
    return found


@app.command(
    epilog=examples(
        "evaluate runs/demo --reference 'data/demo/*.tar' --metrics fd,prdc,consistency -n 2000",
        "evaluate runs/demo --reference 'data/demo/*.tar' --features own,inception --resize clean",
    )
)
def evaluate(
    source: Annotated[str, typer.Argument(help="Run, folder of samples or images, or shards.")],
    reference: Annotated[
        str, typer.Option(help="Real images: shards or a folder; or .npz statistics (clean-fid, ADM).")
    ],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of fd, kid, prdc, is, sfid, cmmd, fd_clusters, memory, nmi, consistency, layout, edit; default what the run allows."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Judges, commas between: own (the default: the run's g), inception, inception:FILE, any g, a YAML."
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="Of inception's input: tf (torch-fidelity's, the default) or clean (clean-fid's)."),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Samples; of the reference all are used, up to 50,000.")] = 10_000,
    w: Annotated[float | None, typer.Option("--w", "-w", help="Guidance strength; default 2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default 25.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="dpmpp_2m (the default), ddim, ddpm, unipc or euler.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples of a worker's task; changes no figure.")] = 64,
    size: Annotated[int | None, typer.Option(help="Side to which images are cropped; default the run's.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the sampling: auto (the default), fp32 or bf16.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Run whose g and f judge images on disk; default the one that holds them.")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="What clusters are drawn from: empirical (training's, the default), uniform, held-out."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Images that training did not see, for metric memory and --prior held-out.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help=".npz that the reference's mean and covariance go into.")
    ] = None,
    spacing: Annotated[str | None, typer.Option(help="Of the solver's steps; as in sample.")] = None,
    strategy: Annotated[str | None, typer.Option(help="cfg, cfg_zero or apg.")] = None,
    rescale: Annotated[float | None, typer.Option(help="As in sample.")] = None,
    interval: Annotated[str | None, typer.Option(help="As in sample.")] = None,
    checkpoint: Checkpoint = None,
    out: Annotated[str | None, typer.Option(help="JSON file.")] = None,
    processes: Processes = 0,
    executor: Executor = "local",
    address: Address = None,
    device: Device = "auto",
) -> None:
    """Samples against real images -> numbers with everything needed to reproduce them."""
    from ldm_sg.verbs.evaluate import evaluate as judge

    judge(source, reference, metrics, features=features, resize=resize, n=n, w=w, steps=steps, scheduler=scheduler,
        spacing=spacing, strategy=strategy, rescale=rescale, interval=_numbers("--interval", interval, float) or None,
        seed=seed, batch_size=batch_size, size=size, precision=precision, run=run, checkpoint=checkpoint, out=out,
        prior=prior, held_out=held_out, statistics=statistics,
        processes=processes, executor=executor, address=address, device=device)  # fmt: skip


@app.command(
    epilog=examples(
        "export runs/demo exported/demo",
        "export runs/demo exported/demo --checkpoint best --onnx",
        "export runs/demo hub://USER/NAME",
    )
)
def export(
    run: Annotated[str, typer.Argument(help="Run or pipeline folder.")],
    to: Annotated[str, typer.Argument(help="New folder, or hub://USER/NAME.")],
    checkpoint: Checkpoint = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="UNet and decoder as ONNX files too, compared with torch.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps: of the samples in the card.")] = "auto",
) -> None:
    """Run -> a folder that diffusers alone can load, with a model card; here or on the hub."""
    _verb("export")(**locals())


@app.command(
    epilog=examples(
        "reproduce table_guidance data.cifar10=data/cifar10 --dry-run",
        "reproduce table_guidance data.cifar10=data/cifar10 data.inception=inception:FILE --out runs/table",
        "reproduce clusters data.cifar10=data/cifar10 --size gpu --jobs 8",
    )
)
def reproduce(
    suite: Annotated[str, typer.Argument(help="Of configs/reproduce/, or a YAML of your own.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value pairs of the suite: data.NAME=PATH, seeds=[0], train.steps=500."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of all it makes; default runs/reproduce/SUITE.")] = None,
    size: Annotated[str, typer.Option(help="small: two CPU cores; gpu.")] = "small",
    jobs: Annotated[int, typer.Option(help="Cells side by side, shared out over the GPUs.")] = 1,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and their commands.")] = False,
) -> None:
    """A table of the paper as a set of runs over several seeds -> CSV, table, plots, report. The same command resumes."""
    import_module("ldm_sg.reproduce.run").reproduce(**locals())


@app.command("configs", epilog=examples("configs"))
def configs_() -> None:
    """List the configs that ship, with a line each."""
    from ldm_sg.configfile import listing

    print(listing())


@app.command(epilog=examples("demo", "demo --config demo_masks"))
def demo(
    config: Annotated[str, typer.Option(help="demo: clusters; demo_masks: segments.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="Folder of everything the demo makes; default runs/CONFIG.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; default as in configs/train/demo.yaml.")] = None,
    device: Device = "auto",
) -> None:
    """The whole main job on the embedded fruit photos, with a report at the end."""
    _verb("demo")(**locals())


@app.command(
    epilog=examples(
        "finetune runs/demo ~/photos --out runs/mine",
        "finetune runs/demo ~/photos --k 12 --steps 300 --lora 16",
        "finetune runs/demo 'data/cells/*.tar' --clusters extend --k 8 --replay 0.2 lr=2e-4",
    )
)
def finetune(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    images: Annotated[
        str, typer.Argument(help="Photo folder, shards, or an annotation set made with the run's own g.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs of the training config.")] = None,
    k: Annotated[int | None, typer.Option(help="New clusters; default one for 40 images, at most the run's.")] = None,
    clusters: Annotated[
        str, typer.Option(help="refit: new ones, begun from old ones like them; reuse: the run's; extend: both.")
    ] = "refit",
    steps: Annotated[int, typer.Option(help="Training steps, at most: it stops when held-out images say so.")] = 500,
    lora: Annotated[int, typer.Option(help="Rank of adapters to train in place of all weights; 0 = all weights.")] = 0,
    replay: Annotated[float, typer.Option(help="Share of the run's own images in each batch (reuse, extend).")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; default RUN-NAME beside RUN.")] = None,
    device: Device = "auto",
) -> None:
    """A run -> a run on new, unlabelled images."""
    _verb("finetune")(**locals())


@app.command(epilog=examples("dedup annotations/photos", "dedup annotations/photos --threshold 0.9 --outliers 0.01"))
def dedup(
    annotation: Annotated[Path, typer.Argument(help="Annotation set.")],
    threshold: Annotated[float, typer.Option(help="Cosine of g's features from which on two images are one.")] = 0.96,
    outliers: Annotated[float, typer.Option(help="Share of the images, those farthest from all others.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="The list; default ANNOTATION/leave_out.jsonl.")] = None,
) -> None:
    """Near-duplicates and outliers -> a list that `train leave_out=` reads, and a picture. Nothing is deleted."""
    _verb("dedup")(**locals())


@app.command(
    epilog=examples(
        "inspect annotations/churches",
        "inspect annotations/churches --describe --clip ViT-B-32/laion2b_s34b_b79k",
        "inspect annotations/churches --map umap --parquet churches.parquet",
    )
)
def inspect(
    annotations: Annotated[Path, typer.Argument(help="Annotation set.")],
    out: Annotated[Path | None, typer.Option(help="The page; default ANNOTATIONS/inspect.html.")] = None,
    layout: Annotated[str, typer.Option("--map", help="pca, or umap (needs umap-learn): where images lie.")] = "pca",
    describe: Annotated[bool, typer.Option("--describe", help="Name the clusters, in ANNOTATIONS/names.json.")] = False,
    clip: Annotated[str | None, typer.Option(help="open_clip model that names them: MODEL/TAG or MODEL:FILE.")] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Words to choose from, one a line; default common nouns.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="A table of the images too, for embedding-atlas.")] = None,
    device: Device = "auto",
) -> None:
    """Annotation set -> a page to explore: clusters, their names, and a map of the images."""
    _verb("inspect")(**locals())


@app.command(
    "fit-autoencoder",
    epilog=examples(
        "fit-autoencoder configs/autoencoder/fruit.yaml 'shards.mine=data/mine/*.tar' holdout.mine=100 out=autoencoders/mine"
    ),
)
def fit_autoencoder(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Shards -> a small KL autoencoder of your own."""
    _config_verb("FitAutoencoderConfig", "fit_autoencoder", config, overrides, dry_run)


@app.command(epilog=examples("distill configs/distill/demo.yaml"))
def distill(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Unlabelled images + a large self-supervised teacher -> a small g."""
    _config_verb("DistillConfig", "distill", config, overrides, dry_run)


first_stages = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples(
        "autoencoder list",
        "autoencoder measure sd-vae-ft-mse --data 'data/mine/*.tar' -n 500 --picture out.png",
        "autoencoder import kl-f8/model.ckpt --config kl-f8/config.yaml --out autoencoders/kl-f8",
    ),
    help="First stages: what there is, how well one gives images back, checkpoints of others.",
)
app.add_typer(first_stages, name="autoencoder")


@first_stages.command("list", epilog=examples("autoencoder list"))
def list_autoencoders() -> None:
    """The shipped autoencoders and those under ./autoencoders."""
    _verb("autoencoder", "show")()


@first_stages.command(
    "import",
    epilog=examples(
        "autoencoder import kl-f8/model.ckpt --config kl-f8/config.yaml --out autoencoders/kl-f8",
        "autoencoder import vqgan_imagenet_f16_1024.ckpt",
        "autoencoder import v1-5-pruned.safetensors --out autoencoders/sd15",
    ),
)
def import_autoencoder(
    file: Annotated[Path, typer.Argument(help="A .ckpt, .pt or .safetensors: the autoencoder, or a model around it.")],
    config: Annotated[Path | None, typer.Option(help="Its yaml, which is compared with what the file holds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default autoencoders/NAME OF THE FILE.")] = None,
) -> None:
    """A KL or VQ autoencoder of latent-diffusion, taming-transformers, Stable Diffusion or Flux -> a folder that
    autoencoder=FOLDER uses. Code that the file may hold is not run."""
    _verb("autoencoder", "import_checkpoint")(**locals())


@first_stages.command(
    "measure",
    epilog=examples(
        "autoencoder measure demo-f8c16 --data ldm_sg/assets/fruit64 -n 200 --picture out.png",
        "autoencoder measure autoencoders/kl-f8 --data ~/photos --size 256 --inception inception.safetensors",
    ),
)
def measure_autoencoder(
    name: Annotated[str, typer.Argument(help="A name that `list` shows, a folder, or hub://USER/NAME.")],
    data: Annotated[str, typer.Option(help="Images: shards or a folder.")],
    n: Annotated[int, typer.Option("-n", "--n", help="Images, spread over the data.")] = 500,
    size: Annotated[int | None, typer.Option(help="Side to which images are cropped; default the first one's.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG: a row of images, and one of what comes back.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; default NAME-measured.json.")] = None,
    lpips: Annotated[str | None, typer.Option(help="AlexNet's features, safetensors; default torchvision's.")] = None,
    inception: Annotated[str | None, typer.Option(help="Inception's weights, for rFID; as in evaluate.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other figures in --out.")] = False,
    device: Device = "auto",
) -> None:
    """How well an autoencoder gives images back (PSNR, SSIM, LPIPS, rFID), and its latents' mean and std."""
    _verb("autoencoder", "measure")(**locals())


def _numbers(flag: str, text: str | None, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")] if text is not None else []
    except ValueError as err:
        raise InputError(f"{flag} {text!r}: write numbers with commas between, for example 0,1,2,3") from err


def _shapes(flag: str, text: str) -> list[tuple[int, int]]:
    sides = [part.strip().partition("x")[::2] for part in text.split(",")]
    if not all(width.isdecimal() and height.isdecimal() for width, height in sides):
        raise InputError(f"{flag} {text!r}: WIDTHxHEIGHT in pixels, with commas between, for example 64x64,80x48,48x80")
    return [(int(width), int(height)) for width, height in sides]


def main() -> None:
    app()
