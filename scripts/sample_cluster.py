"""Sample one cluster: python scripts/sample_cluster.py --cluster 42 [--run runs/demo] [-n 16] [-w 2] [--seed 0]"""

import argparse
import sys

from ldm_sg.cli import app

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cluster", required=True, help="cluster id")
parser.add_argument("--run", default="runs/demo", help="folder of a trained run")
arguments, flags = parser.parse_known_args()
app(["sample", arguments.run, "--cluster", arguments.cluster, *flags], prog_name=sys.argv[0])
