"""ldm_sg: label-free, self-guided latent diffusion. Public names load on first use, so `import ldm_sg` is instant."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Autoencoder": "ldm_sg.autoencoder",
    "load_autoencoder": "ldm_sg.autoencoder",
    "Conditioner": "ldm_sg.models.conditioner",
    "Guidance": "ldm_sg.guidance.signal",
    "GuidanceSpec": "ldm_sg.guidance.signal",
    "InputError": "ldm_sg.errors",
    "SelfGuidedPipeline": "ldm_sg.pipeline",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ldm_sg' has no attribute {name!r}")
