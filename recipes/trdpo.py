"""TR-DPO: DPO whose reference follows the policy, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def trdpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: TR-DPO with soft updates, alpha 0.6 (Gorbatovski et al. 2024); DPO's rate."""
    return one_stage("trdpo", data, beta=0.1, alpha=0.6, tau=1, learning_rate=1e-4)


if __name__ == "__main__":
    main(trdpo)
