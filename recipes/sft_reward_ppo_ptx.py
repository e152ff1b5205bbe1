"""InstructGPT's three steps on one base: SFT, a reward model, PPO with demonstrations mixed in. Runs as a script."""

from dpo.data import DataConfig
from dpo.model.base import ModelConfig
from dpo.run import main
from dpo.settings import STAGE, ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Loop, Optimiser


def sft_reward_ppo_ptx(data: DataConfig) -> tuple[Run, ...]:
    """Three stages (Ouyang et al. 2022): reward model, value and policy start as the SFT adapter or from it.

    The reference of PPO is the SFT adapter, frozen. In place of the paper's pretraining text, its ptx term imitates the
    preferred completions; the paper's weight, 27.8, is for a loss summed over many more tokens.
    """
    return (
        Run(
            name="sft",
            data=data,
            objective=ObjectiveConfig.model_validate("sft"),
            optimiser=Optimiser(learning_rate=2e-4),
        ),
        reward_stage(data, adapter=f"{STAGE}sft"),
        Run(
            name="ppo",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "ppo", "kl_coefficient": 0.02, "ptx_coefficient": 0.1}),
            model=ModelConfig(adapter=f"{STAGE}sft"),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            loop=Loop(per_device_train_batch_size=8, gradient_accumulation_steps=2),
            rollout=RolloutConfig(rewards=(learned_reward(),), value=f"{STAGE}reward", prompts_per_rollout=64),
        ),
    )


if __name__ == "__main__":
    main(sft_reward_ppo_ptx)
