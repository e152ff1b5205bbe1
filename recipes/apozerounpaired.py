"""APO-zero over single completions, each judged desirable or not. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def apozerounpaired(data: DataConfig) -> tuple[Run, ...]:
    """One stage: APO-zero by judgements, beta 0.1; a fifth of DPO's rate, as in D'Oosterlinck et al. 2024."""
    return one_stage("apozerounpaired", data, beta=0.1, learning_rate=2e-5)


if __name__ == "__main__":
    main(apozerounpaired)
