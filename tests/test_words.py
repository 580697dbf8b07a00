"""Editing by the words of a prompt, on tiny random pipelines: what is drawn without an edit is the pipeline's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from typer.testing import CliRunner

from ldm_sg.cli import app
from ldm_sg.errors import InputError
from ldm_sg.guidance import selfguide
from ldm_sg.guidance.compose import cfg
from ldm_sg.sampling.edit import Edit, record, remembering, selfguided
from ldm_sg.sampling.words import WordEditor, open_text_to_image, word_tokens

PROMPT, STEPS, W = "A cat on a sofa, cat's sofa", 8, 5.0
WIDTH, LENGTH = 16, 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, and merges that make `cat` one token; `sofa` stays `so fa`."""
    letters = [*"abcdefghijklmnopqrstuvwxyz,'"]
    merges = ["c a", "ca t</w>", "s o", "f a</w>", "o n</w>", "' s</w>"]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def pipeline(folder: Path, xl: bool, scheduler: Any) -> Any:
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if xl else {}
    added |= {"projection_class_embeddings_input_dim": 6 * 4 + WIDTH} if xl else {}
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH * (2 if xl else 1), **added,
    )  # fmt: skip
    for name, weight in unet.named_parameters():  # of a new network attention is even: here it looks at something
        if "attn2.to_q" in name or "attn2.to_k" in name:
            torch.nn.init.normal_(weight, std=0.7)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": words, "text_encoder": CLIPTextModel(text)}
    if xl:
        second = CLIPTextModelWithProjection(text)
        return StableDiffusionXLPipeline(**parts, tokenizer_2=words, text_encoder_2=second, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, xl, scheduler in (
        ("sd", False, PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)),
        ("xl", True, DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction")),
    ):
        made[name] = tmp_path_factory.mktemp(name) / "pipeline"
        pipeline(made[name].parent, xl, scheduler).save_pretrained(made[name])
    return made


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_the_command_moves_a_word_and_draws_what_the_pipeline_draws(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = ["edit", str(folders[kind]), "--prompt", PROMPT, "--move", "cat=0.2,0", "--resize", "sofa=1.5", "-n", "2"]
    asked += ["--seed", "3", "--steps", str(STEPS), "--w", str(W), "--device", "cpu"]
    for name, strength in (("moved", "0,5"), ("still", "0")):
        done = CliRunner().invoke(app, [*asked, "--strength", strength, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, (done.output, done.exception)
    cls = StableDiffusionXLPipeline if kind == "xl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    for i in range(2):
        source, still, moved = (
            pixels(tmp_path / name)
            for name in (f"moved/source-{i:03d}.png", f"still/edited-{i:03d}.png", f"moved/edited-{i:03d}.png")
        )
        own = pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=W, generator=torch.Generator().manual_seed(3 + i)
        ).images[0]
        assert abs(source - np.asarray(own)).max() <= 2 and abs(still - np.asarray(own)).max() <= 2
        assert source.std() > 1 and not np.array_equal(moved, source)
    assert (tmp_path / "moved" / "edits.png").is_file()


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_its_attention_ends_nearer_to_the_asked_place(kind: str, folders: dict[str, Path]) -> None:
    pipe = open_text_to_image(folders[kind], "cpu")
    editor = WordEditor(pipe, PROMPT, ["cat"], W, STEPS)
    source = editor.drawn(8, seed=3)
    end = selfguide.centroid(source.observed[-1].maps[:, 0])
    asked = end + torch.tensor([0.1, 0.0])
    states: list[torch.Tensor] = []
    strategy = selfguided(editor.network, source.observed, [Edit(0, dx=0.1)], 5.0, base=remembering(cfg, states))
    with torch.no_grad():
        editor._solve(source.guidance, source.noise, strategy)
    [last] = record(editor.network, states[-1:], pipe.scheduler.timesteps[-1:], source.guidance, editor.count)
    moved = selfguide.centroid(last.maps[:, 0])
    before, after = ((place - asked).norm(dim=1) for place in (end, moved))
    assert (after < before).float().mean() >= 0.75 and after.median() < before.median(), (before, after)
    assert pipe.unet is editor.network.unet  # the pipeline is as it was


def test_a_scheduler_that_draws_noise_of_its_own_is_followed(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, False, EulerAncestralDiscreteScheduler(**SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    source = WordEditor(pipe, PROMPT, ["cat"], W, 4).drawn(1, seed=5)
    own = pipe(PROMPT, num_inference_steps=4, guidance_scale=W, generator=torch.Generator().manual_seed(5)).images[0]
    assert abs(source.images[0].permute(1, 2, 0).int() - torch.tensor(np.asarray(own)).int()).max() <= 2


def test_tokens_of_words(tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "words")
    found = word_tokens(PROMPT, [words, words])
    tokens = words.convert_ids_to_tokens(words(PROMPT).input_ids)[1:]
    assert tokens == ["a</w>", "cat</w>", "on</w>", "a</w>", "so", "fa</w>", ",</w>", "cat</w>", "'s</w>", "so", "fa</w>", "<|endoftext|>"]  # fmt: skip
    assert found == {"a": [0, 3], "cat": [1, 7], "on": [2], "sofa": [4, 5, 9, 10]}
    assert word_tokens("a " * 13 + "cat sofa", [words])["cat"] == [13] and "sofa" not in word_tokens("a " * 13 + "cat sofa", [words])  # fmt: skip


def test_what_cannot_be_is_refused_and_nothing_is_left(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, prompt = str(folders["sd"]), ["--prompt", PROMPT]
    other = tmp_path / "other"
    other.mkdir()
    for asked, message in (
        (
            [folder, *prompt, "--move", "dog=0.1,0"],
            "has no word 'dog' that the model reads; there are a, cat, on, sofa",
        ),
        ([folder, *prompt, "--move", "cat=0.1"], "for example cat=0.2,0"),
        ([folder, *prompt, "--move", "cat=0.9,0"], "--move cat=0.9,0: leads out of the image"),
        ([folder, *prompt, "--move", "cat=0.1,0", "--like", "photo.jpg"], "--like: of runs of ldm_sg only"),
        ([folder, *prompt, "--layout-from", "photo.jpg"], "--layout-from: of runs of ldm_sg only"),
        ([folder, *prompt, "--move", "cat=0.1,0", "--w", "1"], "needs w above 1"),
        ([folder, *prompt, "--move", "cat=0.1,0", "--steps", "1001"], "the pipeline has 1000 noise levels"),
        ([folder, "--move", "1=0.1,0"], "give it a --prompt"),
        ([str(other), *prompt, "--move", "cat=0.1,0"], "--prompt needs a folder"),
    ):
        out = ["--steps", "4", "-n", "1"] if "--steps" not in asked else []
        refused = CliRunner().invoke(app, ["edit", *asked, *out, "--device", "cpu", "--out", str(tmp_path / "no")])
        assert refused.exit_code == 2 and message in refused.output, (asked, refused.output, refused.exception)
    assert not (tmp_path / "no").exists()


def test_pickled_weights_and_foreign_classes_are_refused(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path, False, DDIMScheduler(**SCHEDULE))
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(InputError, match="its weights are pickled"):
        open_text_to_image(tmp_path / "pickled", "cpu")
    pipe.save_pretrained(tmp_path / "foreign")
    index = tmp_path / "foreign" / "model_index.json"
    for entry in (["os", "system"], ["transformers", "AutoModel"], ["unet", "Own"]):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": entry}))
        with pytest.raises(InputError, match=r"its text_encoder is .*not run"):
            open_text_to_image(tmp_path / "foreign", "cpu")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_folder_that_lacks_weights_or_holds_nan_is_refused(part: str, tmp_path: Path) -> None:
    pipeline(tmp_path, False, DDIMScheduler(**SCHEDULE)).save_pretrained(folder := tmp_path / "pipeline")
    [path] = (folder / part).glob("*.safetensors")
    whole = load_file(path)
    first, *rest = whole
    for broken, message in (
        (whole | {first: whole[first] * float("nan")}, "holds NaN"),
        ({name: whole[name] for name in rest}, f"{len(rest)} of its {len(whole)} weights"),
    ):
        save_file(broken, path, {"format": "pt"})
        with pytest.raises(InputError, match=message):
            open_text_to_image(folder, "cpu")


def test_halves_in_fp16_alone_are_read(tmp_path: Path) -> None:
    pipeline(tmp_path, False, DDIMScheduler(**SCHEDULE)).save_pretrained(tmp_path / "half", variant="fp16")
    assert open_text_to_image(tmp_path / "half", "cpu").unet.dtype == torch.float32
