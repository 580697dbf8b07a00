"""Images -> latents and guidance signals."""

from importlib.util import find_spec

from ldm_sg.errors import InputError

if find_spec("faiss") is None:
    raise InputError("faiss is not installed: pip install 'ldm-sg[cpu]', or on NVIDIA GPUs 'ldm-sg[gpu]', but not both")
