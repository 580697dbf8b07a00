"""metrics.csv: one row a report, appended to, so that what a killed run has logged stays."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_sg.folder import whole


class MetricsCsv:
    """`columns` start with `step`. What an earlier start logged beyond the step that this one resumes at is dropped."""

    def __init__(self, path: Path, columns: Sequence[str], resumed_at: int) -> None:
        self.path, self.columns = path, columns
        kept = []
        if path.is_file() and resumed_at:
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= resumed_at]
        with whole(path) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)

    def append(self, **row: Any) -> None:
        """One more row; columns that are not named stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
