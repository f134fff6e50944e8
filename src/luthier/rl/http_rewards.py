"""Rewards from an HTTP endpoint. Read `rewards.py` first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http.client import HTTPException
from urllib import error as http
from urllib import request

from luthier.core.errors import RecipeError, RunError
from luthier.rl.rewards import Completion, Reward, describe_prompt, to_floats


def build_endpoint_reward(url: str, timeout: float) -> Reward:
    """A reward that posts ``{"prompts": [...], "completions": [...], "metadata": [...]}`` to a URL and reads
    ``{"rewards": [...]}`` from the response. Raises `RecipeError` for a URL of another scheme."""
    if not url.startswith(("http://", "https://")):
        raise RecipeError(f"reward.url: {url!r} is not an http:// or https:// URL", "give the full URL")

    def reward(completions: Sequence[Completion]) -> Sequence[float]:
        body = {"prompts": [completion.prompt for completion in completions],
                "completions": [completion.text for completion in completions],
                "metadata": [dict(completion.metadata) for completion in completions]}
        post = request.Request(url, json.dumps(body, default=str).encode(), {"Content-Type": "application/json"})
        try:
            with request.urlopen(post, timeout=timeout) as response:
                return to_floats(json.load(response)["rewards"], len(completions))
        except http.HTTPError as error:
            reason = f"status {error.code} {error.reason}"
        except (OSError, HTTPException) as error:  # refused, unknown host, timeout, connection lost
            reason = str(error) or type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            reason = f"its response is not {{\"rewards\": [numbers]}} ({type(error).__name__}: {error})"
        raise RunError(f"reward endpoint {url} failed for prompt {describe_prompt(completions[0])}: {reason}",
                       "restart the service, then continue with --resume")
    return reward
