"""Rows to examples to tokens and weights to batches. The only room that imports `datasets`.

Reading order: `sources.py`, `splits.py`, `formats.py`, `templates.py`, `conversation.py`, `chat.py`, `tokens.py`,
`encode.py`, `hide.py`, `items.py`, `settle.py`, `pack.py`, `loader.py`; `load.py` puts them together.
"""

from luthier.data.augment import MixupAugment, PictureAugment, WordsAugment, augmented, paraphrased
from luthier.data.chat import RenderError
from luthier.data.config import DataConfig, DividedConfig, Source
from luthier.data.conversation import ChatConfig
from luthier.data.encode import encode_prompt_text, prompt_of, templated
from luthier.data.formats import FORMATS, Reader, examples
from luthier.data.hide import Hide
from luthier.data.items import encode
from luthier.data.labelled import ANSWERED
from luthier.data.load import Datasets, Use, demand, load
from luthier.data.loader import Loader
from luthier.data.pack import batch, eval_batches, first_fit, pack
from luthier.data.pictures import Picture
from luthier.data.report import DataReport, Overlap, Part, length_picture, preview
from luthier.data.rows import Refusal, Row
from luthier.data.sources import read
from luthier.data.stream import Stream
from luthier.data.templates import FALLBACK_TEMPLATE, saved_chat_template, stop_tokens
from luthier.data.values import UnfitError
from luthier.data.worded import turn

__all__ = [
    "ANSWERED", "ChatConfig", "DataConfig", "DataReport", "Datasets", "DividedConfig", "FALLBACK_TEMPLATE",
    "FORMATS", "Hide", "Loader", "MixupAugment", "Overlap", "Part", "Picture", "PictureAugment", "Reader",
    "Refusal", "RenderError", "Row", "Source", "Stream", "UnfitError", "Use", "WordsAugment", "augmented", "batch",
    "demand", "encode", "encode_prompt_text", "eval_batches", "examples", "first_fit", "length_picture", "load",
    "pack", "paraphrased", "preview", "prompt_of", "read", "saved_chat_template", "stop_tokens", "templated", "turn",
]
