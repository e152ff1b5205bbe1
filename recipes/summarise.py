"""Learning to summarize (Stiennon et al. 2020): SFT, a reward model, PPO; ROUGE beside it. Runs as a script."""

from dpo.data import DataConfig
from dpo.model.base import ModelConfig
from dpo.rewards import RougeTerm
from dpo.run import main
from dpo.settings import STAGE, ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Loop, Optimiser


def summarise(data: DataConfig) -> tuple[Run, ...]:
    """Three stages, on pairs of summaries: what a learned reward rises to, against ROUGE, which PPO could train too.

    The same with ROUGE as the reward: ppo.rollout.rewards=[{kind: rouge}] ppo.rollout.value=null.
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
            objective=ObjectiveConfig.model_validate({"name": "ppo", "kl_coefficient": 0.05}),
            model=ModelConfig(adapter=f"{STAGE}sft"),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            loop=Loop(per_device_train_batch_size=8, gradient_accumulation_steps=2),
            rollout=RolloutConfig(
                rewards=(learned_reward(),), watch=(RougeTerm(),), value=f"{STAGE}reward", prompts_per_rollout=64
            ),
        ),
    )


if __name__ == "__main__":
    main(summarise)
