"""Turns rows into examples, tokens with weights, and batches. The only package that imports `datasets`.

Reading order: `sources.py`, `splits.py`, `data/formats/registry.py`, `templates.py`, `conversation.py`, `chat.py`,
`char_offsets.py`, `tokenization.py`, `masking.py`, `encoding.py`, `label_encoding.py`, `transforms.py`, `packing.py`,
`batch_source.py`; `load.py` combines them.
"""

from luthier.data.augmentation import (
    ImageAugmentation,
    MixupAugmentation,
    TextAugmentation,
    augment_examples,
)
from luthier.data.batch_source import InMemoryBatchSource
from luthier.data.chat import RenderError
from luthier.data.config import DataConfig, DividedConfig, Source
from luthier.data.conversation import ChatConfig
from luthier.data.encoding import encode_example
from luthier.data.formats.labels import TYPES_WITH_ANSWER
from luthier.data.formats.registry import FORMATS, RowReader, read_examples
from luthier.data.formats.text import read_turn
from luthier.data.images import ImageInput
from luthier.data.load import Datasets, DatasetSpec, check_sources, read_datasets
from luthier.data.masking import MaskingConfig
from luthier.data.overlap import Overlap
from luthier.data.packing import assign_rows, build_batch, build_eval_batches, pack_examples
from luthier.data.paraphrase import paraphrase_examples
from luthier.data.preview import format_preview
from luthier.data.report import DataReport, PartReport
from luthier.data.row_values import InvalidRowError
from luthier.data.rows import RejectedRow, Row
from luthier.data.sources import read_source
from luthier.data.streaming import StreamingBatchSource
from luthier.data.templates import FALLBACK_TEMPLATE, find_stop_tokens, get_saved_chat_template
from luthier.data.tokenization import encode_prompt, encode_prompt_text, uses_chat_template

__all__ = [
    "TYPES_WITH_ANSWER", "ChatConfig", "DataConfig", "DataReport", "Datasets", "DividedConfig", "FALLBACK_TEMPLATE",
    "FORMATS", "MaskingConfig", "InMemoryBatchSource", "MixupAugmentation", "Overlap", "PartReport", "ImageInput",
    "ImageAugmentation", "RowReader",
    "RejectedRow", "RenderError", "Row", "Source", "StreamingBatchSource", "InvalidRowError", "DatasetSpec",
    "TextAugmentation", "augment_examples", "build_batch",
    "check_sources", "encode_example", "encode_prompt_text", "build_eval_batches", "read_examples", "assign_rows",
    "read_datasets",
    "pack_examples", "paraphrase_examples", "format_preview", "encode_prompt", "read_source",
    "get_saved_chat_template", "find_stop_tokens", "uses_chat_template", "read_turn",
]
