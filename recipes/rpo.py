"""RPO: DPO plus the likelihood of the chosen completion, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def rpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: RPO, beta 0.1, alpha 1; 0.7 of DPO's rate, as in Pang et al. 2024 (7e-7)."""
    return one_stage("rpo", data, beta=0.1, alpha=1.0, learning_rate=7e-5)


if __name__ == "__main__":
    main(rpo)
