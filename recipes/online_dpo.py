"""A reward model, then DPO on fresh pairs that it judges. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Optimiser


def online_dpo(data: DataConfig) -> tuple[Run, ...]:
    """Two stages: reward, then DPO on the better and the worse of two samples (Guo et al. 2024, arXiv:2402.04792).

    Any objective over pairs takes its place: online.objective.name=ipo. With a reward of your own,
    online.rollout.rewards=[package.module:function], no reward model is trained.
    """
    return (
        reward_stage(data),
        Run(
            name="online",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "dpo", "beta": 0.1}),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            rollout=RolloutConfig(rewards=(learned_reward(),), prompts_per_rollout=16, completions_per_prompt=2),
        ),
    )


if __name__ == "__main__":
    main(online_dpo)
