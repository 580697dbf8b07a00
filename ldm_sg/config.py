"""Configs: one dataclass a verb, with what its values may be. Nothing here builds anything (that is `build`)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from omegaconf import OmegaConf

from ldm_sg.configfile import ROOT, Checked, above_0, below_1, count, from_0, load, one_of, setting, share
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import annotator_folder, flat, read_mapping

Rules = Iterator[tuple[str, object, str]]  # as `Checked.rules` gives them


@dataclass
class FeaturesConfig(Checked):
    """g: a shipped extractor's name or folder, a timm model's name, or `open_clip:MODEL[/PRETRAINED]`."""

    model: str = "demo-g"
    weights: str | None = None  # a local safetensors file (or a weights-only torch file) instead of the hub
    layer: int | None = None  # ViT block to read, counted from 0 and from the end when negative; None = the last
    pool: str = "auto"  # auto (class token where there is one, otherwise mean), cls, mean
    size: int | None = None  # input size in pixels; None: the model's own, or of a ViT the images' (`own_size`)
    batch_size: int = count(64)
    precision: str = "auto"  # auto, fp32, bf16


SEGMENT_METHODS = ("stego", "patch_kmeans")
MOST_TIMESTEPS = 100_000  # of a schedule, which is held in memory


@dataclass
class SegmentsConfig(Checked):
    """Segments without labels: STEGO's head on frozen patch features, or plain k-means on them."""

    method: str = one_of(*SEGMENT_METHODS)
    width: int = count(70)  # of the code
    steps: int = count(1000)  # at most
    batch_size: int = count(16, least=2)  # images, each with one of its neighbours
    lr: float = above_0(5e-4)
    neighbours: int = count(7)  # of each image: the most similar other ones
    # b of Eq. 4 for an image and itself, a neighbour, another image, and what each term weighs in Eq. 5. Centred cosines have
    # mean 0, so one b does for all three; at 0.3 some 18, 17 and 12% of the pairs of DINOv2's patches attract each other.
    self_shift: float = 0.3
    knn_shift: float = 0.3
    random_shift: float = 0.3
    self_weight: float = 0.67
    knn_weight: float = 0.25
    random_weight: float = 0.63
    centre: bool = True  # correspondences less their mean over an image (Eq. 3)
    zero_clamp: bool = True  # codes that are already opposed are not pushed further apart
    patience: int = count(3)  # stop when so many windows of 50 steps have not lowered the mean loss ...
    min_improvement: float = 0.03  # ... by this share of it
    images: int = count(4000)  # at most this many images' patch features are used for the fit
    crops: bool = False  # learn from the four corners and the centre of each image, half its sides each
    augment: bool = False  # learn from images with their colours changed a little, half of them mirrored
    flips: bool = True  # average with the mirrored image
    weights: str | None = None  # an official STEGO checkpoint instead of a fit; its g: DINO ViT-B/8

    def rules(self) -> Rules:
        own = self.method == "stego" or not self.weights
        yield "weights", own, "belongs to annotator.segments.method=stego"


@dataclass
class AnnotatorConfig(Checked):
    """f: what turns features into guidance signals."""

    kind: str = "clusters"  # clusters (k-means), boxes (LOST), segments (STEGO), oracle (ground truth of the shards);
    # for comparison: random ids, or g's own vectors: features, centroids, neighbours
    k: int = count(300)  # clusters, or classes of the segments
    niter: int = count(30)
    # of k-means, the best is kept: worth it on a few thousand images, slow and needless on a million
    restarts: int = count(1)
    seed: int = setting(0, lambda seed: 0 <= seed < 2**31, "from 0 to 2147483647")
    sample: int = count(1_000_000)  # at most this many features are held in memory to fit f
    # k-means: sample (in memory), stream (passes over all files), auto: sample where it holds all
    fit: str = one_of("auto", "sample", "stream")
    shuffle: float = share(0.0)  # share of the ids that is shuffled among images (the paper's Figure 3)
    keys_layer: int = -1  # boxes: the ViT block whose keys LOST reads, counted as features.layer is
    keys_flips: bool = False  # boxes: average the keys with the mirrored image's: steadier boxes for twice the time
    k_patches: int = count(100)  # boxes: LOST's patches of lowest degree among which the seed expands
    centre: bool = False  # boxes: take the set's mean key off first: needed with DINOv2, not with LOST's own DINO
    # boxes, with centre: from the mean of the whole set (0) to that of each place in it (1)
    centre_place: float = share(0.0)
    truth: str = "labels"  # oracle: labels, boxes, masks, or none (no guidance)
    neighbours: int = count(10)  # neighbours: one of this many nearest images gives the vector
    reuse: str | None = None  # annotation set, run or annotator/ folder whose f, already fitted, is taken as it is
    extend: str | None = None  # clusters, boxes: likewise, but k centroids of the new images are added to its own
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)

    def rules(self) -> Rules:
        yield "fit", self.fit != "stream" or not self.extend, "auto or sample with annotator.extend"
        yield "centre_place", self.centre or not self.centre_place, "belongs to annotator.centre=true"


_ANY = ("clusters", "boxes", "segments", "oracle", "random", "features", "centroids", "neighbours")
_KMEANS = ("clusters", "boxes", "centroids")
READ_BY = {  # which kinds of annotator read a setting
    **dict.fromkeys(("kind", "seed", "shuffle", "reuse"), _ANY),  # shuffle says itself where it has nothing to shuffle
    **dict.fromkeys(("niter", "restarts", "fit"), _KMEANS),
    **dict.fromkeys(("keys_layer", "keys_flips", "k_patches", "centre", "centre_place"), ("boxes",)),
    "k": (*_KMEANS, "segments", "random"),
    "sample": (*_KMEANS, "neighbours"),
    "extend": ("clusters", "boxes"),
    "truth": ("oracle",),
    "neighbours": ("neighbours",),
    "segments": ("segments",),
}


@dataclass
class AnnotateConfig(Checked):
    shards: str = "???"  # glob, brace list or URL of source shards
    out: str = "???"  # folder of the annotation set
    autoencoder: str = "???"  # name under autoencoders/, a folder with a manifest, or a diffusers folder
    size: int | None = count(None, least=8)  # pixels; None = the size of the first image
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    flips: bool = False  # store the mirrored image's latent too
    precision: str = "auto"  # of the first stage: auto, fp32, bf16 (latents move by under 1% of their spread)
    workers: int = -1  # decoding processes; -1 = one a core, less one
    max_skipped: float = share(0.01)  # share of images that may be unreadable before the command fails
    allow_damaged: bool = False  # go on with what is whole of shards that are damaged or cut off
    device: str = "auto"
    executor: str = "local"  # or ray
    processes: int = 0  # at once; 0 = one a GPU (Ray: of the cluster's), or one
    address: str | None = None  # of a Ray cluster, ray://HOST:PORT; null = $RAY_ADDRESS, or one of this machine alone
    buckets: bool = False  # images as they are, of one shape a shard, as `pack --buckets` writes them

    def check(self, prefix: str = "") -> None:
        super().check(prefix)
        check_workers(self)

    def rules(self) -> Rules:
        yield "size", not self.buckets or self.size is None, "with buckets=true images keep their own; null"

    def check_given(self, layers: list[Any]) -> None:
        """InputError for a setting of the annotator that was given together with its kind, or on top of it, and that this kind
        does not read; `layers`: the mappings that made this config. What lies below an exchanged kind was for another one."""
        given = [layer.get("annotator") or {} for layer in layers]
        start = max((i for i, layer in enumerate(given) if "kind" in layer), default=0)
        usual = asdict(AnnotatorConfig())  # all of which `--dry-run` prints
        for key, value in ((key, value) for layer in given[start:] for key, value in layer.items()):
            readers = READ_BY[key]
            if value != usual[key] and self.annotator.kind in _ANY and self.annotator.kind not in readers:
                raise InputError(
                    f"annotator.{key}={value}: annotator.kind={self.annotator.kind} does not read it; {', '.join(readers)} "
                    f"{'does' if len(readers) == 1 else 'do'}"
                )
        reused = max((i for i, layer in enumerate(given) if layer.get("reuse")), default=None)
        if reused is not None and (path := annotator_folder(str(self.annotator.reuse)) / "annotator.yaml").is_file():
            there = read_mapping(path, {"config": dict, "state": dict})
            own = flat(there["config"] | {"k": there["state"].get("k")})
            for key, value in flat(OmegaConf.to_container(OmegaConf.merge(*given[reused:]))).items():  # type: ignore[arg-type]
                if key not in ("kind", "reuse", "extend") and own.get(key, value) != value:
                    reused_from = f"{self.annotator.reuse}, reused, has {own.get(key)}"
                    raise InputError(f"annotator.{key}={value}: leave it out: {reused_from}")


@dataclass
class DistillConfig:
    """A small g from a large one, without labels: the student repeats the teacher's centred, partly whitened features."""

    teacher: FeaturesConfig = field(default_factory=FeaturesConfig)
    images: list[str] = field(default_factory=list)  # globs of image files or shards, FILE.parquet?IMAGE,LABEL columns
    probes: Any = None  # mapping name -> one such source with labels, whose k-means NMI goes in the manifest
    out: str = "???"
    student: str = "resnet18"  # timm model
    kwargs: Any = None  # its arguments (num_classes = width of the features is set from `width`)
    size: int = 64  # pixels of the images that the student sees
    input: int = 96  # pixels at which it reads them
    width: int = 96  # principal components of the teacher's features that are kept
    whiten: float = 0.75  # power of the eigenvalues' roots that is divided out: 0 = plain PCA, 1 = whitening
    views: int = 6  # random crops and flips of each image, the first is the whole image
    crop: float = 0.35  # smallest share of the image's area that a view shows
    steps: int = 2400
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0
    device: str = "auto"
    licence: str = "Apache-2.0"
    note: str = ""


@dataclass
class ModelConfig(Checked):
    """The UNet. Latent size and channels, number of labels and spatial channels come from the annotation set."""

    channels: int = count(128)
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    blocks: int = count(2)  # residual blocks a level
    attention: list[int] = field(default_factory=lambda: [4])  # downsampling factors that have attention
    heads: int = count(8)
    dropout: float = 0.0
    # how k meets the time embedding: concat (paper, ImageNet), add (its VOC/COCO net), none (tokens alone)
    inject: str = one_of("concat", "add", "none")
    hidden: int = 256  # width of the two-layer SiLU MLP that embeds k
    tokens: str = one_of("vector", "concepts", "none")  # cross-attention reads: T tokens made of k, or one a present id
    num_tokens: int = 8
    token_width: int = 32
    scale_shift: bool = False  # time and k scale and shift each block's second norm, instead of being added before it
    residual_updown: bool = False  # halve and double in residual blocks instead of by a convolution; with tokens: none

    def check(self, prefix: str = "model.") -> None:
        super().check(prefix)

    def rules(self) -> Rules:
        yield "inject", self.inject != "none" or self.tokens != "none", "not with tokens=none: it would read no signal"
        what = "tokens=none alone: diffusers' cross-attention blocks halve and double by convolutions"
        yield "residual_updown", self.tokens == "none" or not self.residual_updown, what
        levels = [2**level for level in range(len(self.multipliers))]
        yield (
            "attention",
            set(self.attention) <= set(levels),
            f"no level has such a downsampling factor; there are {levels}",
        )
        for m in self.multipliers:
            yield "heads", self.channels * m % self.heads == 0, f"does not divide {self.channels * m} channels"


@dataclass
class ReplayConfig(Checked):
    """Images of an earlier annotation set, with the same labels, among the new ones."""

    annotation: str | None = None
    share: float = below_1(0.0)  # of each batch

    def rules(self) -> Rules:
        yield "share", self.annotation or not self.share, "give replay.annotation"


@dataclass
class GuidanceConfig(Checked):
    drop: float = share(0.1)  # share of samples trained with the null; 1.0 = the no-guidance baseline
    # weight of a loss that ties the attention of each concept's token to where the concept is
    attention: float = from_0(0.0)
    # of the signals that are read: [] = all, [concepts] = the ids of what is there
    parts: list[str] = field(default_factory=list)

    def rules(self) -> Rules:
        yield "attention", self.parts or not self.attention, "with guidance.parts=[concepts]"
        yield "parts", self.parts in ([], ["concepts"]), "[] (all) or [concepts]"


@dataclass
class ObjectiveConfig(Checked):
    kind: str = one_of("eps", "v", "x0", "flow")  # what a network predicts
    schedule: str = one_of("linear", "scaled_linear", "squaredcos_cap_v2")  # scaled_linear: linear in sqrt(beta)
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    timesteps: int = setting(
        1000, lambda n: type(n) is int and 2 <= n <= MOST_TIMESTEPS, f"a whole number from 2 to {MOST_TIMESTEPS:,}"
    )
    zero_snr: bool = False  # v, x0: betas rescaled so that the last time is pure noise (Lin et al., 2023)
    shift: float = above_0(1.0)  # sigma / alpha times this: above 1 more noise, for latents of many channels or pixels
    min_snr: float | None = above_0(None)  # gamma of min-SNR weighting (Hang et al., 2023); None = no weighting

    def rules(self) -> Rules:
        yield "min_snr", self.min_snr is None or self.kind != "flow", "flow has no min-SNR weighting; null"
        yield "beta_end", 0 < self.beta_start <= self.beta_end < 1, "0 < objective.beta_start <= objective.beta_end < 1"
        fits = self.kind in ("v", "x0") or not self.zero_snr
        yield "zero_snr", fits, "for kind v or x0: eps says nothing of the image at pure noise, and flow has it already"


@dataclass
class TrainConfig(Checked):
    annotation: str = "???"
    out: str = "???"
    model: Any = "s"  # a name under configs/model/ or the mapping itself
    steps: int = count(100_000)
    batch_size: int = count(128)  # over all devices
    accumulate: int = count(1)  # parts that a batch is taken in, one after the other: the same result in less memory
    crop: int | None = None  # pixels: learn from random squares of this side, out of an annotation set of larger images
    lr: float = above_0(1e-4)
    weight_decay: float = from_0(0.01)
    warmup: int = from_0(1000)
    decay: float = share(0.0)  # over this last share of the steps the learning rate falls linearly to zero
    ema: float = below_1(0.9999)
    clip: float = from_0(1.0)
    seed: int = 0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    precision: str = "auto"  # auto, fp32, bf16
    # auto: on CUDA; its first step takes minutes
    compile: Any = one_of("auto", True, False)  # noqa: RUF009
    channels_last: bool = False
    gradient_checkpointing: bool = False  # activations are computed twice instead of kept: large nets in little memory
    # learn from so many shards' images at a time; 0 = from all; null = 0, of a remote set 32
    block_shards: int | None = count(None, least=0)
    cache_gb: float = above_0(50.0)  # of a remote set's shards that are kept on this machine
    leave_out: str | None = None  # list of images of the set that are not learnt from, as `ldm-sg dedup` writes it
    init: str | None = None  # run to start from; labels that it does not know start from those like them
    lora: int = from_0(0)  # rank of adapters that are trained in place of the UNet's weights; 0 = none
    only: list[str] = field(default_factory=list)  # train but the UNet's parameters with one of these in their names
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    # stop after so many validations without a lower FD of samples, in g's features, to held-out images
    patience: int = from_0(0)
    device: str = "auto"
    devices: int = -1  # how many; -1 = all
    # auto, ddp: the whole net on each device; fsdp: each holds its share, for nets too large for one
    strategy: str = one_of("auto", "ddp", "fsdp")
    workers: int = 2
    val_share: float = below_1(0.02)
    logger: str = one_of("tensorboard", "wandb")  # wandb: there too
    log_every: int = count(50)
    val_every: int = from_0(1000)
    sample_every: int = from_0(2000)
    checkpoint_every: int = count(1000)
    # EMA weights of every N-th step stay in checkpoints/, for `--checkpoint STEP`; 0 = none
    keep_every: int = from_0(0)

    def rules(self) -> Rules:
        alone = self.strategy != "fsdp" or self.compile is not True
        yield "compile", alone, "not with strategy=fsdp, whose blocks come and go; auto or false"
        wandb = self.logger != "wandb" or find_spec("wandb")
        yield "logger", wandb, "that package is not installed: pip install 'ldm-sg[wandb]'"
        for name in ("lora", "only"):
            yield name, self.init or not getattr(self, name), "needs init=RUN, which it starts from"
        yield "only", not (self.only and self.lora), "either lora or only"
        held_out = self.val_every * self.val_share > 0
        yield "patience", held_out or not self.patience, "needs held-out images: val_every and val_share above 0"
        tied = self.guidance.attention and self.gradient_checkpointing
        yield "gradient_checkpointing", not tied, "not with guidance.attention, whose pass would be made again"
        model = model_config(self.model)
        widest = model.channels * max(model.multipliers, default=1)
        yield "lora", self.lora <= widest, f"at most {widest}, the width of the network's widest level"


@dataclass
class FitAutoencoderConfig(Checked):
    """A small KL autoencoder, whose factor is patch * 2 ** (len(widths) - 1), or `init`'s network fitted on."""

    shards: Any = "???"  # glob, or mapping name -> glob; the first one's latents are those that come out normalised
    out: str = "???"  # folder of the fit, and of the autoencoder: `autoencoder=OUT` uses it
    name: str | None = None  # None = the folder's name
    init: str | None = None  # an autoencoder (kl, tiny) to start from, with its own channels, patch, widths and blocks
    part: str = "all"  # what is fitted: all, or with init its decoder alone (latents stay what they are)
    holdout: dict[str, int] = field(default_factory=dict)  # name -> how many of its last images are not trained on
    val_shards: dict[str, str] = field(default_factory=dict)  # name -> glob of held-out images
    zoom: dict[str, float] = field(default_factory=dict)  # name -> read at zoom * size pixels, for random crops
    size: int = count(64)
    channels: int = count(8)  # latent channels
    patch: int = count(2)  # pixel-unshuffle before the network: the full resolution is where the time goes
    widths: list[int] = field(default_factory=lambda: [56, 80, 96])  # one a level
    blocks: int = count(1)  # residual blocks a level
    noise: float = 0.3  # training latents get noise of up to this many of their own stds
    kl: float = 1e-3  # per pixel, beside an L1 of images in [-1, 1]
    half: float = 0.25  # weight of: half-size latents decode to half-size images
    lpips: float = 0.3
    lpips_weights: str | None = None  # safetensors of torchvision's AlexNet features; None = torchvision downloads them
    lpips_size: int = 64  # smaller images are enlarged to this first
    gan: float = 0.0  # weight of the PatchGAN, relative to the reconstruction's gradient
    gan_start: float = 0.6  # share of the steps after which it begins
    gan_lr: float = 5e-4  # of its critic, which starts from nothing whatever the autoencoder starts from
    steps: int = count(10_000)
    batch_size: int = count(32)
    lr: float = 1e-3
    ema: float = 0.999
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    workers: int = -1
    log_every: int = count(50)
    val_every: int = count(500)
    checkpoint_every: int = count(250)
    licence: str = "Apache-2.0"
    data: str = ""  # goes into the manifest: what the images were, under which terms
    recipe: str = ""  # likewise: the command

    def rules(self) -> Rules:
        decoder = self.part == "decoder" and self.init is not None
        yield "part", self.part == "all" or decoder, "all, or with init= decoder"
        fitting = self.widths and all(w >= 8 and w % 8 == 0 for w in self.widths)
        yield "widths", fitting, "one multiple of 8 a level (group norm has 8 groups)"
        factor = self.patch * 2 ** (len(self.widths) - 1)
        what = f"patch and widths make a factor of {factor}; give a multiple of {2 * factor}"
        yield "size", self.init is not None or self.size % (2 * factor) == 0, what
        yield "shards", isinstance(self.shards, str | dict), "a glob, or a mapping from names to globs"
        names = list(self.shards) if isinstance(self.shards, dict) else ["train"]
        for key in ("holdout", "zoom"):
            for name in getattr(self, key):
                yield key, name in names, f"{name}: no such entry under shards; {choices(name, names)}"
        yield "zoom", all(z >= 1 for z in self.zoom.values()), "at least 1"


def model_config(model: Any) -> ModelConfig:
    """`TrainConfig.model`: a name under configs/model/, a YAML path, or the mapping itself -> ModelConfig."""
    if isinstance(model, str) and not model.endswith(".yaml"):
        folder = ROOT / "configs" / "model"
        if not (path := folder / f"{model}.yaml").is_file():
            raise InputError(f"model {model!r} not found; {choices(model, [p.stem for p in folder.glob('*.yaml')])}")
        return load(ModelConfig, path)
    return load(ModelConfig, model)


def check_workers(of: Any) -> None:
    """InputError where `executor`, `processes` and `address` mean nothing."""
    for name, fits, what in (
        ("executor", of.executor in ("local", "ray"), "local or ray"),
        ("processes", of.processes >= 0, "0 (one a GPU, or one) or more"),
        ("address", not of.address or of.executor == "ray", "belongs to executor=ray"),
    ):
        if not fits:
            raise InputError(f"{name}={getattr(of, name)}: {what}")
