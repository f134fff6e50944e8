"""Online RL data: the policy completes prompts, the completions are scored, and the optimizer trains on them.

Reading order: `rewards.py`, `rollout_batch.py`, `collector.py`, `rollout_source.py` (the batch source of the training).
"""

from luthier.rl.builtin_rewards import BUILT_IN
from luthier.rl.collector import RolloutCollector, RolloutObjective
from luthier.rl.function_rewards import load_reward, wrap_function
from luthier.rl.http_rewards import build_endpoint_reward
from luthier.rl.rewards import Completion, Reward, compute_rewards
from luthier.rl.rollout_batch import RolloutBatch
from luthier.rl.rollout_source import RolloutSource

__all__ = ["BUILT_IN", "Completion", "Reward", "RolloutBatch", "RolloutCollector", "RolloutObjective", "RolloutSource",
           "build_endpoint_reward", "compute_rewards", "load_reward", "wrap_function"]
