"""A reward model, then PPO through it: the loop of RLHF on one base. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import STAGE, ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Loop, Optimiser


def reward_ppo(data: DataConfig) -> tuple[Run, ...]:
    """Two stages: reward, then PPO whose value role starts as the reward model (Ouyang et al. 2022).

    With a reward of your own, ppo.rollout.rewards=[package.module:function] ppo.rollout.value=null, no reward model is
    trained.
    """
    return (
        reward_stage(data),
        Run(
            name="ppo",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "ppo", "kl_coefficient": 0.05}),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            loop=Loop(per_device_train_batch_size=8, gradient_accumulation_steps=2),
            rollout=RolloutConfig(
                rewards=(learned_reward(),), value=f"{STAGE}reward", prompts_per_rollout=64, epochs=2
            ),
        ),
    )


if __name__ == "__main__":
    main(reward_ppo)
