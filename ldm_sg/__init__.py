"""ldm_sg: label-free, self-guided latent diffusion. Public names load on first use, so `import ldm_sg` is instant."""

from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AnnotateConfig": "ldm_sg.config",
    "Autoencoder": "ldm_sg.autoencoder",
    "Conditioner": "ldm_sg.models.conditioner",
    "Edit": "ldm_sg.sampling.edit",
    "Guidance": "ldm_sg.guidance.signal",
    "GuidanceSpec": "ldm_sg.guidance.signal",
    "InputError": "ldm_sg.errors",
    "LatentSet": "ldm_sg.data.latents",
    "SampleOptions": "ldm_sg.sampling.options",
    "SelfGuidedPipeline": "ldm_sg.pipeline",
    "TrainConfig": "ldm_sg.config",
    "load_autoencoder": "ldm_sg.autoencoder",
    "load_config": "ldm_sg.api",
}
_VERBS = ("pack", "annotate", "train", "finetune", "sample", "evaluate")  # functions of ldm_sg.api
_ROOMS = ("annotate", "evaluate")  # verbs whose name a room has too
__all__ = [*_PUBLIC, *_VERBS, "__version__"]


class _Room(ModuleType):
    """A room with the name of a verb: called, it is the verb. (A package and a function cannot both be `ldm_sg.annotate`, and
    whichever was imported last would hide the other; Python's data model provides for modules of a class of their own.)"""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(import_module("ldm_sg.api"), self.__name__.rpartition(".")[2])(*args, **options)


for _name in _ROOMS:
    import_module(f"{__name__}.{_name}").__class__ = _Room


def __getattr__(name: str) -> Any:
    if name in _PUBLIC or name in _VERBS:
        return getattr(import_module(_PUBLIC.get(name, "ldm_sg.api")), name)
    raise AttributeError(f"module 'ldm_sg' has no attribute {name!r}")
