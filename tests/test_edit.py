"""Editing by attention: what is read, and that nothing changes where nothing is asked for."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_annotate import config as annotate_config
from test_train import config as train_config
from typer.testing import CliRunner

from ldm_sg.annotate.run import annotate_shards
from ldm_sg.cli import app
from ldm_sg.config import AnnotatorConfig, GuidanceConfig, ModelConfig, ObjectiveConfig
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.guidance.compose import cfg
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.models.attention import Seen, attention_loss, decoder_attention, reading
from ldm_sg.models.unet import GuidedUNet, make_unet
from ldm_sg.pipeline import open_pipeline
from ldm_sg.sampling.edit import Edit, Weights, active, check, energy, observe, record, remembering, selfguided
from ldm_sg.sampling.schedules import noise_scheduler, objective_of
from ldm_sg.sampling.solvers import SOLVERS, make_grid, make_step, solve
from ldm_sg.verbs.train import train

SPEC = GuidanceSpec("segments", num_labels=4, spatial="mask", concepts_only=True)
SMALL = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [1, 2], "heads": 2, "token_width": 16}
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def network() -> GuidedUNet:
    torch.manual_seed(0)
    made = make_unet(ModelConfig(**SMALL, inject="none", tokens="concepts"), SPEC, SHAPE)
    torch.nn.init.normal_(made.unet.conv_out.weight, std=0.1)
    return made.eval()


def guidance() -> Guidance:
    return Guidance(torch.ones(2, dtype=torch.bool), concepts=torch.tensor([[0, 2, 3, -1], [1, 2, -1, -1]]))


def run(network: GuidedUNet, strategy, kind: str = "v", solver: str = "dpmpp_2m") -> torch.Tensor:
    objective = objective_of(noise_scheduler(ObjectiveConfig(kind=kind, schedule="squaredcos_cap_v2")))
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        denoiser = strategy(network, 2.0, objective)
        return solve(denoiser, noise, guidance(), objective, make_grid(objective, 8), make_step(solver))


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddpm"])
@pytest.mark.parametrize("kind", ["v", "eps", "flow"])
def test_nothing_asked_for_changes_nothing(kind: str, solver: str, network: GuidedUNet) -> None:
    """Neither strength 0, nor aims of the very same trajectory; a move does."""
    states: list[torch.Tensor] = []
    plain = run(network, cfg, kind, solver)
    assert torch.equal(run(network, remembering(cfg, states), kind, solver), plain)
    objective = objective_of(noise_scheduler(ObjectiveConfig(kind=kind, schedule="squaredcos_cap_v2")))
    aims = record(network, states, make_grid(objective, 8).times, guidance(), 4)
    move = [Edit(2, dx=0.2)]
    assert torch.equal(run(network, selfguided(network, aims, move, 0.0), kind, solver), plain)
    assert torch.equal(run(network, selfguided(network, aims, [], 20.0), kind, solver), plain)
    assert not torch.equal(run(network, selfguided(network, aims, move, 1.0), kind, solver), plain)


def test_a_step_against_the_gradient_lowers_the_energy(network: GuidedUNet) -> None:
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.full((2,), 500.0)
    [aim] = record(network, [x], t[:1], guidance(), 4)
    edits = [Edit(2, dx=0.2, scale=1.2)]

    def of(z: torch.Tensor) -> torch.Tensor:
        with reading(network.unet) as seen:
            network(z, t, guidance())
        return energy(observe(seen, guidance(), 4), aim, edits, Weights())

    z = (
        x + torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    ).requires_grad_()  # away from the kinks at the aim
    before = of(z)
    [grad] = torch.autograd.grad(before.sum(), z)
    with torch.no_grad():
        after = of(z - 1e-3 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    assert (before > 0).all() and (after < before).all()


def test_maps_are_probabilities_and_the_network_is_left_as_it_was(network: GuidedUNet) -> None:
    x, t = torch.randn(2, *SHAPE), torch.full((2,), 100.0)
    with torch.no_grad():
        before = network(x, t, guidance())
        with reading(network.unet) as seen:
            inside = network(x, t, guidance())
        after = network(x, t, guidance())
    assert torch.equal(before, after) and torch.allclose(before, inside, atol=1e-5)
    assert {tuple(m.shape) for m in seen.maps} == {(2, 5, 8, 8), (2, 5, 4, 4)}
    for probabilities in seen.maps:
        assert torch.allclose(probabilities.sum(1), torch.ones(()), atol=1e-5)
        assert probabilities[0, 4].max() < 1e-6 and probabilities[1, 3:].max() < 1e-6  # tokens that are not there
    own = [layer for layers in decoder_attention(network.unet).values() for layer in layers]
    assert len(own) == len(seen.maps) and not any("get_attention_scores" in vars(layer) for layer in own)


def test_the_loss_of_attention_is_least_where_it_is_what_is_there() -> None:
    place = torch.zeros(1, 4, 4, 4)
    place[0, 1, :, :2], place[0, 3, :2, 2:] = 1, 1  # concepts 1 and 3; a quarter is nothing
    signal = Guidance(torch.ones(1, dtype=torch.bool), concepts=torch.tensor([[1, 3, -1, -1]]), spatial=place)
    right = torch.stack([1 - place.sum(1)[0], place[0, 1], place[0, 3], torch.zeros(4, 4), torch.zeros(4, 4)])[None]
    flat = torch.full_like(right, 0.2)
    good, bad = (attention_loss(Seen([maps]), signal) for maps in (right, flat))
    assert good.item() < 1e-6 and torch.allclose(bad, torch.tensor(5.0).log())
    assert attention_loss(Seen([flat]), signal.null()).item() == 0


def test_parts_of_another_image_come_with_their_looks_or_without(network: GuidedUNet) -> None:
    states = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(5))
    signals = [
        Guidance(torch.ones(1, dtype=torch.bool), concepts=torch.tensor([ids])) for ids in ([0, 2, -1], [0, 3, -1])
    ]
    mine, other = (record(network, [x], torch.tensor([300.0]), g, 4)[0] for x, g in zip(states, signals))
    whole, shapes = mine.but(other, [0, 3]), mine.but(other, [0, 3], looks=False)
    for found in (whole, shapes):
        assert found.there.tolist() == [[True, False, True, True]]
        assert torch.equal(found.maps[:, [0, 3]], other.maps[:, [0, 3]]) and torch.equal(
            found.maps[:, 2], mine.maps[:, 2]
        )
    for mixed, kept, new, old in zip(whole.looks, shapes.looks, other.looks, mine.looks):
        assert torch.equal(mixed[:, [0, 3]], new[:, [0, 3]]) and torch.equal(mixed[:, 2], old[:, 2])
        assert torch.equal(kept[:, [0, 2]], old[:, [0, 2]]) and torch.equal(kept[:, 3], new[:, 3])


def test_the_papers_schedule_of_steps() -> None:
    on = [step for step in range(64) if active(step, 64)]
    assert on[:12] == list(range(12)) and on[12:] == list(range(12, 62, 2))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit(1, dx=0.1)], "concept 1 is not in the source; there are .* 2 "),
        ([Edit(2, dx=0.9)], "leads out of the image"),
        ([Edit(2, dx=0.1), Edit(2, dy=0.1)], "edited twice"),
        ([Edit(0, dx=0.1), Edit(0, dy=0.1)], "edited twice"),
        ([Edit(2, scale=99.0)], "scale=99: its sides between 0.1 and 10"),
    ],
)
def test_edits_that_cannot_be_are_named(edits: list[Edit], message: str, network: GuidedUNet) -> None:
    [aim] = record(network, [torch.randn(2, *SHAPE)], torch.tensor([10.0]), guidance(), 4)
    with pytest.raises(InputError, match=message):
        check(edits, aim)


def test_a_network_without_cross_attention_is_refused() -> None:
    plain = make_unet(ModelConfig(**SMALL, tokens="none"), GuidanceSpec(num_labels=4), SHAPE)
    with pytest.raises(InputError, match="no cross-attention"), reading(plain.unet):
        pass


def scenes(folder: Path) -> str:
    """Shards of 16 images of 32 px, each with a bright square (class 1) on a dark ground (class 0), and their masks."""
    with ShardWriter(folder / "000000.tar") as writer:
        for i in range(16):
            mask = np.zeros((32, 32), np.uint8)
            mask[8:24, (i % 4) * 4 : (i % 4) * 4 + 16] = 1
            pixels = np.stack([40 + 180 * mask] * 3, 2).astype(np.uint8)
            files = {}
            for name, array in (("png", pixels), ("mask.png", mask)):
                Image.fromarray(array).save(buffer := io.BytesIO(), "PNG")
                files[name] = buffer.getvalue()
            writer.write(f"{i:04d}", files)
    return str(folder / "*.tar")


def test_the_command_moves_a_concept_of_a_run(tmp_path: Path) -> None:
    f = AnnotatorConfig(kind="oracle", truth="masks", k=2)
    made = annotate_shards(annotate_config(tmp_path, scenes(tmp_path / "source"), annotator=f))
    tied = GuidanceConfig(parts=["concepts"], attention=0.1)
    net = SMALL | {"inject": "none", "tokens": "concepts"}
    run = train(train_config(made, tmp_path / "run", model=net, guidance=tied, steps=4, batch_size=4))
    assert open_pipeline(run, "cpu").spec.concepts_only
    asked = ["edit", str(run), "-n", "2", "--steps", "4", "--device", "cpu"]
    done = CliRunner().invoke(app, [*asked, "--move", "1=0.2,0", "--strength", "0,20", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, (done.output, done.exception)
    sample = CliRunner().invoke(app, ["sample", str(run), "-n", "2", "--steps", "4", "--out", str(tmp_path / "drawn")])
    assert sample.exit_code == 0
    for i in range(2):
        source, drawn = (
            np.asarray(Image.open(tmp_path / name)) for name in (f"out/source-{i:03d}.png", f"drawn/{i:06d}.png")
        )
        assert np.array_equal(source, drawn)
        assert not np.array_equal(source, np.asarray(Image.open(tmp_path / f"out/edited-{i:03d}.png")))
    assert (tmp_path / "out" / "edits.png").is_file() and "0.2" in (tmp_path / "out" / "report.html").read_text()
    recipes = {"take": "take: [{seed: 9, concepts: [1]}]"}
    recipes |= {"none": "take: [{concepts: [1]}]", "both": "take: [{seed: 9, photo: a.jpg, concepts: [1]}]"}
    recipes |= {
        "twice": "take: [{seed: 9, concepts: [1]}, {seed: 8, concepts: [1]}]",
        "word": "take: [{sed: 9, concepts: [1]}]",
    }
    recipes |= {"absent": "take: [{seed: 9, concepts: [7]}]", "empty": "take: []"}
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    composed = [*asked, "--compose", str(tmp_path / "take.yaml"), "--out", str(tmp_path / "composed")]
    assert CliRunner().invoke(app, composed).exit_code == 0
    found = [np.asarray(Image.open(tmp_path / "composed" / f"{name}-000.png")) for name in ("source", "edited")]
    assert not np.array_equal(*found)
    for flags, message in (
        (["--compose", str(tmp_path / "none.yaml")], "take[0]: name one source"),
        (["--compose", str(tmp_path / "both.yaml")], "take[0]: name one source"),
        (["--compose", str(tmp_path / "twice.yaml")], "concept 1 is taken twice"),
        (["--compose", str(tmp_path / "word.yaml")], "sed"),
        (["--compose", str(tmp_path / "absent.yaml")], "concept 7 is not in the source"),
        (["--compose", str(tmp_path / "empty.yaml")], "take is empty"),
        (["--compose", str(tmp_path / "missing.yaml")], "not found"),
        ([], "nothing to edit"),
        (["--move", "1=0.2"], "1=0.2: CONCEPT=DX,DY"),
        (["--move", "7=0.1,0"], "concept 7 is not in the source"),
        (["--move", "1=0.1,0", "--move", "1=-0.1,0"], "1 is named twice"),
        (["--move", "1=nan,0"], "1=nan,0: CONCEPT=DX,DY"),
        (["--move", f"{'9' * 5000}=0.1,0"], "concepts of a run are numbers"),
        (["--move", "1=0.1,0", "--w", "nan"], "w=nan: from -1,000 to 1,000"),
        (["--move", "1=0.1,0", "--like", ""], "--like '': a file is needed"),
        (["--move", "1=0.1,0", "--like", "/dev/zero"], "a device, which has no end"),
        (["--move", "1=0.1,0", "--strength", "20,20.0"], "give each once"),
        (["--move", "1=0.1,0", "-n", "65"], "n=65: from 1 to 64"),
        (["--resize", "0=-1"], "0=-1.0: from 0.01 to 100"),
        (["--resize", "1=2", "--strength", "-1"], "from 0 to 1000"),
    ):
        refused = CliRunner().invoke(app, [*asked, *flags, "--out", str(tmp_path / "no")])
        assert refused.exit_code == 2 and message in refused.output, (flags, refused.output)
    assert not (tmp_path / "no").exists()


def test_a_set_without_concepts_is_refused(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name one thing an image"):
        train(train_config(colours, tmp_path / "run", guidance=GuidanceConfig(parts=["concepts"])))
