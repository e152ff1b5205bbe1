"""SPPO: one iteration of self-play preference optimisation. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def sppo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: SPPO, beta 1e-3 (eta 1000); half of DPO's rate, as in Wu et al. 2024 (5e-7)."""
    return one_stage("sppo", data, beta=1e-3, learning_rate=5e-5)


if __name__ == "__main__":
    main(sppo)
