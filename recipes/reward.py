"""A reward model alone: Bradley-Terry on the comparisons of the data. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, reward_stage


def reward(data: DataConfig) -> tuple[Run, ...]:
    """One stage: an adapter and a head that score a completion at its last token (Christiano et al. 2017)."""
    return (reward_stage(data),)


if __name__ == "__main__":
    main(reward)
