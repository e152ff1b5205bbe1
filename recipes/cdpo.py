"""Conservative DPO: DPO with smoothed labels. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def cdpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: conservative DPO, beta 0.1, 10 % of the labels taken as reversed; DPO's rate."""
    return one_stage("cdpo", data, beta=0.1, label_smoothing=0.1, learning_rate=1e-4)


if __name__ == "__main__":
    main(cdpo)
