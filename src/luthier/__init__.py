"""Luthier fine-tunes pretrained models with every method worth knowing, on one mechanism.

    import luthier
    run = luthier.train(base="smollm2", data="mine.jsonl", method="lora")
    print(luthier.evaluate(run, data="unseen.jsonl", metrics="exact"))

Names are loaded when first used, so that `import luthier` and `luthier --help` are quick.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LuthierError", "Recipe", "Run", "__version__", "compare", "evaluate", "export", "features", "open_bank",
           "paraphrase", "plan", "serve", "train"]

if TYPE_CHECKING:
    from luthier.bank import open_bank
    from luthier.build import Recipe
    from luthier.compare import compare
    from luthier.core.errors import LuthierError
    from luthier.evaluate import evaluate
    from luthier.export import export
    from luthier.features import features
    from luthier.paraphrase import paraphrase
    from luthier.plan import plan
    from luthier.runtime.run import Run
    from luthier.serve import serve
    from luthier.train import train

_HOMES = {"Recipe": "luthier.build", "LuthierError": "luthier.core.errors", "Run": "luthier.runtime.run",
          "train": "luthier.train", "evaluate": "luthier.evaluate", "export": "luthier.export",
          "features": "luthier.features", "open_bank": "luthier.bank", "compare": "luthier.compare",
          "paraphrase": "luthier.paraphrase", "plan": "luthier.plan", "serve": "luthier.serve"}


def __getattr__(name: str) -> Any:
    from importlib import import_module
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return vars(import_module(_HOMES[name]))[name]


class _Package(ModuleType):
    """A verb's function wins over the module of the same name that holds it, whichever is imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = vars(value)[name]
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
