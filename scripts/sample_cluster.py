"""Sample one cluster: `ldm-sg sample` with all its flags, of the demo's run where no other is named."""

import sys

from typer.main import get_command

from ldm_sg.cli import app

NAME = "python scripts/sample_cluster.py"
verbs = get_command(app)
sample = verbs.commands["sample"]
run, cluster = (next(p for p in sample.params if p.name == name) for name in ("run", "cluster"))
run.required, run.default, cluster.required = False, "runs/demo", True
sample.epilog = f"\b\nExamples:\n  {NAME} --cluster 42\n  {NAME} runs/photos --cluster 42 --cluster 7 -n 8 --w 3"
verbs.commands = {NAME: sample}
verbs([NAME, *sys.argv[1:]], prog_name="")
