"""distill: a small g from a large one, without labels."""

from ldm_sg.annotate.distill import distill as teach
from ldm_sg.config import DistillConfig
from ldm_sg.folder import holds_out


@holds_out
def distill(cfg: DistillConfig) -> None:
    """Writes the folder `cfg.out`, which `features.model` can name afterwards."""
    print(teach(cfg) / "manifest.yaml")
