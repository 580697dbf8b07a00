"""The pipeline as diffusers' users know it: called, saved, loaded where ldm_sg is not installed, with schedulers of theirs."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY
from huggingface_hub import constants
from PIL import Image
from test_train import config

from ldm_sg import hub as hubs
from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import ObjectiveConfig, model_config
from ldm_sg.errors import InputError
from ldm_sg.folder import WEIGHTS
from ldm_sg.models.unet import make_unet
from ldm_sg.parts import OURS
from ldm_sg.pipeline import OUTPUTS, SelfGuidedPipeline, open_pipeline
from ldm_sg.sampling import draw
from ldm_sg.sampling.request import SampleOptions
from ldm_sg.standalone import standalone
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train


def trained(colours: Path, folder: Path, kind: str) -> Path:
    """Long enough that its samples are not noise; what is tested is how they are drawn."""
    return train(
        config(
            colours, folder, steps=40, ema=0.8, checkpoint_every=40, val_every=0, objective=ObjectiveConfig(kind=kind)
        )
    )


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(colours, tmp_path_factory.mktemp("runs") / "v", "v")


@pytest.fixture(scope="module")
def flow(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(colours, tmp_path_factory.mktemp("runs") / "flow", "flow")


@pytest.fixture
def pipe(run: Path) -> SelfGuidedPipeline:
    return open_pipeline(run, "cpu")


ALONE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        away = name.partition(".")[0] in ("ldm_sg", "timm", "faiss", "webdataset", "pytorch_lightning", "omegaconf", "open_clip",
                                          "torchmetrics", "torchvision", "scipy", "matplotlib", "typer", "taming")
        return None if away else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
folder, out = sys.argv[1:]
assert type(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)).__name__ == "SelfGuidedPipeline"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert set(pipe.components) == {"unet", "conditioner", "scheduler", "autoencoder", "signals"}
for i, image in enumerate(pipe(cluster=[2, 2, 0], generator=pipe.generators(3, seed=5)).images):
    image.save(f"{out}/{i}.png")
assert not [name for name in sys.modules if name.startswith("ldm_sg")]
"""


def test_loads_by_diffusers_alone_and_draws_the_runs_own_samples(run: Path, tmp_path: Path) -> None:
    folder = sample(str(run), SampleOptions(cluster=[2], n=2, seed=5, device="cpu"), str(tmp_path / "own"))
    pipe = open_pipeline(run, "cpu")
    third = pipe.generate(pipe.clusters([2, 2, 0], seed=5), seed=5)[2]
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", ALONE, str(run / "pipeline"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr and "ignored" not in done.stderr, done.stderr
    for i in (0, 1):
        assert (tmp_path / f"{i}.png").read_bytes() == (folder / f"{i:06d}.png").read_bytes()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "2.png")), third.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("part", ["SelfGuidedPipeline", "Autoencoder", "Conditioner", "PlainUNet", "Signals"])
def test_what_stands_alone_names_nothing_of_the_package_outside_functions(part: str) -> None:
    module = SelfGuidedPipeline.__module__ if part == "SelfGuidedPipeline" else OURS[part].__module__
    tree = ast.parse(standalone(module, part))
    outside = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    outside |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    allowed = {"torch", "diffusers", "numpy", "PIL", "safetensors", "yaml", "huggingface_hub", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in outside} <= allowed
    assert part in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_call_is_generate_in_other_words(pipe: SelfGuidedPipeline) -> None:
    own = pipe.generate(pipe.clusters([1, 1, 3, 3]), w=1.5, steps=6, seed=4)
    call = {"cluster": [1, 3], "num_images_per_prompt": 2, "num_inference_steps": 6, "guidance_scale": 1.5}
    kinds = {kind: pipe(**call, output_type=kind, generator=pipe.generators(4, 4)).images for kind in OUTPUTS}
    assert np.array_equal(np.stack([np.asarray(i) for i in kinds["pil"]]), own.permute(0, 2, 3, 1).numpy())
    assert np.abs(kinds["np"] * 255 - own.permute(0, 2, 3, 1).numpy()).max() <= 0.51
    assert torch.equal(kinds["pt"], torch.from_numpy(kinds["np"]).permute(0, 3, 1, 2))
    assert torch.equal(pipe.decode(kinds["latent"]), own)
    (again,) = pipe(
        **call,
        output_type="latent",
        latents=draw.unit_noise(pipe.latent_shape, pipe.generators(4, 4)),
        return_dict=False,
    )
    assert torch.equal(again, kinds["latent"])
    one = [
        pipe(cluster=1, num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0] for _ in range(2)
    ]
    assert one[0] == one[1] and isinstance(one[0], Image.Image)
    drawn = pipe(
        num_images_per_prompt=3, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
    )
    assert drawn.images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("kind", ["run", "flow"])
def test_other_schedulers_solve_the_same_equation(kind: str, request: pytest.FixtureRequest) -> None:
    """Diffusers' stepping from the same noise comes where ours does: both are near the exact solution."""
    names = {"run": ["DDIMScheduler", "UniPCMultistepScheduler"],
             "flow": ["FlowMatchEulerDiscreteScheduler"]}  # fmt: skip
    pipe = open_pipeline(request.getfixturevalue(kind), "cpu")
    own_scheduler = pipe.scheduler

    def drawn() -> torch.Tensor:
        return pipe([0, 1], 24, guidance_scale=1.5, generator=pipe.generators(2, 3), output_type="latent").images

    own = drawn()
    for name in names[kind]:
        pipe.scheduler = getattr(diffusers, name).from_config(own_scheduler.config)
        other = drawn()
        assert not torch.equal(own, other) and (own - other).std() < 0.08 * own.std()
        with pytest.raises(InputError, match=f"pipe.scheduler is {name}"):  # never ignored
            pipe.generate(pipe.clusters([1]))
    wrong = "FlowMatchEulerDiscreteScheduler" if kind == "run" else "DDIMScheduler"
    pipe.scheduler = getattr(diffusers, wrong).from_config(own_scheduler.config)
    with pytest.raises(InputError, match=f"is a {wrong} of another noise schedule"):
        drawn()
    pipe.scheduler = own_scheduler
    assert torch.equal(drawn(), own)


def test_a_foreign_scheduler_is_saved_and_still_steps(pipe: SelfGuidedPipeline, tmp_path: Path) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    call = {"cluster": [0, 2], "num_inference_steps": 4, "output_type": "latent"}
    before = pipe(**call, generator=pipe.generators(2)).images
    pipe.save_pretrained(tmp_path / "euler")
    again = SelfGuidedPipeline.from_pretrained(tmp_path / "euler")
    assert again.foreign and torch.equal(before, again(**call, generator=pipe.generators(2)).images)
    given = SelfGuidedPipeline.from_pretrained(
        tmp_path / "euler", scheduler=pipe.schedule
    )  # as diffusers exchanges a part
    assert not given.foreign


@pytest.mark.parametrize("foreign", [False, True])
def test_the_callback_sees_every_step_and_may_change_it(foreign: bool, pipe: SelfGuidedPipeline) -> None:
    if foreign:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    seen = []

    def watch(own, step, time, tensors):
        seen.append((step, float(time), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else tensors

    images = pipe(cluster=[1], num_inference_steps=5, callback_on_step_end=watch, output_type="latent").images
    times = [time for _, time, _ in seen]
    assert [step for step, _, _ in seen] == list(range(5)) and times == sorted(times, reverse=True)
    assert seen[0][2] == (1, *pipe.latent_shape) and not images.any()


def test_wrong_calls_are_told(pipe: SelfGuidedPipeline) -> None:
    for call, message in (
        ({"cluster": 9}, "clusters 0 to 3"),
        *(
            ({"cluster": k}, "a whole number is needed")
            for k in ("a", 1.5, True, [None], [1, 2.0], torch.tensor([0.5]))
        ),
        ({"cluster": []}, r"cluster=\[\], .*: that is no image"),
        ({"cluster": 1, "height": 18}, "size 16x18: this run makes multiples of 4 pixels"),
        ({"cluster": 1, "width": 10**6}, "up to 8,192"),
        ({"cluster": 1, "width": "32"}, "size 32x16: this run"),
        ({"cluster": 1, "output_type": "pill"}, "did you mean 'pil'"),
        ({"cluster": [1, 2], "generator": pipe.generators(3)}, "3 of them for 2 images"),
        ({"cluster": 1, "latents": torch.zeros(1, 3, 8, 8)}, r"latents: \(1, 3, 8, 8\), but 1 images"),
        ({"cluster": 1, "callback_on_step_end_tensor_inputs": ["noise"]}, "there are latents"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(**call)
    with pytest.raises(InputError, match="tile: 4; a whole number from 8 pixels"):
        pipe.enable_vae_tiling(4)
    assert pipe.cells is None  # what was asked for in vain does not stay


def test_a_call_may_ask_for_another_size(pipe: SelfGuidedPipeline) -> None:
    call = {"cluster": np.array([1, 3]), "num_inference_steps": 2, "output_type": "pt"}
    before, given = (pipe(**call, generator=pipe.generators(2)).images for _ in range(2))
    wide = pipe(**call, width=32, generator=pipe.generators(2)).images
    assert wide.shape == (2, 3, 16, 32) and pipe.latent_shape == (12, 8, 8) and torch.equal(before, given)
    pipe.resize(32, 16)
    assert torch.equal(pipe(**call, generator=pipe.generators(2)).images, wide)
    assert pipe(**call, width=16, height=20).images.shape == (2, 3, 20, 16) and pipe.latent_shape == (12, 8, 16)


def test_half_precision(pipe: SelfGuidedPipeline) -> None:
    call = {"cluster": [0, 3], "num_inference_steps": 8, "output_type": "pt"}
    full = pipe(**call, generator=pipe.generators(2)).images
    half = pipe.to(torch.bfloat16)
    assert {part.dtype for part in (half.unet, half.conditioner, half.autoencoder)} == {torch.bfloat16}
    assert (half(**call, generator=pipe.generators(2)).images - full).abs().mean() < 0.02


def test_offload(pipe: SelfGuidedPipeline) -> None:
    pytest.importorskip("accelerate")
    call = {"cluster": [0, 3], "num_inference_steps": 3, "output_type": "pt"}
    full = pipe(**call, generator=pipe.generators(2)).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(**call, generator=pipe.generators(2)).images, full)
    assert hasattr(pipe.unet, "_hf_hook") and not hasattr(pipe.autoencoder, "_hf_hook")  # pixels have nothing to move


def test_a_network_as_first_stage_is_a_part_with_weights(run: Path, tmp_path: Path) -> None:
    """Tiling, and weights in the folder that other rooms read as an autoencoder."""
    pipe = open_pipeline(run, "cpu")
    autoencoder = load_autoencoder("demo-f8c16")
    unet = make_unet(model_config(TINY), pipe.spec, (16, 4, 4))
    other = SelfGuidedPipeline(unet.unet.eval(), unet.conditioner, pipe.schedule, autoencoder, pipe.signals)
    other.save_pretrained(tmp_path / "whole")
    stored = json.loads((tmp_path / "whole" / "autoencoder" / "config.json").read_text())
    assert stored["_class_name"] == "Autoencoder" and stored["latent_mean"] and stored["licence"]
    again = SelfGuidedPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.float32)
    latents = torch.randn(1, 16, 4, 4)
    assert torch.equal(again.autoencoder.decode(latents), autoencoder.decode(latents))
    assert load_autoencoder(tmp_path / "whole" / "autoencoder").factor == 8
    again.enable_model_cpu_offload(device="cpu")
    assert len(again(cluster=[1, 2], num_inference_steps=2).images) == 2 and hasattr(again.autoencoder, "_hf_hook")
    latents, stage = torch.randn(1, 16, 8, 8), again.autoencoder
    whole, seen, decode = autoencoder.decode(latents), [], stage.codec.decode
    stage.codec.decode = lambda z: (seen.append(tuple(z.shape[-2:])), decode(z))[1]
    again.enable_vae_tiling(40)  # pixels, rounded down to whole cells of an overlap
    tiled = stage.decode(latents)
    assert set(seen) == {(4, 4)} and len(seen) > 1 and not getattr(stage.codec.net, "use_tiling", False)
    again.disable_vae_tiling()
    assert stage.tile == autoencoder.tile and torch.equal(stage.decode(latents), whole)
    assert not torch.equal(tiled, whole) and (tiled - whole).abs().mean() < 0.5 * whole.std()


def test_folders_of_other_versions_are_refused_and_no_code_is_run(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "pipeline", tmp_path / "pipeline"))
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('run')")
    open_pipeline(folder, "cpu")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "conditioner": ["os", "system"]}))
    with pytest.raises(InputError, match="its conditioner is a system of os"):
        open_pipeline(folder, "cpu")
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "version"}))
    with pytest.raises(InputError, match=r"of another version of ldm_sg \(model_index.json says 1, this one reads 2\)"):
        open_pipeline(folder, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"unet": ["diffusers", "StableDiffusionPipeline"]},
            "its unet is a StableDiffusionPipeline of diffusers, which",
        ),
        ({"unet": ["diffusers"]}, "its unet is a .*which ldm_sg does not know"),
        ({"../other": ["diffusers", "AutoencoderKL"]}, r"a part '\.\./other'; choose one of"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "a part 'vae'"),
        ({"": ["diffusers", "AutoencoderKL"]}, "a part ''"),
        ("signals", "signals: no such folder"),
        (10**9, r"scheduler_config\.json: num_train_timesteps=1000000000: a whole number from 2 to 100,000"),
        ("many", "num_train_timesteps=many"),
    ],
)
def test_parts_that_are_none_are_refused_before_diffusers_asks_the_hub(
    change: object, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run / "pipeline", tmp_path / "pipeline"))
    file = folder / ("model_index.json" if isinstance(change, dict) else "scheduler/scheduler_config.json")
    if change == "signals":
        shutil.rmtree(folder / "signals")
    else:
        more = change if isinstance(change, dict) else {"num_train_timesteps": change}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    monkeypatch.setattr("diffusers.utils.hub_utils.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=message):
        open_pipeline(folder, "cpu")


def test_weights_go_by_diffusers_own_name() -> None:
    assert WEIGHTS == diffusers.utils.SAFETENSORS_WEIGHTS_NAME


def test_the_hub_gets_what_is_asked(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kw: asked.update(kw, name=name) or run / "pipeline"
    )
    monkeypatch.setattr(hubs, "answers", lambda url: True)
    wanted = {"revision": "v1", "token": "secret", "cache_dir": str(tmp_path)}
    assert SelfGuidedPipeline.from_pretrained("user/name", **wanted).spec.num_labels == 4
    assert asked == {"name": "user/name", **wanted}
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"pipeline 'user/none' cannot be had: no network.*give the folder"):
        SelfGuidedPipeline.from_pretrained("user/none", cache_dir=str(tmp_path))
