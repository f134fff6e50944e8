"""Rows to examples to tokens and weights to batches. The only room that imports `datasets`.

Reading order: `sources.py`, `splits.py`, `data/formats/registry.py`, `templates.py`, `conversation.py`, `chat.py`,
`char_offsets.py`,
`tokenization.py`, `masking.py`, `encoding.py`, `label_encoding.py`, `packing.py`, `batch_source.py`; `load.py` puts
them together.
"""

from luthier.data.augmentation import MixupAugment, PictureAugment, WordsAugment, augmented, paraphrased
from luthier.data.batch_source import Loader
from luthier.data.chat import RenderError
from luthier.data.config import DataConfig, DividedConfig, Source
from luthier.data.conversation import ChatConfig
from luthier.data.encoding import encode
from luthier.data.formats.labels import ANSWERED
from luthier.data.formats.registry import FORMATS, Reader, examples
from luthier.data.formats.text import turn
from luthier.data.images import Picture
from luthier.data.load import Datasets, Use, demand, load
from luthier.data.masking import Hide
from luthier.data.packing import batch, eval_batches, first_fit, pack
from luthier.data.report import DataReport, Overlap, Part, preview
from luthier.data.row_values import UnfitError
from luthier.data.rows import Refusal, Row
from luthier.data.sources import read
from luthier.data.streaming import Stream
from luthier.data.templates import FALLBACK_TEMPLATE, saved_chat_template, stop_tokens
from luthier.data.tokenization import encode_prompt_text, prompt_of, templated

__all__ = [
    "ANSWERED", "ChatConfig", "DataConfig", "DataReport", "Datasets", "DividedConfig", "FALLBACK_TEMPLATE",
    "FORMATS", "Hide", "Loader", "MixupAugment", "Overlap", "Part", "Picture", "PictureAugment", "Reader",
    "Refusal", "RenderError", "Row", "Source", "Stream", "UnfitError", "Use", "WordsAugment", "augmented", "batch",
    "demand", "encode", "encode_prompt_text", "eval_batches", "examples", "first_fit", "load",
    "pack", "paraphrased", "preview", "prompt_of", "read", "saved_chat_template", "stop_tokens", "templated", "turn",
]
