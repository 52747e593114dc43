"""Pipelines in parts: text encoders without VAE, VAE without text encoders, never the network."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.files import read_json
from launch.trainer.cli import blame
from launch.trainer.families.diffusion import from_diffusers

INDEX = "model_index.json"
TEXT_PARTS = ("text_encoder", "tokenizer", "connectors")
"""Beginnings of the components that ``Diffusion.encode_prompt`` may need."""
PIXEL_PARTS = ("vae", "audio_vae", "image_encoder", "image_processor", "feature_extractor")
"""Those that ``Diffusion.encode_source`` may need."""

_CLEANERS = {"ftfy": "is_ftfy_available", "bs4": "is_bs4_available"}
"""Modules that mend captions, and the function by which diffusers asks for each."""
_PACKAGES = {"ftfy": "ftfy", "bs4": "beautifulsoup4"}


def load_parts(folder: Path, kept: Sequence[str], dtype: torch.dtype, model_type: str) -> Any:
    """Load a pipeline with some of its components, on the CPU; the others are None.

    Args:
        folder: Of the whole pipeline.
        kept: Beginnings of the names of components.
        dtype: Of their weights.
        model_type: For the message where the installed diffusers is too old.

    Raises:
        ModelSourceError: A component is missing or damaged.
    """
    import diffusers
    import transformers

    # Standard error is for our own progress bar; what they warn of, once a caption, is said once.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    index = read_json(folder / INDEX)
    names = [name for name, entry in index.items() if isinstance(entry, list)]
    absent = {name: None for name in names if not name.startswith(tuple(kept))}
    cls = from_diffusers(str(index["_class_name"]), model_type)
    where = f"Invalid --model {str(folder)!r}: {cls.__name__} cannot be loaded"
    with blame(where, "download the folder again"), warnings.catch_warnings():
        # Newer releases call the argument dtype, which older ones do not know.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        options = {"torch_dtype": dtype, "local_files_only": True}
        pipeline = cls.from_pretrained(folder, **options, **absent)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def missing_cleaners(pipeline: Any) -> list[str]:
    """Names of packages with which the pipeline would clean captions, were they installed."""
    module = sys.modules[type(pipeline).__module__]
    wanted = [name for name, asked in _CLEANERS.items() if hasattr(module, asked)]
    return [_PACKAGES[name] for name in wanted if find_spec(name) is None]


def read_index(folder: Path, subfolder: str) -> tuple[str, dict[str, Any]]:
    """Return the class of a pipeline, and the config of one of its components.

    Raises:
        ModelSourceError: The folder is no whole pipeline.
    """
    for needed in (INDEX, f"{subfolder}/config.json"):
        if not (folder / needed).is_file():
            raise ModelSourceError(
                f"Invalid --model {str(folder)!r}: no {needed} there; give the folder of a whole"
                " pipeline."
            )
    name = str(read_json(folder / INDEX).get("_class_name"))
    return name, read_json(folder / subfolder / "config.json")


def free_memory() -> None:
    """Give back the memory of a pipeline that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Cuts:
    """Notes which tokenizers of a pipeline cut what they were given."""

    def __init__(self, pipeline: Any) -> None:
        """Watch the tokenizers; the pipeline finds them where they were."""
        self.names: set[str] = set()
        for name, part in pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                # A processor has its tokenizer inside.
                self._watch(getattr(part, "tokenizer", part), name)

    def _watch(self, tokenizer: Any, name: str) -> None:
        cls, note = type(tokenizer), self.names.add

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = cls.__call__(self, *args, **kwargs)
            # What did not fit into max_length stays with the encoding.
            if any(one.overflowing for one in encoded.encodings or ()):
                note(name)
            return encoded

        # Pipelines call the object, and Python looks a call up in the class alone. A subclass keeps
        # every isinstance.
        tokenizer.__class__ = type(cls.__name__, (cls,), {"__call__": call})
