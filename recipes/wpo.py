"""WPO: DPO weighted by how likely the policy is to write a pair, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def wpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: WPO, beta 0.01; DPO's rate, as in Zhou et al. 2024 (1e-6)."""
    return one_stage("wpo", data, beta=0.01, learning_rate=1e-4)


if __name__ == "__main__":
    main(wpo)
