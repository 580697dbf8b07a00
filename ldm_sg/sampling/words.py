"""Editing what a diffusers text-to-image pipeline draws, with the words of its prompt as concepts, as in the paper. It has been run on
nothing larger than the pipelines that its tests make: no trained weights were at hand."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import WEIGHTS, read_mapping
from ldm_sg.guidance.compose import Denoiser, Strategy, cfg
from ldm_sg.guidance.signal import Guidance
from ldm_sg.hardware import pick_device
from ldm_sg.objective import Objective
from ldm_sg.sampling.edit import record, remembering
from ldm_sg.sampling.editor import Editor, Source
from ldm_sg.weights import check_finite

CLASSES = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
PARTS = r"(diffusers|transformers|stable_diffusion)\.(UNet2DCondition|Autoencoder|CLIP|StableDiffusionSafety|\w+Scheduler)\w*"
WORD = r"\w+(?:-\w+)*"
NO_OBJECTS = ("a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with")  # not kept in place


def is_text_to_image(folder: str | Path) -> bool:
    """Whether a diffusers pipeline that words can edit lies there."""
    index = Path(folder) / "model_index.json"
    return index.is_file() and str(read_mapping(index).get("_class_name")) in CLASSES


def open_text_to_image(folder: Path, device: str = "auto") -> Any:
    """That pipeline, from safetensors alone, in fp32; no code that lies there is run. InputError where it cannot be had so."""
    if not is_text_to_image(folder):
        raise InputError(f"{folder}: --prompt needs a folder that diffusers saved a {' or '.join(CLASSES)} in")
    for name, entry in (index := read_mapping(folder / "model_index.json")).items():
        if isinstance(entry, list) and any(entry):
            if not re.fullmatch(PARTS, ".".join(map(str, entry))):
                raise InputError(f"{folder}/model_index.json: its {name} is {entry}, whose code is not run")
            if any((folder / name).glob("*.bin")) and not any((folder / name).glob("*.safetensors")):
                raise InputError(f"{folder / name}: its weights are pickled, which could run code: give safetensors")
    variant = None if (folder / "unet" / WEIGHTS).is_file() else "fp16"
    try:
        pipe = CLASSES[index["_class_name"]].from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant, torch_dtype=torch.float32
        )
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                _check_complete(part, folder / name)
        pipe.to(pick_device(device))
    except InputError:
        raise
    except Exception as err:  # files that may be anybody's: diffusers, transformers and safetensors raise anything
        raise InputError(f"{folder} is damaged or not complete: {one_line(err)[:300]}") from err
    pipe.unet.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_complete(part: torch.nn.Module, folder: Path) -> None:
    """InputError where the files hold fewer weights than the part has, for the rest would be random, or NaN. By number: the libraries
    give weights of older files new names."""
    held, needed = set[str](), sum(1 for _ in part.parameters())
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held |= {name for name in file.keys() if not name.endswith("position_ids")}  # which are no weights
    if len(held) < needed:
        raise InputError(f"{folder}: {len(held)} of its {needed} weights are there: the folder is damaged")
    check_finite(part.state_dict(), folder)


def word_tokens(prompt: str, tokenizers: Sequence[Any]) -> dict[str, list[int]]:
    """The words of a prompt, in small letters, and which tokens after the first, the start's, are theirs: all of a word that has
    several, or stands there several times. Words that a tokenizer cuts off are left out."""
    found: dict[str, set[int]] = {}
    for tokenizer in tokenizers:
        for word in re.finditer(WORD, prompt):  # CLIP's tokens end where words do: those before it are a prefix's
            first, last = (len(tokenizer(prompt[:end], add_special_tokens=False).input_ids) for end in word.span())
            if last <= tokenizer.model_max_length - 2:
                found.setdefault(word[0].lower(), set()).update(range(first, last))
    return {word: sorted(tokens) for word, tokens in found.items() if tokens}


class Prompted:
    """The Denoiser that a pipeline's unet is under its prompt; where nothing is kept, under the empty one."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.condition: dict[str, Any] = {}  # what the pipeline gives, of the empty prompt and of the prompt

    def __call__(self, x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        return self.unet(x, t, **_rows(self.condition, guidance.keep.long()))[0]


class StandIn:
    """In the place of a pipeline's unet while it draws: both halves of its batch are what `denoiser` makes of the latents, so that
    the pipeline's own guidance leaves them as they are."""

    def __init__(self, network: Prompted, denoiser: Denoiser, guidance: Guidance) -> None:
        self.network, self.denoiser, self.guidance = network, denoiser, guidance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network.unet, name)

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> tuple[Tensor]:
        n = len(self.guidance)
        self.network.condition = _rows(condition, slice(None, None, n))
        made = self.denoiser(x[:n], t.expand(n), self.guidance)
        return (torch.cat([made, made]),)


def _rows(part: Any, index: Tensor | slice) -> Any:
    """The same rows of all tensors in it."""
    if isinstance(part, dict):
        return {name: _rows(value, index) for name, value in part.items()}
    return part[index] if isinstance(part, Tensor) else part


class WordEditor(Editor):
    """>>> editor = WordEditor(open_text_to_image(folder), "a cat on a sofa", ["cat"])
    >>> images = editor.edit(editor.drawn(4, seed=3), [Edit(0, dx=0.2)])  # concept 0: the first word that is named

    The loop, scheduler and first stage are the pipeline's own. The noise of a Source is one seed an image. InputError for words that
    the prompt lacks, and without a step of classifier-free guidance (w > 1), which strengths are measured by."""

    def __init__(
        self, pipe: Any, prompt: str, named: Sequence[str], w: float = 7.5, steps: int = 25, strategy: Strategy = cfg
    ) -> None:
        tokenizers = [t for t in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if t is not None]
        tokens = word_tokens(prompt, tokenizers)
        for word in named:
            if word not in tokens:
                there = ", ".join(tokens) or "none"
                raise InputError(f"--prompt {prompt!r} has no word {word!r} that the model reads; there are {there}")
        if w <= 1 or pipe.unet.config.time_cond_proj_dim is not None:
            raise InputError(f"w={w:g}: editing words needs w above 1, and a network not distilled to do without")
        if steps > (most := pipe.scheduler.config.num_train_timesteps):
            raise InputError(f"steps={steps}: the pipeline has {most} noise levels")
        words = [*named, *(word for word in tokens if word not in named and word not in NO_OBJECTS)]
        self.concepts = torch.full((1, max(t.model_max_length for t in tokenizers) - 1), -1)
        for k, word in enumerate(words):
            self.concepts[:, tokens[word]] = k
        self.pipe, self.prompt, self.w, self.steps, self.strategy = pipe, prompt, w, steps, strategy
        self.network, self.count = Prompted(pipe.unet), len(words)

    @torch.no_grad()
    def drawn(self, n: int, seed: int = 0, first_index: int = 0) -> Source:
        """Image i is what the pipeline makes with `generator=torch.Generator().manual_seed(seed + i)`."""
        seeds, states = seed + first_index + torch.arange(n), list[Tensor]()
        guidance = Guidance(torch.ones(n).bool(), concepts=self.concepts.expand(n, -1)).to(self.pipe.device)
        images = self._solve(guidance, seeds, remembering(self.strategy, states))
        times = self.pipe.scheduler.timesteps.to(self.pipe.device)
        return Source(images, guidance, seeds, record(self.network, states, times, guidance, self.count))

    def _solve(self, guidance: Guidance, noise: Tensor, strategy: Strategy) -> Tensor:
        pipe, unet = self.pipe, self.network.unet
        kind = "x0" if pipe.scheduler.config.get("prediction_type") == "sample" else "eps"
        denoiser = strategy(self.network, self.w, Objective(kind, torch.zeros(0)))
        pipe.unet = StandIn(self.network, denoiser, guidance)
        try:
            made = pipe(
                self.prompt, num_inference_steps=self.steps, guidance_scale=self.w, num_images_per_prompt=len(noise),
                generator=[torch.Generator().manual_seed(seed) for seed in noise.tolist()],
            )  # fmt: skip
        finally:
            pipe.unet = unet
        return torch.stack([pil_to_tensor(image) for image in made.images])
