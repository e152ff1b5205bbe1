"""SFT on the preferred completions, then DPO from there. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.model.base import ModelConfig
from dpo.run import main
from dpo.settings import PREVIOUS, ObjectiveConfig, Run
from dpo.train import Optimiser


def sft_dpo(data: DataConfig) -> tuple[Run, ...]:
    """Two stages on one base: the reference of the second is the adapter of the first, frozen."""
    return (
        Run(
            name="sft",
            data=data,
            objective=ObjectiveConfig.model_validate("sft"),
            optimiser=Optimiser(learning_rate=2e-4),
        ),
        Run(
            name="dpo",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "dpo", "beta": 0.1}),
            model=ModelConfig(adapter=PREVIOUS),
            optimiser=Optimiser(learning_rate=1e-4),
        ),
    )


if __name__ == "__main__":
    main(sft_dpo)
