"""First stages under CompVis's names (latent-diffusion, taming-transformers, Stable Diffusion's and Flux's single files) -> one
of our kinds. The shape is read off the tensors; a yaml beside them is compared with it."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping
from ldm_sg.weights import read_weights

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
FIRST = "encoder.conv_in.weight"  # what stands before it is the first stage's prefix in a larger checkpoint
GROUPS = 32  # of every group norm of theirs: no tensor tells
RENAMES = [  # to diffusers' AutoencoderKL; its levels of the decoder count the other way round
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.(q|k|v)(?:uery|ey|alue)?\.", r"\1.to_\2."),  # spelt out: diffusers before 0.18
    (r"(attentions\.\d+)\.(proj_out|proj_attn)\.", r"\1.to_out.0."),
]


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CompVis's names, or diffusers' of before 0.18, -> those of its AutoencoderKL; names that are neither stay."""
    theirs = [int(found[1]) for name in state if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{max(theirs) - int(m[1])}.", name)
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        # their attention is made of 1x1 convolutions
        is_matrix = value.ndim == 4 and re.search(r"attentions\.\d+\.to_.*weight$", name)
        renamed[name] = value[:, :, 0, 0] if is_matrix else value
    return renamed


def convert(file: Path, config: Path | None = None) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """A checkpoint -> the manifest's `kind` and `net`, the weights under the names that this kind reads, and the shape in
    CompVis's words (ddconfig). Runs no code that the file may hold.

    Raises InputError for a file that is no such first stage, and a `config` (their yaml) that does not describe it."""
    state = first_stage(read_weights(file, inert=True), file)
    renamed = to_diffusers(state)
    asked = {} if config is None else read_config(config)
    try:
        shape = shape_of(renamed, asked.get("resolution", 256))
    except KeyError as err:
        raise InputError(f"{file}: no tensor {err.args[0]}: not a whole KL or VQ autoencoder") from err
    for key, value in asked.items():
        if key in shape and value != shape[key]:
            said = f"{key} is {value} there, but {shape[key]} in {file}"
            raise InputError(f"{config}: {said}: not this checkpoint's yaml")
    if shape["ch"] % GROUPS:
        raise InputError(f"{file}: {shape['ch']} channels are no multiple of {GROUPS}, CompVis's groups of a norm")
    if shape["n_embed"] is not None:
        if renamed.keys() == state.keys():
            raise InputError(f"{file}: a VQModel of diffusers: give its folder, the one with config.json")
        return {"kind": "vq", "net": {**shape, "dropout": 0.0}}, state, shape
    if not shape["double_z"] or shape["embed_dim"] != shape["z_channels"] or shape["ch_mult"][0] != 1:
        wrong = {key: shape[key] for key in ("double_z", "embed_dim", "z_channels", "ch_mult")}
        raise InputError(f"{file}: no KL autoencoder that diffusers' AutoencoderKL can hold: {wrong}")
    return {"kind": "kl", "net": kl_config(shape, renamed)}, renamed, shape


def first_stage(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The autoencoder's tensors out of a larger checkpoint, its prefix removed."""
    prefixes = [name.removesuffix(FIRST) for name in state if name.endswith(FIRST)]
    if not prefixes:
        raise InputError(f"{file}: no tensor {FIRST}, with any prefix: no KL or VQ autoencoder in CompVis's names")
    prefix = next((p for p in prefixes if p in ("", "first_stage_model.", "vae.")), prefixes[0])
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in inner.items() if name.startswith(PARTS)}


def shape_of(state: Mapping[str, Tensor], resolution: int) -> dict[str, Any]:
    """ddconfig, embed_dim and n_embed (None for KL) of tensors under diffusers' names; KeyError for one that is missing.
    `resolution`, which no tensor tells, is what their attn_resolutions refer to."""

    def count(prefix: str, suffix: str) -> int:
        return next(i for i in itertools.count() if f"{prefix}.{i}.{suffix}" not in state)

    levels, ch = count("encoder.down_blocks", "resnets.0.conv1.weight"), len(state[FIRST])
    widths = [len(state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)]
    z = state["decoder.conv_in.weight"].shape[1]
    codes, quant = state.get("quantize.embedding.weight"), state.get("post_quant_conv.weight")
    attended = (i for i in range(levels) if f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in state)
    return {
        "double_z": len(state["encoder.conv_out.weight"]) == 2 * z,
        "z_channels": z,
        "resolution": resolution,
        "in_channels": state[FIRST].shape[1],
        "out_ch": len(state["decoder.conv_out.weight"]),
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": count("encoder.down_blocks.0.resnets", "conv1.weight"),
        "attn_resolutions": [resolution >> i for i in attended],
        "n_embed": None if codes is None else len(codes),
        "embed_dim": z if quant is None else quant.shape[1],
    }


def kl_config(shape: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL."""
    sides = [shape["resolution"] >> i for i in range(len(shape["ch_mult"]))]
    attended = ["Attn" * (side in shape["attn_resolutions"]) for side in sides]
    return {
        "in_channels": shape["in_channels"],
        "out_channels": shape["out_ch"],
        "down_block_types": [f"{attn}DownEncoderBlock2D" for attn in attended],
        "up_block_types": [f"{attn}UpDecoderBlock2D" for attn in reversed(attended)],
        "block_out_channels": [shape["ch"] * m for m in shape["ch_mult"]],
        "layers_per_block": shape["num_res_blocks"],
        "latent_channels": shape["z_channels"],
        "norm_num_groups": GROUPS,
        "sample_size": shape["resolution"],
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def read_config(path: Path) -> dict[str, Any]:
    """ddconfig, embed_dim and n_embed of a yaml of latent-diffusion or taming-transformers, of a first stage itself or of a
    diffusion model around one; attn_resolutions are those that its levels reach."""
    params = read_mapping(path, {"model": {"params": dict}})["model"]["params"]
    around = params.get("first_stage_config")
    params = around["params"] if isinstance(around, dict) and isinstance(around.get("params"), dict) else params
    inner = params.get("ddconfig")
    if not isinstance(inner, dict):
        raise InputError(f"{path}: no ddconfig under model.params or its first_stage_config: no yaml of an autoencoder")
    for key, kind in {"resolution": int, "ch_mult": list, "attn_resolutions": list}.items():
        if not isinstance(inner.get(key, kind()), kind):
            raise InputError(f"{path}: ddconfig.{key} is {inner[key]!r}, not of type {kind.__name__}")
    asked = {**inner, **{key: params[key] for key in ("embed_dim", "n_embed") if key in params}}
    if {"resolution", "ch_mult", "attn_resolutions"} <= asked.keys():
        sides = [asked["resolution"] >> i for i in range(len(asked["ch_mult"]))]
        asked["attn_resolutions"] = [side for side in sides if side in asked["attn_resolutions"]]
    return asked
