"""Two machines, as two network namespaces with a wire between them: torchrun, a node that dies, and its run going on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_train import config, rows

from ldm_sg.configfile import to_yaml
from ldm_sg.verbs.train import train

pytestmark = pytest.mark.slow
NODES = ("ldmsg-a", "ldmsg-b")


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    try:
        for command in (
            *(f"ip netns add {node}" for node in NODES),
            f"ip link add wire netns {NODES[0]} type veth peer name wire netns {NODES[1]}",
            *(f"ip -n {node} addr add 10.77.0.{i}/24 dev wire" for i, node in enumerate(NODES, 1)),
            *(f"ip -n {node} link set {dev} up" for node in NODES for dev in ("lo", "wire")),
        ):
            made = subprocess.run(command.split(), capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"{command}: {made.stderr.strip()}")
        yield NODES
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], capture_output=True)


def start(node: str, rank: int, folder: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
    launcher = [
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--node-rank={rank}",
        "--master-addr=10.77.0.1",
        "--master-port=29577",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        str(folder / "go.py"),
        "train",
        str(folder / "c.yaml"),
    ]
    with (folder / f"{node}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", node, *command], stdout=log, stderr=log, env=env, start_new_session=True
        )


def test_two_nodes_train_what_one_does_though_one_dies(nodes: tuple[str, str], colours: Path, tmp_path: Path) -> None:
    whole = train(config(colours, tmp_path / "whole", steps=150, checkpoint_every=10, val_every=50))
    wanted = config(colours, tmp_path / "run", steps=150, checkpoint_every=10, val_every=50)
    (tmp_path / "c.yaml").write_text(to_yaml(wanted))
    (tmp_path / "go.py").write_text("from ldm_sg.cli import main\nif __name__ == '__main__':\n    main()\n")
    first, _ = (start(node, rank, tmp_path) for rank, node in enumerate(nodes))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in subprocess.run(["ip", "netns", "pids", nodes[1]], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert first.wait(timeout=120) != 0
    assert "another of its 2 processes has ended" in (tmp_path / f"{nodes[0]}.log").read_text()
    again = [start(node, rank, tmp_path) for rank, node in enumerate(nodes)]
    assert [node.wait(timeout=240) for node in again] == [0, 0], (tmp_path / f"{nodes[0]}.log").read_text()[-2000:]
    for column in ("val_loss_guided", "val_loss_null"):
        one, two = ([float(row[column]) for row in rows(run) if row[column]] for run in (whole, tmp_path / "run"))
        assert len(one) == len(two) == 3 and two == pytest.approx(one, rel=5e-3)
