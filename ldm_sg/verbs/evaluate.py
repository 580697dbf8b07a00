"""evaluate: samples of a run, or any images, against real images -> a table, a JSON, and the run's report anew."""

from pathlib import Path
from typing import Any

from ldm_sg.evaluate import figures
from ldm_sg.evaluate.evaluation import assess
from ldm_sg.evaluate.options import Options
from ldm_sg.folder import write_json
from ldm_sg.report import grids
from ldm_sg.report.run import write_report


def evaluate(source: str | Path, reference: str | Path, metrics: str | None = None, **options: Any) -> dict[str, Any]:
    """`options`: the other fields of Options. Prints a table, writes `out` (default RUN/evaluations/SETTINGS.json, or
    evaluation.json in the folder of images), with metric memory a picture beside it, and returns what it wrote."""
    result, file, closest = assess(Options(str(source), str(reference), metrics, **options))
    print(figures.table(result))
    write_json(file, result)
    print(f"-> {file}")
    if closest:
        captions, rows = zip(*closest)
        headers = ["sample", "nearest", "second", "third"][: len(rows[0])]
        picture = grids.labelled_rows(captions, rows, headers, grids.best_scale(rows[0]))
        print(f"-> {grids.save(picture, file.with_suffix('.png'))}")
    run = file.parent.parent
    if file.parent.name == "evaluations" and (run / "config.yaml").is_file():
        print(f"report {write_report(run)}")
    return result
