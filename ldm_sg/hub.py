"""What lies on a hub: from the cache, or downloaded; where neither can be, one line at once, and the way out."""

import logging
import queue
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import WEIGHTS, cache_home, file_sha256, read_mapping, write_json

PINS = "pins.json"  # in our cache: name of weights -> sha256
PATIENCE = 3.0  # seconds for a hub to answer; its own library asks for half a minute


@contextmanager
def hub(what: str, way_out: str) -> Iterator[None]:
    """Around calls that may download from the Hugging Face hub: where it does not answer they read its cache, and what
    its libraries log or raise becomes one InputError: `what` cannot be had, why, and the `way_out`."""
    asked = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = asked or not answers(constants.ENDPOINT)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as err:  # hub, HTTP, SSL, timm and diffusers errors have no common base
        why = one_line(err)[:200]
        if constants.HF_HUB_OFFLINE:
            why = f"no network, and not in the cache {constants.HF_HUB_CACHE} ({why[:120]})"
        raise InputError(f"{what} cannot be had: {why}; {way_out}") from err
    finally:
        constants.HF_HUB_OFFLINE = asked
        logging.disable(logging.NOTSET)


def weights_on_hub(repository: str, subfolder: str | None, sha256: str | None) -> tuple[Path, str]:
    """ID[@REVISION] -> the folder with config.json and the weights, and their sha256, checked before anything reads them."""
    name, _, revision = repository.partition("@")
    where = {"repo_id": name, "subfolder": subfolder, "revision": revision or None}
    config = Path(hf_hub_download(filename="config.json", **where))
    try:
        path = Path(hf_hub_download(filename=WEIGHTS, **where))
    except EntryNotFoundError:  # an old repository; torch reads it without running code in it
        path = Path(hf_hub_download(filename=WEIGHTS.replace(".safetensors", ".bin"), **where))
    check_pinned(f"{repository}/{subfolder or ''}".rstrip("/"), digest := file_sha256(path), sha256)
    return config.parent, digest


def check_pinned(name: str, digest: str, sha256: str | None = None) -> None:
    """InputError where weights from a hub are not those of `sha256`, which a manifest gives, or else not those that came first to
    this machine under that name."""
    kept = cache_home() / PINS
    first = read_mapping(kept) if kept.is_file() else {}
    known = sha256 or first.get(name)
    if known is None:
        write_json(kept, first | {name: digest})
        said = f"what came now, sha256 {digest}, is what {kept} asks for from now on"
        print(f"note: not pinned: {name}: {said}", file=sys.stderr)
    elif known != digest:
        who = "its manifest asks for" if sha256 else f"came first and {kept} asks for"
        said = f"{name}: the hub gives weights of sha256 {digest}, not {known}, which {who}"
        raise InputError(f"{said}: name the old ones by ID@REVISION, or if the new ones are right take that line out")


def upload(folder: Path, name: str, private: bool = False) -> str:
    """The files of `folder` as the model repository `name` (USER/NAME) of the hub -> its address."""
    from huggingface_hub import create_repo, upload_folder

    with hub(f"hub://{name}", "log in with `hf auth login`, or export into a folder"):
        create_repo(name, exist_ok=True, private=private)
        upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by ldm-sg")
    return f"{constants.ENDPOINT}/{name}"


def downloadable(url: str) -> bool:
    """Whether torch.hub keeps that file already, or its server answers."""
    kept = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return kept.is_file() or answers(url)


def answers(url: str) -> bool:
    """Whether anything does, within PATIENCE: an error page is an answer too. In a thread, since looking a name up takes as
    long as it likes."""
    found: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
            found.put(True)
        except (OSError, ValueError) as err:
            found.put(isinstance(err, urllib.error.HTTPError))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=PATIENCE)
    except queue.Empty:
        return False
