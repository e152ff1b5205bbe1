"""ORPO: imitation and an odds ratio in one stage, no reference, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def orpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage from the base model: ORPO, weight 0.1; mostly imitation, so the rate of the SFT stage."""
    return one_stage("orpo", data, odds_ratio_weight=0.1, learning_rate=2e-4)


if __name__ == "__main__":
    main(orpo)
