"""f-DPO: DPO under another divergence than the reverse KL, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def fdpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: the Jensen-Shannon form, whose pull is bounded; DPO's rate."""
    return one_stage("fdpo", data, beta=0.1, divergence="js", learning_rate=1e-4)


if __name__ == "__main__":
    main(fdpo)
