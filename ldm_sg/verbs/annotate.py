"""annotate: source shards -> annotation set, with a report beside it."""

from pathlib import Path

from ldm_sg.config import AnnotateConfig
from ldm_sg.data.shards import expand
from ldm_sg.executor import Part
from ldm_sg.folder import holds_out
from ldm_sg.mirror import writes_anywhere


@writes_anywhere
@holds_out
def annotate(cfg: AnnotateConfig, part: Part | None = None, finish: bool = False) -> Path:
    """The annotation set's folder; a finished one of the same config returns at once. `part`, `finish`: as in `annotate_shards`."""
    cfg.check()
    shards = expand(cfg.shards)  # what is wrong with it is said before anything heavy is imported, which takes seconds

    from ldm_sg.annotate.run import annotate_shards
    from ldm_sg.report.annotation import write_report

    out = annotate_shards(cfg, part, finish)
    if not (out / "manifest.yaml").is_file():
        return out
    if not (out / "report.html").is_file():
        write_report(out, shards)
    print(out / "report.html")
    return out
