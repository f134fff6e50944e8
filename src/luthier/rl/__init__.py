"""Generation as a data source: prompts are answered by the model that learns, judged, and learned from.

Reading order: `rewards.py` (what an answer is worth), `sandbox.py` (tests run on answers), `collector.py` (the feed).
"""

from luthier.rl.collector import Rollouts, Rolls
from luthier.rl.rewards import BUILT_IN, Answer, Reward, endpoint, from_function, judged, named

__all__ = ["BUILT_IN", "Answer", "Reward", "Rollouts", "Rolls", "endpoint", "from_function", "judged", "named"]
