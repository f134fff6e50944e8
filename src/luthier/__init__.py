"""Luthier fine-tunes pretrained models: many methods, objectives and model families, in any combination.

    import luthier
    run = luthier.train(model="smollm2", data="mine.jsonl", method="lora")
    print(luthier.evaluate(run, data="unseen.jsonl", metrics="exact_match"))

Names are loaded when first used, so that `import luthier` and `luthier --help` are quick.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LuthierError", "Recipe", "Run", "__version__", "compare_methods", "evaluate", "export",
           "extract_features", "load_adapters", "paraphrase", "plan", "predict", "rlhf", "serve", "train"]

if TYPE_CHECKING:
    from luthier.api.compare import compare_methods
    from luthier.api.evaluate import evaluate
    from luthier.api.export import export
    from luthier.api.features import extract_features
    from luthier.api.load_adapters import load_adapters
    from luthier.api.paraphrase import paraphrase
    from luthier.api.plan import plan
    from luthier.api.predict import predict
    from luthier.api.rlhf import rlhf
    from luthier.api.run import Run
    from luthier.api.serve import serve
    from luthier.api.train import train
    from luthier.assembly import Recipe
    from luthier.core.errors import LuthierError

# Public name -> the module that defines it.
_MODULES = {"Recipe": "luthier.assembly", "LuthierError": "luthier.core.errors", "Run": "luthier.api.run",
            "train": "luthier.api.train", "evaluate": "luthier.api.evaluate", "export": "luthier.api.export",
            "extract_features": "luthier.api.features", "load_adapters": "luthier.api.load_adapters",
            "compare_methods": "luthier.api.compare", "paraphrase": "luthier.api.paraphrase",
            "plan": "luthier.api.plan", "predict": "luthier.api.predict", "rlhf": "luthier.api.rlhf",
            "serve": "luthier.api.serve"}


def __getattr__(name: str) -> Any:
    from importlib import import_module
    if name not in _MODULES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return vars(import_module(_MODULES[name]))[name]


def __dir__() -> list[str]:
    return sorted(__all__)
