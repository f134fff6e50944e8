"""The family of vision transformers such as ViT. An image is a segment of one placeholder token. Read `hf_model.py`
first.

The backbone computes each image's patches and a [CLS] token. The last state of [CLS], after the final norm, is the
state of the segment's only token. Therefore heads, pooling and objectives work as for texts.

Shape letters: S images of a batch, C channels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.core.errors import BaseError
from luthier.core.protocols import GenerationOutput, SamplingParams
from luthier.core.types import Inputs, LossInputs, Outputs, SegmentTree
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_model import HFModel
from luthier.models.image_processor import ImageProcessor
from luthier.models.soft_prompts.vision import VisionInjector
from luthier.models.task_heads import LOG_PROBS, Pooling


class Vision(HFModel):
    """A vision transformer of Transformers as a `Family`.

    Args:
        model: an `AutoModel` model without a pooler.
        tokenizer: the image processor, which converts pixels to inputs.

    Raises:
        BaseError: the model has no [CLS] token.
    """

    task: ClassVar[str] = "FEATURE_EXTRACTION"
    pooling: Pooling = "first"

    def __init__(self, model: Any, tokenizer: ImageProcessor) -> None:
        super().__init__(model, tokenizer)
        config = model.config
        embeddings: Any = get_optional(self.structure.backbone, "embeddings")
        if not isinstance(get_optional(embeddings, "cls_token"), Tensor):
            raise BaseError(f"a {config.model_type} has no [CLS] token, whose state could represent an image",
                            "choose a ViT, or another model with a [CLS] token")
        height, width = tokenizer.size
        with torch.no_grad():
            unit = self._run_images(torch.zeros(1, tokenizer.channels, height, width, device=self.device)).shape[1]
        self.structure = replace(self.structure, sizes={**self.structure.sizes, "unit": unit,
                                                        "channels": tokenizer.channels,
                                                    "height": height, "width": width})
        self._injector = VisionInjector(self.structure, embeddings)
        self.structure = replace(self.structure, injector=self._injector)

    def states(self, inputs: Inputs) -> Tensor:
        adapters = inputs.segment_tree.adapters
        if len(set(adapters)) < 2 or not self._injector.injections:
            return super().states(inputs)
        # Virtual tokens are inserted into every image of a batch, so each adapter's images are a batch of their own.
        assert inputs.images is not None, "a vision base needs images"
        owner, found = torch.tensor(adapters), []  # [S]
        order = owner.argsort(stable=True)  # [S] the order in which the adapters' batches put the images
        for adapter in owner.unique().tolist():
            rows = (owner == adapter).nonzero()[:, 0].to(self.device)
            part = SegmentTree((1,) * len(rows), (-1,) * len(rows), (adapter,) * len(rows))
            found.append(super().states(replace(inputs, tokens=inputs.tokens[rows], positions=inputs.positions[rows],
                                                segment_tree=part, images=inputs.images[rows])))
        # [S, D] `argsort` of an order is its inverse.
        return torch.cat(found)[order.argsort().to(self.device)]

    def _run(self, inputs: Inputs) -> Tensor:
        assert inputs.images is not None, "a vision base needs images"
        assert inputs.images.shape[0] == inputs.tokens.shape[0] == len(inputs.segment_tree.lengths), "one token each"
        return self._run_images(inputs.images)[:, 0]  # [S, D] of [CLS]

    def _run_images(self, images: Tensor) -> Tensor:
        """[S, 1 + patches, D] The states of [S, C, height, width] images."""
        states: Tensor = self.structure.backbone(pixel_values=images).last_hidden_state
        return states

    def forward(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        if needs & LOG_PROBS:
            raise BaseError("a vision base predicts no tokens, so it has no log-probabilities",
                            "choose an objective for images, such as classify or contrastive")
        return super().forward(inputs, target, needs)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Iterator[GenerationOutput]:
        raise BaseError("a vision base cannot generate text", "choose a causal language model, such as 'smollm2'")
