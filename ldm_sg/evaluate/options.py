"""What a person asks of `evaluate`."""

from dataclasses import MISSING, dataclass
from typing import Any

from ldm_sg.errors import InputError, need_choice, need_within
from ldm_sg.options import ADDRESS, CHECKPOINT, DEVICE, EXECUTOR, argument, numbers, option
from ldm_sg.sampling.options import SampleOptions

_USUAL = SampleOptions(precision="auto")  # sample's, but faster
_OWN = ("steps", "scheduler", "spacing", "precision", "strategy", "rescale")
PRIORS = ("empirical", "uniform", "held-out")
DRAWING: dict[str, Any] = {name: getattr(_USUAL, name) for name in _OWN} | {"interval": None}


@dataclass(frozen=True)
class Options:
    """Samples against real images -> numbers with everything needed to reproduce them.

    Examples:
      ldm-sg evaluate runs/demo --reference 'data/demo/*.tar' --metrics fd,prdc,consistency -n 2000
      ldm-sg evaluate runs/demo --reference 'data/demo/*.tar' --features own,inception --resize clean
    """

    # of a run or pipeline folder n samples are drawn, their signals from the training distribution; None: the default
    source: str = argument("Run, folder of samples or images, or shards.")
    reference: str = option(MISSING, "Real images: shards or a folder; or .npz statistics (clean-fid, ADM).")
    metrics: str | None = option(
        None,
        "Of fd, kid, prdc, is, sfid, cmmd, fd_clusters, memory, nmi, consistency, layout, edit; default what the run allows.",
    )
    features: str | None = option(
        None, "Judges, commas between: own (the default: the run's g), inception, inception:FILE, any g, a YAML."
    )
    resize: str | None = option(
        None, "Of inception's input: tf (torch-fidelity's, the default) or clean (clean-fid's)."
    )
    n: int = option(10_000, "Samples; of the reference all are used, up to 50,000.", "-n", "--n")
    w: float | None = option(None, "Guidance strength; default 2.", "--w", "-w")
    steps: int | None = option(None, "Solver steps; default 25.")
    scheduler: str | None = option(None, "dpmpp_2m (the default), ddim, ddpm, unipc or euler.")
    seed: int = option(0, "Seed of the samples.")
    batch_size: int = option(64, "Samples of a worker's task; changes no figure.")  # in whole passes
    size: int | None = option(None, "Side to which images are cropped; default the run's.")
    precision: str | None = option(None, "Of the sampling: auto (the default), fp32 or bf16.")
    run: str | None = option(None, "Run whose g and f judge images on disk; default the one that holds them.")
    prior: str | None = option(
        None, "What clusters are drawn from: empirical (training's, the default), uniform, held-out."
    )
    held_out: str | None = option(None, "Images that training did not see, for metric memory and --prior held-out.")
    statistics: str | None = option(None, ".npz that the reference's mean and covariance go into.")
    spacing: str | None = option(None, "Of the solver's steps; as in sample.")
    strategy: str | None = option(None, "cfg, cfg_zero or apg.")
    rescale: float | None = option(None, "As in sample.")
    interval: list[float] | None = option(None, "As in sample.", parse=numbers)
    checkpoint: str | None = option(None, CHECKPOINT)
    out: str | None = option(None, "JSON file.")
    processes: int = option(0, "At once; 0 = one a GPU (ray: of the cluster's), or one.")
    executor: str = option("local", EXECUTOR)
    address: str | None = option(None, ADDRESS)
    device: str = option("auto", DEVICE)

    def drawing(self) -> SampleOptions:
        """How samples are drawn."""
        given = {name: value for name in (*DRAWING, "w") if (value := getattr(self, name)) is not None}
        return SampleOptions(**DRAWING | {"interval": [], "seed": self.seed} | given)

    def check(self) -> None:
        """InputError where values mean nothing."""
        from ldm_sg.config import check_workers
        from ldm_sg.data.images import MAX_SIDE
        from ldm_sg.evaluate.figures import parse_metrics
        from ldm_sg.evaluate.inception import RESIZES

        for name in ("source", "reference", "run", "held_out", "statistics", "out"):
            if getattr(self, name) == "":
                raise InputError(f"{name}='': empty: a file or folder is needed")
        if self.statistics is not None and not self.statistics.endswith(".npz"):
            raise InputError(f"statistics={self.statistics}: give a file NAME.npz")
        if self.metrics is not None:
            parse_metrics(self.metrics)
        self.drawing().check()
        check_workers(self)
        if self.size is not None:
            need_within("size", self.size, 1, MAX_SIDE)
        need_within("n", self.n, 1)
        need_within("batch_size", self.batch_size, 1)
        need_choice("resize", self.resize, (None, *RESIZES))
        need_choice("prior", self.prior, (None, *PRIORS))
