"""MPO: DPO, BCO and imitation in one weighted sum, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import ObjectiveConfig, Run
from dpo.train import Optimiser

PARTS = (
    {"weight": 0.8, "name": "dpo", "beta": 0.1},
    {"weight": 0.2, "name": "bcopair", "beta": 0.1},
    {"weight": 1.0, "name": "sft"},
)


def mpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: 0.8 DPO + 0.2 BCO + 1.0 SFT (Wang et al. 2024, arXiv:2411.10442); DPO's rate."""
    return (
        Run(
            name="mpo",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "mixture", "parts": list(PARTS)}),
            optimiser=Optimiser(learning_rate=1e-4),
        ),
    )


if __name__ == "__main__":
    main(mpo)
