"""Generation as a data source: prompts are answered by the model that learns, judged, and learned from.

Reading order: `rewards.py` (what an answer is worth), `sandbox.py` (tests run on answers), `collector.py` (the feed).
"""

from luthier.rl.collector import RolloutCollector, RolloutObjective
from luthier.rl.rewards import BUILT_IN, Completion, Reward, call_endpoint, compute_rewards, load_reward, wrap_function

__all__ = ["BUILT_IN", "Completion", "Reward", "RolloutCollector", "RolloutObjective", "call_endpoint",
           "wrap_function", "compute_rewards", "load_reward"]
