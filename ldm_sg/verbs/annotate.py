"""annotate: source shards -> annotation set, with a report beside it."""

from pathlib import Path

from ldm_sg.annotate.run import annotate_shards
from ldm_sg.config import AnnotateConfig
from ldm_sg.data.shards import expand
from ldm_sg.folder import holds_out
from ldm_sg.report.annotation import write_report


@holds_out
def annotate(cfg: AnnotateConfig) -> Path:
    """The annotation set's folder; a finished one of the same config returns at once."""
    cfg.check()
    out = annotate_shards(cfg)
    if not (out / "report.html").is_file():
        write_report(out, expand(cfg.shards))
    print(out / "report.html")
    return out
