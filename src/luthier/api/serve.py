"""The verb `serve`: runs and base models over OpenAI's protocol. Read `serving/http_server.py` first.

`model` in a request names a run, or the base itself. All runs share one copy of the base, and requests to different
runs share a batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from luthier.assembly.multi_adapter_loading import display_name, load_served_models
from luthier.core.consent import accepts_consent
from luthier.core.errors import RecipeError
from luthier.reporting.progress import print_line, status
from luthier.serving.http_server import AccessRules, check_installed, open_socket, run_server
from luthier.serving.openai_serving import OpenAIServing


@accepts_consent
def serve(runs: Sequence[Path | str] | Mapping[str, Path | str], *, host: str = "127.0.0.1",
          port: int = 8000, max_num_seqs: int = 16, api_key: str | None = None, prefix_cache_gb: float = 0.5,
          quiet: bool = False,
          base_model: Path | str | None = None, allow_code: Sequence[str] = ()) -> None:
    """Serve until interrupted.

    Args:
        runs: run folders, a base model, or names for them: ``{"law": "runs/law"}`` or ``["law=runs/law"]``; default:
            the name of the folder.
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        host: the address to listen on; 0.0.0.0 accepts requests of every machine that can reach this one.
        max_num_seqs: largest number of requests that are decoded together.
        api_key: what clients must send; required unless `host` is this machine alone. Default: the environment variable
            LUTHIER_API_KEY.
        prefix_cache_gb: memory for what was read of earlier prompts, which later ones that begin alike reuse.
        base_model: where the base of the runs is now, if it was moved.

    Raises:
        MissingExtra: starlette or uvicorn is not installed.
        LuthierError: a run cannot be served, or the address cannot be bound.
    """
    check_installed()
    named = ({name: str(run) for name, run in runs.items()} if isinstance(runs, Mapping)
             else name_runs([str(run) for run in runs]))
    access = AccessRules(api_key if api_key is not None else os.environ.get("LUTHIER_API_KEY", ""), host)
    bound = open_socket(host, port)
    with status("loading", quiet=quiet):
        serving = OpenAIServing(load_served_models(named, base_model, partial(print_line, quiet=quiet)), max_num_seqs,
                                prefix_cache_bytes=int(prefix_cache_gb * 1e9))
    if not quiet:
        address = f"http://{host}:{bound.getsockname()[1]}/v1"
        print(f"serving {', '.join(serving.served.names)} at {address}  (Ctrl-C ends)", flush=True)
    run_server(serving, bound, access)


def name_runs(runs: Sequence[str]) -> dict[str, str]:
    """Runs by name: NAME=RUN, or the name of the folder. Raises `RecipeError` for a name that occurs twice."""
    named: dict[str, str] = {}
    for argument in runs:
        name, separator, run = argument.partition("=")
        has_name = separator and not Path(argument).exists()  # a folder's own name may hold an equals sign
        name, run = (name, run) if has_name else (display_name(argument), argument)
        if name in named:
            raise RecipeError(f"two of {', '.join(runs)} have the name {name!r}", "name them: NAME=RUN")
        named[name] = run
    return named
