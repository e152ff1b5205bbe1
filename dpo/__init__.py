"""dpo-lab: one preference dataset, any objective, one base model on one GPU, and an honest comparison.

The names below are imported on first use: `import dpo` costs nothing, `from dpo import Run` what it needs. The commands
as functions are in `dpo.api`: `from dpo.api import train, compare, evaluate, chat, export, card`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpo.errors import CheckpointError, ConfigError, DataError, DPOError, ModelError, RewardError, TrainingError

if TYPE_CHECKING:
    from dpo.api import Compared
    from dpo.chat import Conversation, Manner
    from dpo.compare import Wanted, run_comparison
    from dpo.data import DataConfig, Message, Preference
    from dpo.evaluate import evaluate_run
    from dpo.evaluation.records import Comparison
    from dpo.export import Exported
    from dpo.losses import Objective
    from dpo.model.base import ModelConfig
    from dpo.run import Result, execute
    from dpo.settings import ObjectiveConfig, Run, plan, read_run
    from dpo.sources import RolloutConfig
    from dpo.train import Loop, Optimiser
    from dpo.types import JudgementLogps, LossOutput, PairLogps, RankingScores, Rollout

__all__ = [
    "CheckpointError",
    "Compared",
    "Comparison",
    "ConfigError",
    "Conversation",
    "DPOError",
    "DataConfig",
    "DataError",
    "Exported",
    "JudgementLogps",
    "Loop",
    "LossOutput",
    "Manner",
    "Message",
    "ModelConfig",
    "ModelError",
    "Objective",
    "ObjectiveConfig",
    "Optimiser",
    "PairLogps",
    "Preference",
    "RankingScores",
    "Result",
    "RewardError",
    "Rollout",
    "RolloutConfig",
    "Run",
    "TrainingError",
    "Wanted",
    "evaluate_run",
    "execute",
    "plan",
    "read_run",
    "run_comparison",
]

_ROOMS = {
    "dpo.api": ("Compared",),
    "dpo.chat": ("Conversation", "Manner"),
    "dpo.compare": ("Wanted", "run_comparison"),
    "dpo.data": ("DataConfig", "Message", "Preference"),
    "dpo.evaluate": ("evaluate_run",),
    "dpo.evaluation.records": ("Comparison",),
    "dpo.export": ("Exported",),
    "dpo.losses": ("Objective",),
    "dpo.model.base": ("ModelConfig",),
    "dpo.run": ("Result", "execute"),
    "dpo.settings": ("ObjectiveConfig", "Run", "plan", "read_run"),
    "dpo.sources": ("RolloutConfig",),
    "dpo.train": ("Loop", "Optimiser"),
    "dpo.types": ("JudgementLogps", "LossOutput", "PairLogps", "RankingScores", "Rollout"),
}
_PLACE = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACE[name]), name)
