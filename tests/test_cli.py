"""The command line: fast help, exit codes, overrides; every YAML loads, every README command runs or dry-runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldm_sg import config as configs
from ldm_sg.cli import app
from ldm_sg.config import AnnotateConfig, TrainConfig, model_config
from ldm_sg.configfile import ROOT, load
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.models.unet import make_unet
from ldm_sg.sampling.schedules import noise_scheduler

SCHEMAS = {
    "annotate": "AnnotateConfig",
    "train": "TrainConfig",
    "autoencoder": "FitAutoencoderConfig",
    "distill": "DistillConfig",
    "model": "ModelConfig",
}
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))
VERBS = [
    "pack",
    "annotate",
    "train",
    "sample",
    "evaluate",
    "export",
    "inspect",
    "configs",
    "reproduce",
    "demo",
    "fit-autoencoder",
    "distill",
    "autoencoder",
]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['ldm-sg', '--help']\nimport ldm_sg.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
    )
    code += "assert not {'torch', 'numpy', 'diffusers', 'omegaconf'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    code, output = run(verb, "--help")
    assert code == 0 and "Example" in output and f"ldm-sg {verb}" in output


def test_examples_stand_one_a_line() -> None:
    lines = run("sample", "--help")[1].splitlines()
    assert (
        "    ldm-sg sample runs/demo --trajectory -n 4" in lines
        and "    ldm-sg sample runs/camvid --vary content" in lines
    )


def test_version_and_completion() -> None:
    from ldm_sg import __version__

    assert run("--version") == (0, f"ldm-sg {__version__}\n")
    assert "--install-completion" in run("--help")[1] and "configs/train/" in run("--help")[1]


def test_configs_lists_every_one_with_a_line() -> None:
    code, output = run("configs")
    lines = output.splitlines()
    for path in YAMLS:
        group = lines[lines.index(f"configs/{path.parent.name}/") :]
        line = next(line for line in group if line.startswith(f"  {path.name} "))
        assert len(line.split(maxsplit=1)[1]) >= 8 and len(line) < 150
    assert code == 0 and "  demo.yaml                         The demo: 2,054 fruit photos at 64 px" in output


def test_the_script_is_sample_with_a_run_to_start_from(tmp_path: Path) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess:
        path = [sys.executable, str(ROOT / "scripts" / "sample_cluster.py")]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([*path, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env)

    shown, flags = script("--help").stdout, set(re.findall(r" (--[a-z-]+)", run("sample", "--help")[1]))
    assert len(flags) > 15 and all(f" {flag} " in shown.replace("\n", " ") for flag in flags)
    assert "Usage: python scripts/sample_cluster.py [OPTIONS]" in shown and "default: runs/demo" in shown
    assert "Missing option '--cluster'" in script().stderr
    assert "run 'runs/demo' not found" in script("--cluster", "42").stderr
    told = script("there", "--cluster", "42", "--box", "x")  # refused before anything heavy is imported
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr


@pytest.mark.parametrize(
    "path",
    [path for path in YAMLS if path.parent.name in SCHEMAS],  # the suites: test_reproduce.py
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_every_config_loads_and_builds(path: Path) -> None:
    own = [f"{key}=x" for key in re.findall(r"(\S+): \?\?\?", path.read_text())]  # what the user must give
    inner = {"shards.": ("church", "clothing", "imagenette"),
             "val_shards.": ("church_val", "clothing_val", "blood_cells", "road_scenes")}  # fmt: skip
    prefix = {name: part for part, names in inner.items() for name in names}
    loaded = load(getattr(configs, SCHEMAS[path.parent.name]), path, [prefix.get(o[:-2], "") + o for o in own])
    assert len(path.read_text().splitlines()) <= 40
    if isinstance(loaded, TrainConfig):
        assert noise_scheduler(loaded.objective)
        loaded = model_config(loaded.model)
    if isinstance(loaded, configs.ModelConfig):
        with torch.device("meta"):
            net = make_unet(loaded, GuidanceSpec(num_labels=10), (4, 32, 32))
        assert sum(p.numel() for p in net.parameters()) > 1e6
    if isinstance(loaded, AnnotateConfig):
        assert (ROOT / "autoencoders" / loaded.autoencoder / "manifest.yaml").is_file()


@pytest.mark.parametrize("tokens", ["vector", "concepts", "none"])
@pytest.mark.parametrize("inject", ["concat", "add"])
def test_every_injection_changes_the_prediction(tokens: str, inject: str) -> None:
    torch.manual_seed(0)
    small = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [2], "heads": 2}
    spec = GuidanceSpec(num_labels=5, spatial="box")
    net = make_unet(model_config({**small, "tokens": tokens, "inject": inject}), spec, (4, 8, 8)).eval()
    torch.nn.init.normal_(net.unet.conv_out.weight)  # it starts at zero
    x, t, k = torch.randn(3, 4, 8, 8), torch.tensor([5, 50, 500]), torch.tensor([0, 1, 2])
    on = torch.ones(3, dtype=torch.bool)
    guidance = Guidance(keep=on, k=k, spatial=torch.rand(3, 1, 8, 8))
    with torch.no_grad():
        out, null = net(x, t, guidance), net(x, t, guidance.null())
        other = net(x, t, Guidance(keep=on, k=k + 1, spatial=guidance.spatial))
        hot = net(x, t, Guidance(keep=on, k=torch.nn.functional.one_hot(k, 5).float(), spatial=guidance.spatial))
        empty = net(x, t, Guidance(keep=on, k=torch.zeros(3, 5), spatial=guidance.spatial))
        null2 = net(x, t, Guidance(keep=~on, k=k + 1, spatial=1 - guidance.spatial))
    assert out.shape == x.shape and torch.allclose(out, hot, atol=1e-5)
    assert not torch.allclose(out, null, atol=1e-4) and not torch.allclose(out, other, atol=1e-4)
    assert not torch.allclose(empty, null, atol=1e-4)  # an empty multi-hot is not the null
    assert torch.equal(null, null2)  # the null removes every part of the signal


def test_concept_tokens_are_masked_and_unordered() -> None:
    small = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [2], "heads": 2, "tokens": "concepts"}
    net = make_unet(model_config(small), GuidanceSpec(num_labels=5, multi_hot=True), (4, 8, 8)).eval()
    torch.nn.init.normal_(net.unet.conv_out.weight)
    x, t, k = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([[1.0, 0, 1, 0, 0]])
    on = torch.ones(1, dtype=torch.bool)
    with torch.no_grad():
        a, b, c = (
            net(x, t, Guidance(keep=on, k=k, concepts=torch.tensor([ids])))
            for ids in ([0, 2, -1], [2, 0, -1], [0, 3, -1])
        )
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "configs/train/demo.yaml", "stepps=3"], "unknown key 'stepps'; did you mean 'steps'"),
        (["train", "configs/train/demo.yaml", "guidance.dorp=0"], "did you mean 'guidance.drop'"),
        (["train", "configs/train/demo.yaml", "steps=many"], "steps=many: a whole number is expected"),
        (["train", "configs/train/demo.yaml", "lr=[1]"], "lr=[1]: a number is expected"),
        (["train", "configs/train/demo.yaml", "channels_last=2x"], "channels_last=2x: true or false is expected"),
        (["train", "configs/train/demo.yaml", "guidance=3"], "guidance=3: a mapping of keys to values is expected"),
        (["train", "configs/train/demo.yaml", "guidance.parts=k"], "guidance.parts=k: a list is expected"),
        (["train", "configs/train/demo.yaml", "model=3"], "model=3: a mapping of keys to values is expected"),
        (["train", "configs/train/demo.yaml", "out=[1]"], "out=[1]: a text is expected"),
        (["train", "configs/train/demo.yaml", "seed=null"], "seed=null: anything but null is expected"),
        (["train", "configs/train/demo.yaml", "steps"], "key=value"),
        (["train", "configs/train/demo.yaml", "out="], "nothing stands after the ="),
        (["train", "configs/train/demo.yaml", "model={a:1,b:["], "not YAML after the ="),
        (["annotate", "configs/annotate/demo.yaml", "annotator.k=0"], "annotator.k=0: at least 1"),
        (
            ["annotate", "configs/annotate/voc64-boxes.yaml", "annotator.centre_place=2"],
            "centre_place=2.0: a share between",
        ),
        (["annotate", "configs/annotate/voc64-boxes.yaml", "annotator.centre_place=0.5"], "annotator.centre=true"),
        (["train", "configs/train/dmo.yaml"], "did you mean 'configs/train/demo.yaml'"),
        (["train", "configs/model/s.yaml"], "unknown key"),
        (["annotate", "configs/annotate/demo.yaml", "shards=nowhere/*.tar", "out=x"], "nowhere"),
        (["pack", "nowhere", "x"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code, output = run(*arguments)
    assert code == 2 and message in output and output.count("\n") == 1, output
    assert not Path("x").exists()


def test_missing_required_value_and_deep_base_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 3\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nout: x\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    assert "no value for annotation, out" in run("train", str(tmp_path / "a.yaml"))[1]
    assert "one level deep" in run("train", str(tmp_path / "c.yaml"))[1]
    code, output = run("train", str(tmp_path / "b.yaml"), "annotation=y", "--dry-run")
    assert code == 0 and "steps: 3" in output and "out: x" in output
    (tmp_path / "d.yaml").write_text("steps: [unclosed\n")
    assert "not a readable YAML" in run("train", str(tmp_path / "d.yaml"))[1]


def commands() -> list[str]:
    """Every command in README's sh blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_readme_commands_are_real(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config verbs dry-run; other verbs must parse; make targets and scripts must exist."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.M)
    elif words[0] == "python":
        assert Path(words[1]).is_file()
        subprocess.run([sys.executable, words[1], "--help"], check=True, capture_output=True)
    elif words[0] == "ldm-sg" and words[1] in ("annotate", "train", "fit-autoencoder", "distill", "reproduce"):
        code, output = run(*words[1:], "--dry-run")
        assert code == 0, output
    elif words[0] == "ldm-sg":
        command_group = __import__("typer").main.get_command(app)
        verb = command_group.commands[words[1]]
        words = words[2:]
        if hasattr(verb, "commands"):  # a group: its verb's own flags are what is to parse
            verb, words = verb.commands[words[0]], words[1:]
        verb.make_context(verb.name, words, resilient_parsing=False)
    else:
        assert words[0] in ("git", "cd", "conda", "pip"), command
