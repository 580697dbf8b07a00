"""Without network: one line, at once, with the way out; and the cache is read."""

import ast
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import timm
import torch
from conftest import folder_of
from diffusers import AutoencoderTiny
from huggingface_hub import constants, hf_hub_download

from ldm_sg import hub as hubs
from ldm_sg.annotate.features import load_extractor
from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import FeaturesConfig
from ldm_sg.configfile import ROOT
from ldm_sg.errors import InputError, one_line
from ldm_sg.evaluate.inception import load_inception
from ldm_sg.folder import file_sha256
from ldm_sg.hub import answers, hub
from ldm_sg.verbs.pack import pack

CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub whose port is closed, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, CLOSED)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


LOADERS = {
    "an autoencoder": (lambda: load_autoencoder("taesd"), "autoencoder=PATH"),
    "timm": (lambda: load_extractor(FeaturesConfig(model="resnet18.a1_in1k")), "features.weights=FILE"),
    "open_clip": (lambda: load_extractor(FeaturesConfig(model="open_clip:RN50/openai")), "features.weights=FILE"),
    "inception": (load_inception, "inception:FILE"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_closed_network_costs_seconds_and_nothing_but_the_message(name: str, blocked: Path, capfd) -> None:
    load, way_out = LOADERS[name]
    start = time.perf_counter()
    with pytest.raises(InputError, match=rf"no network.*{way_out}") as caught:
        load()
    assert time.perf_counter() - start < 5 and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_the_command_says_one_line(tmp_path: Path) -> None:
    pack(str(folder_of(tmp_path / "photos")), tmp_path / "shards", size=16)
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": CLOSED, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = ["annotate", "configs/annotate/churches256.yaml", "shards=shards/*.tar", "out=set"]
    code = "from ldm_sg.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "sd-vae-ft-mse" in run.stderr, run.stderr


def test_the_cache_is_read_without_network(blocked: Path) -> None:
    snapshot = blocked / "hub" / "models--madebyollin--taesd" / "snapshots" / ("a" * 40)
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(snapshot)  # fmt: skip
    (blocked / "hub" / "models--madebyollin--taesd" / "refs").mkdir()
    (blocked / "hub" / "models--madebyollin--taesd" / "refs" / "main").write_text("a" * 40)
    with pytest.raises(InputError, match="manifest says factor: 8, its network has 2"):  # it was read
        load_autoencoder("taesd")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_of_the_hub_are_checked_before_they_are_read(suffix: str, blocked: Path, monkeypatch, capsys) -> None:
    """Against the manifest, or else against those that came first; a pickle is not read as one either way."""
    snapshot = blocked / "hub" / "models--madebyollin--taesd" / "snapshots" / ("a" * 40)
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
                    num_decoder_blocks=(1,) * 4).save_pretrained(snapshot, safe_serialization=suffix != "bin")  # fmt: skip
    (blocked / "hub" / "models--madebyollin--taesd" / "refs").mkdir()
    (blocked / "hub" / "models--madebyollin--taesd" / "refs" / "main").write_text("a" * 40)
    [weights] = snapshot.glob("*." + suffix)
    digest = file_sha256(weights)
    assert load_autoencoder("taesd").manifest["sha256"] == digest
    assert f"not pinned: madebyollin/taesd: what came now, sha256 {digest}" in capsys.readouterr().err
    load_autoencoder("taesd")
    assert "pinned" not in capsys.readouterr().err  # once
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match=f"not {digest}, which came first and .*pins.json"):
        load_autoencoder("taesd")
    pinned = blocked / "pinned"
    pinned.mkdir()
    manifest = (ROOT / "autoencoders" / "taesd" / "manifest.yaml").read_text()
    (pinned / "manifest.yaml").write_text(manifest + f"sha256: {'f' * 64}\n")
    with pytest.raises(InputError, match=f"not {'f' * 64}, which its manifest asks for"):
        load_autoencoder(str(pinned))


def test_g_by_name_is_what_came_first(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: real(name, **kwargs))
    torch.manual_seed(0)
    load_extractor(FeaturesConfig(model="resnet10t.c3_in1k"))
    assert "not pinned: resnet10t.c3_in1k at 176 pixels" in capsys.readouterr().err
    torch.manual_seed(0)
    load_extractor(FeaturesConfig(model="resnet10t.c3_in1k"))
    with pytest.raises(InputError, match="which came first"):  # other weights under that name
        load_extractor(FeaturesConfig(model="resnet10t.c3_in1k"))


def test_code_of_others_is_never_trusted() -> None:
    """No call passes trust_remote_code, nor reads a pickle that may run code."""
    calls = [
        (path, node)
        for path in (ROOT / "ldm_sg").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    keywords = [(path, word.arg, word.value) for path, call in calls for word in call.keywords]
    assert not [path for path, name, _ in keywords if name == "trust_remote_code"]
    loads = [
        (path.name, {word.arg: ast.unparse(word.value) for word in call.keywords})
        for path, call in calls
        if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads", "torch.hub.load_state_dict_from_url")
    ]
    odd = [name for name, asked in loads if asked.get("weights_only") != "True"]
    assert len(loads) > 3 and not odd, loads


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        assert not answers(f"http://127.0.0.1:{silent.getsockname()[1]}") and time.perf_counter() - start < 2
    monkeypatch.setattr(hubs.urllib.request, "urlopen", lambda *a, **k: threading.Event().wait())  # looking up a name
    start = time.perf_counter()
    assert not answers(CLOSED) and time.perf_counter() - start < 2


def test_a_hub_that_answers_is_asked_and_its_own_errors_are_told(
    blocked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hubs, "answers", lambda url: True)
    with pytest.raises(InputError, match="it cannot be had: no such model; go elsewhere"), hub("it", "go elsewhere"):
        assert not constants.is_offline_mode()
        logging.getLogger("huggingface_hub").error("Retrying")
        warnings.warn("old", UserWarning, stacklevel=1)
        raise RuntimeError("no \x1b[31msuch\x1b[0m\nmodel")
    assert not caplog.records and not constants.HF_HUB_OFFLINE and one_line(ValueError("")) == "ValueError"
    logging.getLogger("huggingface_hub").error("after")
    assert len(caplog.records) == 1  # loud again


def test_offline_is_respected(blocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hubs, "answers", lambda url: pytest.fail("asked"))
    with pytest.raises(InputError, match="no network, and not in the cache"), hub("it", "way"):
        hf_hub_download("a/b", "config.json")
