"""Configs: one dataclass a verb, with what its values may be. Nothing here builds anything (that is `build`)."""

import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_sg.configfile import ROOT, check_keys, load
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import annotator_folder, flat, read_mapping


@dataclass
class FeaturesConfig:
    """g: a shipped extractor's name or folder, a timm model's name, or `open_clip:MODEL[/PRETRAINED]`."""

    model: str = "demo-g"
    weights: str | None = None  # a local safetensors file (or a weights-only torch file) instead of the hub
    layer: int | None = None  # ViT block to read, counted from 0 and from the end when negative; None = the last
    pool: str = "auto"  # auto (class token where there is one, otherwise mean), cls, mean
    size: int | None = None  # input size in pixels; None = the model's own
    batch_size: int = 64
    precision: str = "auto"  # auto, fp32, bf16


SEGMENT_METHODS = ("stego", "patch_kmeans")
KINDS = ("eps", "v", "x0", "flow")  # what a network predicts
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MOST_TIMESTEPS = 100_000  # of a schedule, which is held in memory


@dataclass
class SegmentsConfig:
    """Segments without labels: STEGO's head on frozen patch features, or plain k-means on them."""

    method: str = "stego"  # stego, patch_kmeans
    width: int = 70  # of the code
    steps: int = 1000  # at most
    batch_size: int = 16  # images, each with one of its neighbours
    lr: float = 5e-4
    neighbours: int = 7  # of each image: the most similar other ones
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
    patience: int = 3  # stop when so many windows of 50 steps have not lowered the mean loss ...
    min_improvement: float = 0.03  # ... by this share of it
    images: int = 4000  # at most this many images' patch features are used for the fit
    crops: bool = False  # learn from the four corners and the centre of each image, half its sides each
    augment: bool = False  # learn from images with their colours changed a little, half of them mirrored
    flips: bool = True  # average with the mirrored image
    weights: str | None = None  # an official STEGO checkpoint instead of a fit; its g: DINO ViT-B/8

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        _need("annotator.segments.method", self.method, self.method in SEGMENT_METHODS, "stego or patch_kmeans")
        least = {"width": 1, "steps": 1, "batch_size": 2, "neighbours": 1, "patience": 1, "images": 1}
        for name, n in least.items():
            _need(f"annotator.segments.{name}", getattr(self, name), getattr(self, name) >= n, f"at least {n}")
        own = self.method == "stego" or not self.weights
        _need("annotator.segments.weights", self.weights, own, "belongs to annotator.segments.method=stego")
        _need("annotator.segments.lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")


@dataclass
class AnnotatorConfig:
    """f: what turns features into guidance signals."""

    kind: str = "clusters"  # clusters (k-means), boxes (LOST), segments (STEGO), oracle (ground truth of the shards);
    # for comparison: random ids, or g's own vectors: features, centroids, neighbours
    k: int = 300  # clusters, or classes of the segments
    niter: int = 30
    restarts: int = 1  # of k-means, the best is kept: worth it on a few thousand images, slow and needless on a million
    seed: int = 0
    sample: int = 1_000_000  # at most this many features are held in memory to fit f
    fit: str = "auto"  # k-means: sample (in memory), stream (passes over all files), auto: sample where it holds all
    shuffle: float = 0.0  # share of the ids that is shuffled among images (the paper's Figure 3)
    keys_layer: int = -1  # boxes: the ViT block whose keys LOST reads, counted as features.layer is
    keys_flips: bool = False  # boxes: average the keys with the mirrored image's: steadier boxes for twice the time
    k_patches: int = 100  # boxes: LOST's patches of lowest degree among which the seed expands
    centre: bool = False  # boxes: take the set's mean key off first: needed with DINOv2, not with LOST's own DINO
    centre_place: float = 0.0  # boxes, with centre: from the mean of the whole set (0) to that of each place in it (1)
    truth: str = "labels"  # oracle: labels, boxes, masks, or none (no guidance)
    neighbours: int = 10  # neighbours: one of this many nearest images gives the vector
    reuse: str | None = None  # annotation set, run or annotator/ folder whose f, already fitted, is taken as it is
    extend: str | None = None  # clusters, boxes: likewise, but k centroids of the new images are added to its own
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)


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
class AnnotateConfig:
    shards: str = "???"  # glob, brace list or URL of source shards
    out: str = "???"  # folder of the annotation set
    autoencoder: str = "???"  # name under autoencoders/, a folder with a manifest, or a diffusers folder
    size: int | None = None  # pixels; None = the size of the first image
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    flips: bool = False  # store the mirrored image's latent too
    precision: str = "auto"  # of the first stage: auto, fp32, bf16 (latents move by under 1% of their spread)
    workers: int = -1  # decoding processes; -1 = one a core, less one
    max_skipped: float = 0.01  # share of images that may be unreadable before the command fails
    allow_damaged: bool = False  # go on with what is whole of shards that are damaged or cut off
    device: str = "auto"
    executor: str = "local"  # or ray
    processes: int = 0  # at once; 0 = one a GPU (Ray: of the cluster's), or one
    address: str | None = None  # of a Ray cluster, ray://HOST:PORT; null = $RAY_ADDRESS, or one of this machine alone
    buckets: bool = False  # images as they are, of one shape a shard, as `pack --buckets` writes them

    def check(self) -> None:
        """Raises InputError for a value that cannot be, before anything heavy is imported."""
        check_workers(self)
        for name in ("k", "niter", "restarts", "sample", "k_patches", "neighbours"):
            value = getattr(self.annotator, name)
            _need(f"annotator.{name}", value, value >= 1, "at least 1")
        fit, extend = self.annotator.fit, self.annotator.extend
        _need("annotator.fit", fit, fit in ("auto", "sample", "stream"), "auto, sample or stream")
        _need("annotator.fit", fit, fit != "stream" or not extend, "auto or sample with annotator.extend")
        seed = self.annotator.seed
        _need("annotator.seed", seed, 0 <= seed < 2**31, "from 0 to 2147483647")
        place = self.annotator.centre_place
        _need("annotator.centre_place", place, 0 <= place <= 1, "a share between 0 and 1")
        _need("annotator.centre_place", place, self.annotator.centre or not place, "belongs to annotator.centre=true")
        _need("annotator.shuffle", self.annotator.shuffle, 0 <= self.annotator.shuffle <= 1, "a share between 0 and 1")
        _need("size", self.size, self.size is None or self.size >= 8, "at least 8 pixels, or null")
        _need("size", self.size, not self.buckets or self.size is None, "with buckets=true images keep their own; null")
        _need("features.batch_size", self.features.batch_size, self.features.batch_size >= 1, "at least 1")
        _need("max_skipped", self.max_skipped, 0 <= self.max_skipped <= 1, "a share between 0 and 1")

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
                same = key in ("kind", "reuse", "extend") or own.get(key, value) == value
                said = f"leave it out: {self.annotator.reuse}, reused, has {own.get(key)}"
                _need(f"annotator.{key}", value, same, said)


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
class ModelConfig:
    """The UNet. Latent size and channels, number of labels and spatial channels come from the annotation set."""

    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    blocks: int = 2  # residual blocks a level
    attention: list[int] = field(default_factory=lambda: [4])  # downsampling factors that have attention
    heads: int = 8
    dropout: float = 0.0
    inject: str = "concat"  # how k meets the time embedding: concat (paper, ImageNet), add (its VOC/COCO net), none (tokens alone)
    hidden: int = 256  # width of the two-layer SiLU MLP that embeds k
    tokens: str = "vector"  # cross-attention reads: vector (T tokens made of k), concepts (one a present id), none
    num_tokens: int = 8
    token_width: int = 32
    scale_shift: bool = False  # time and k scale and shift each block's second norm, instead of being added before it
    residual_updown: bool = False  # halve and double in residual blocks instead of by a convolution; with tokens: none


@dataclass
class ReplayConfig:
    """Images of an earlier annotation set, with the same labels, among the new ones."""

    annotation: str | None = None
    share: float = 0.0  # of each batch


@dataclass
class GuidanceConfig:
    drop: float = 0.1  # share of samples trained with the null; 1.0 = the no-guidance baseline
    attention: float = 0.0  # weight of a loss that ties the attention of each concept's token to where the concept is
    parts: list[str] = field(
        default_factory=list
    )  # of the signals that are read: [] = all, [concepts] = the ids of what is there


@dataclass
class ObjectiveConfig:
    kind: str = "eps"  # eps, v, x0, flow
    schedule: str = "linear"  # linear, scaled_linear (linear in sqrt(beta)), squaredcos_cap_v2
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    timesteps: int = 1000
    zero_snr: bool = False  # v, x0: betas rescaled so that the last time is pure noise (Lin et al., 2023)
    shift: float = 1.0  # sigma / alpha times this: above 1 more noise, for latents of many channels or pixels
    min_snr: float | None = None  # gamma of min-SNR weighting (Hang et al., 2023); None = no weighting

    def check(self) -> None:
        """Raises InputError for a value, or a combination of them, that cannot be."""
        for name, allowed in (("kind", KINDS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"objective.{name}={value!r}; {choices(value, allowed)}")
        gamma = self.min_snr
        _need("objective.min_snr", gamma, gamma is None or 0 < gamma < math.inf, "null, or above 0")
        _need("objective.min_snr", gamma, gamma is None or self.kind != "flow", "flow has no min-SNR weighting; null")
        check_timesteps("objective.timesteps", self.timesteps)
        betas = (self.beta_start, self.beta_end)
        _need("objective.beta_start, beta_end", betas, 0 < betas[0] <= betas[1] < 1, "0 < beta_start <= beta_end < 1")
        _need("objective.shift", self.shift, 0 < self.shift < math.inf, "a finite number above 0")
        velocity = self.kind in ("v", "x0")
        _need("objective.zero_snr", self.zero_snr, velocity or not self.zero_snr, "for kind v or x0: eps says nothing of "
              "the image at pure noise, and flow has it already")  # fmt: skip


@dataclass
class TrainConfig:
    annotation: str = "???"
    out: str = "???"
    model: Any = "s"  # a name under configs/model/ or the mapping itself
    steps: int = 100_000
    batch_size: int = 128  # over all devices
    accumulate: int = 1  # parts that a batch is taken in, one after the other: the same result in less memory
    crop: int | None = None  # pixels: learn from random squares of this side, out of an annotation set of larger images
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 1000
    decay: float = 0.0  # over this last share of the steps the learning rate falls linearly to zero
    ema: float = 0.9999
    clip: float = 1.0
    seed: int = 0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    precision: str = "auto"  # auto, fp32, bf16
    compile: Any = "auto"  # auto (on CUDA), true, false; its first step takes minutes
    channels_last: bool = False
    gradient_checkpointing: bool = False  # activations are computed twice instead of kept: large nets in little memory
    block_shards: int | None = (
        None  # learn from so many shards' images at a time; 0 = from all; null = 0, of a remote set 32
    )
    cache_gb: float = 50.0  # of a remote set's shards that are kept on this machine
    leave_out: str | None = None  # list of images of the set that are not learnt from, as `ldm-sg dedup` writes it
    init: str | None = None  # run to start from; labels that it does not know start from those like them
    lora: int = 0  # rank of adapters that are trained in place of the UNet's weights; 0 = none
    only: list[str] = field(default_factory=list)  # train but the UNet's parameters with one of these in their names
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    patience: int = (
        0  # stop after so many validations without a lower FD of samples, in g's features, to held-out images
    )
    device: str = "auto"
    devices: int = -1  # how many; -1 = all
    strategy: str = "auto"  # auto, ddp: the whole net on each; fsdp: each holds its share, for nets too large for one
    workers: int = 2
    val_share: float = 0.02
    logger: str = "tensorboard"  # wandb: there too
    log_every: int = 50
    val_every: int = 1000
    sample_every: int = 2000
    checkpoint_every: int = 1000
    keep_every: int = 0  # EMA weights of every N-th step stay in checkpoints/, for `--checkpoint STEP`; 0 = none

    def check(self) -> None:
        """Raises InputError for a value that cannot be, before anything heavy is imported."""
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every"):
            _need(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _need("strategy", self.strategy, self.strategy in ("auto", "ddp", "fsdp"), "auto, ddp or fsdp")
        _need("compile", self.compile, self.compile in ("auto", True, False), "auto, true or false")
        _need(
            "block_shards", self.block_shards, self.block_shards is None or self.block_shards >= 0, "0 or more, or null"
        )
        _need("cache_gb", self.cache_gb, 0 < self.cache_gb < math.inf, "above 0")
        alone = self.strategy != "fsdp" or self.compile is not True
        _need("compile", self.compile, alone, "not with strategy=fsdp, whose blocks come and go; auto or false")
        for name in ("warmup", "lora", "patience", "val_every", "sample_every", "keep_every", "weight_decay", "clip"):
            _need(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        _need("logger", self.logger, self.logger in ("tensorboard", "wandb"), "tensorboard or wandb")
        wandb = self.logger != "wandb" or find_spec("wandb") is not None
        _need("logger", self.logger, wandb, "that package is not installed: pip install 'ldm-sg[wandb]'")
        _need("lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        _need("ema", self.ema, 0 <= self.ema < 1, "from 0 to below 1")
        _need("val_share", self.val_share, 0 <= self.val_share < 1, "a share from 0 to below 1")
        for name, share in (("guidance.drop", self.guidance.drop), ("decay", self.decay)):
            _need(name, share, 0 <= share <= 1, "a share between 0 and 1")
        _need("replay.share", self.replay.share, 0 <= self.replay.share < 1, "a share from 0 to below 1")
        attention = self.guidance.attention
        _need("guidance.attention", attention, 0 <= attention < math.inf, "0 or more")
        _need(
            "guidance.attention",
            attention,
            not attention or bool(self.guidance.parts),
            "with guidance.parts=[concepts]",
        )
        _need(
            "guidance.parts", self.guidance.parts, self.guidance.parts in ([], ["concepts"]), "[] (all) or [concepts]"
        )
        _need(
            "replay.share",
            self.replay.share,
            not self.replay.share or bool(self.replay.annotation),
            "give replay.annotation",
        )
        for name in ("lora", "only"):
            _need(
                name,
                getattr(self, name),
                bool(self.init) or not getattr(self, name),
                "needs init=RUN, which it starts from",
            )
        _need("only", self.only, not (self.only and self.lora), "either lora or only")
        _need("patience", self.patience, not self.patience or self.val_every * self.val_share > 0, "needs held-out images: "
              "val_every and val_share above 0")  # fmt: skip
        self.objective.check()
        model = model_config(self.model)
        widest = model.channels * max(model.multipliers, default=1)
        _need("lora", self.lora, self.lora <= widest, f"at most {widest}, the width of the network's widest level")


@dataclass
class FitAutoencoderConfig:
    """A small KL autoencoder, whose factor is patch * 2 ** (len(widths) - 1), or `init`'s network fitted on."""

    shards: Any = "???"  # glob, or mapping name -> glob; the first one's latents are those that come out normalised
    out: str = "???"  # folder of the fit, and of the autoencoder: `autoencoder=OUT` uses it
    name: str | None = None  # None = the folder's name
    init: str | None = None  # an autoencoder (kl, tiny) to start from, with its own channels, patch, widths and blocks
    part: str = "all"  # what is fitted: all, or with init its decoder alone (latents stay what they are)
    holdout: dict[str, int] = field(default_factory=dict)  # name -> how many of its last images are not trained on
    val_shards: dict[str, str] = field(default_factory=dict)  # name -> glob of held-out images
    zoom: dict[str, float] = field(default_factory=dict)  # name -> read at zoom * size pixels, for random crops
    size: int = 64
    channels: int = 8  # latent channels
    patch: int = 2  # pixel-unshuffle before the network: the full resolution is where the time goes
    widths: list[int] = field(default_factory=lambda: [56, 80, 96])  # one a level
    blocks: int = 1  # residual blocks a level
    noise: float = 0.3  # training latents get noise of up to this many of their own stds
    kl: float = 1e-3  # per pixel, beside an L1 of images in [-1, 1]
    half: float = 0.25  # weight of: half-size latents decode to half-size images
    lpips: float = 0.3
    lpips_weights: str | None = None  # safetensors of torchvision's AlexNet features; None = torchvision downloads them
    lpips_size: int = 64  # smaller images are enlarged to this first
    gan: float = 0.0  # weight of the PatchGAN, relative to the reconstruction's gradient
    gan_start: float = 0.6  # share of the steps after which it begins
    gan_lr: float = 5e-4  # of its critic, which starts from nothing whatever the autoencoder starts from
    steps: int = 10_000
    batch_size: int = 32
    lr: float = 1e-3
    ema: float = 0.999
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    workers: int = -1
    log_every: int = 50
    val_every: int = 500
    checkpoint_every: int = 250
    licence: str = "Apache-2.0"
    data: str = ""  # goes into the manifest: what the images were, under which terms
    recipe: str = ""  # likewise: the command

    def check(self) -> None:
        """Raises InputError for a value that cannot be, before anything heavy is imported."""
        counts = ("size", "channels", "patch", "blocks", "steps", "batch_size", "log_every", "val_every")
        for name in (*counts, "checkpoint_every"):
            _need(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        decoder = self.part == "decoder" and self.init is not None
        _need("part", self.part, self.part == "all" or decoder, "all, or with init= decoder")
        fitting = bool(self.widths) and all(w >= 8 and w % 8 == 0 for w in self.widths)
        _need("widths", self.widths, fitting, "one multiple of 8 a level (group norm has 8 groups)")
        factor = self.patch * 2 ** (len(self.widths) - 1)
        what = f"patch and widths make a factor of {factor}; give a multiple of {2 * factor}"
        _need("size", self.size, self.init is not None or self.size % (2 * factor) == 0, what)
        _need("shards", self.shards, isinstance(self.shards, str | dict), "a glob, or a mapping from names to globs")
        names = list(self.shards) if isinstance(self.shards, dict) else ["train"]
        for key in ("holdout", "zoom"):
            for name in getattr(self, key):
                if name not in names:
                    raise InputError(f"{key}.{name}: no such entry under shards; {choices(name, names)}")
        _need("zoom", self.zoom, all(z >= 1 for z in self.zoom.values()), "at least 1")


def model_config(model: Any) -> ModelConfig:
    """`TrainConfig.model`: a name under configs/model/, a YAML path, or the mapping itself -> ModelConfig."""
    if isinstance(model, str):
        path = Path(model) if model.endswith(".yaml") else ROOT / "configs" / "model" / f"{model}.yaml"
        if not path.is_file():
            names = [p.stem for p in (ROOT / "configs" / "model").glob("*.yaml")]
            raise InputError(f"model {model!r} not found; {choices(model, names)}")
        return load(ModelConfig, path)
    merged = OmegaConf.structured(ModelConfig)
    layer = OmegaConf.create(model)
    check_keys(layer, merged, "model", "model.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(merged, layer))  # type: ignore[return-value]
    except OmegaConfBaseException as err:
        raise InputError(f"model: {str(err).splitlines()[0]}") from err


def check_timesteps(name: str, value: Any) -> None:
    """InputError where a schedule cannot have so many times; `name` says where they are asked for."""
    right = type(value) is int and 2 <= value <= MOST_TIMESTEPS
    _need(name, value, right, f"a whole number from 2 to {MOST_TIMESTEPS:,}")


def check_workers(of: Any) -> None:
    """InputError where `executor`, `processes` and `address` mean nothing."""
    _need("executor", of.executor, of.executor in ("local", "ray"), "local or ray")
    _need("processes", of.processes, of.processes >= 0, "0 (one a GPU, or one) or more")
    _need("address", of.address, not of.address or of.executor == "ray", "belongs to executor=ray")


def _need(name: str, value: Any, right: bool, what: str) -> None:
    if not right:
        raise InputError(f"{name}={value}: {what}")
