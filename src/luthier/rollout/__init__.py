"""Generation as a data source: prompts are answered by the model that learns, judged, and learned from.

Reading order: `rewards.py` (what an answer is worth), `sandbox.py` (tests run on answers), `rollouts.py` (the feed).
"""

from luthier.rollout.rewards import BUILT_IN, Answer, Reward, endpoint, from_function, judged, named
from luthier.rollout.rollouts import Rollouts, Rolls

__all__ = ["BUILT_IN", "Answer", "Reward", "Rollouts", "Rolls", "endpoint", "from_function", "judged", "named"]
