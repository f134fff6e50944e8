"""Rows to examples to tokens and weights to batches. The only room that imports `datasets`.

Reading order: `sources.py`, `formats.py`, `chat.py`, `encode.py`, `pack.py`, `loader.py`; `load.py` puts them together.
"""

from luthier.data.chat import FALLBACK_TEMPLATE, prompt_and_answer, render, turns
from luthier.data.config import DataConfig, Source
from luthier.data.encode import encode, prompt_of
from luthier.data.formats import FORMATS, examples
from luthier.data.load import Datasets, demand, load
from luthier.data.loader import Loader
from luthier.data.pack import batch, eval_batches, pack
from luthier.data.report import DataReport, Overlap, Part, length_picture, preview
from luthier.data.sources import Refusal, Row
from luthier.data.stream import Stream

__all__ = [
    "DataConfig", "DataReport", "Datasets", "FALLBACK_TEMPLATE", "FORMATS", "Loader", "Overlap", "Part",
    "Refusal", "Row", "Source", "Stream", "batch", "demand", "encode", "eval_batches", "examples", "length_picture",
    "load", "pack", "preview", "prompt_and_answer", "prompt_of", "render", "turns",
]
