"""P-tuning v2: prompts in every layer, with the settings of its paper. Read `prefix.py` first: this is its other name.

What each layer gets are keys and values of its own, as in prefix tuning; what differs is how it is meant to be used
(Liu et al. 2022, arXiv:2110.07602, section 3.2-3.3): no re-parameterisation, longer prompts, a random start,
understanding as well as generation, and a classification head on the states, which here is the objective's.

The random numbers have the size of the base's own keys and values in each layer; the paper's are standard normal
whatever the layer.

Learning rate 0.05, in the units of `prefix.py`: a random start has further to go than words have. The paper searched
5e-3 to 1e-2 for numbers of size 1 over tens of epochs; runs here are shorter. On the demo's rows 40 steps at 0.05 and
0.1 brought the held-out loss to 1.13 and 1.18.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from luthier.core.protocols import Anatomy
from luthier.methods.prefix import Prefix, init_key_values
from luthier.methods.prompt import PromptTuningInit, VirtualTokenConfig


class PTuningV2Config(VirtualTokenConfig):
    """Settings of P-tuning v2."""

    default_learning_rate: ClassVar[float] = 0.05

    name: Literal["ptuning_v2"] = "ptuning_v2"
    num_virtual_tokens: int = Field(32, ge=1, description="virtual tokens in each layer: below 20 for plain classes, about 100 for "
                                              "labels of every token")
    prompt_tuning_init: PromptTuningInit = Field("random", description="at random, as in the paper, or as the keys and values of real words")

    def attach(self, anatomy: Anatomy, *, seed: int) -> Prefix:
        return Prefix(anatomy, self, *init_key_values(anatomy, self, seed))
