"""The roles that say a number: where they read, what they start as, how they are saved, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.errors import ModelError
from dpo.model.base import HEAD_FILE, Base, LanguageModel, LoRA, ModelConfig, ScalarRole, load_base
from dpo.model.scalar import LearnedReward, normalise, scores, values
from dpo.rewards import Answer

KEYS = [((1, 5, 6), (7, 8, 9, 3)), ((1, 5, 6), (10, 3)), ((1, 4), (11, 12, 3))]


@pytest.fixture
def base(tiny_config: ModelConfig) -> Base:
    return load_base(tiny_config)


@pytest.fixture
def model(base: Base, tiny_config: ModelConfig, perturb: Callable[[LanguageModel], None]) -> LanguageModel:
    both = [ScalarRole("reward", None, True), ScalarRole("value", None, True)]
    started = LanguageModel.start(base, tiny_config, seed=0, scalars=both)
    perturb(started)
    started.training(False)
    return started


def alone(model: LanguageModel, role: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """The head's number at every position of the sequence, from a plain forward pass."""
    with model.role(role) as network, torch.no_grad():
        out = network(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
    return model.heads[role](out.hidden_states[-1][0]).squeeze(1)


def test_a_reward_is_read_at_the_last_token_and_a_value_before_each(model: LanguageModel) -> None:
    with torch.no_grad():
        rewards, said = scores(model, KEYS, "reward"), values(model, KEYS)
    for n, (prompt, completion) in enumerate(KEYS):
        torch.testing.assert_close(rewards[n], alone(model, "reward", prompt, completion)[-1], rtol=0, atol=1e-5)
        before = alone(model, "value", prompt, completion)[len(prompt) - 1 : -1]
        torch.testing.assert_close(said[n], before, rtol=0, atol=1e-5)


def test_the_same_completion_twice_is_scored_twice_and_order_is_kept(model: LanguageModel) -> None:
    doubled = [KEYS[2], KEYS[0], KEYS[2], KEYS[1]]
    with torch.no_grad():
        found, once = scores(model, doubled, "reward"), scores(model, KEYS, "reward")
    torch.testing.assert_close(found, once[[2, 0, 2, 1]], rtol=0, atol=1e-5)


def test_only_the_role_that_speaks_gets_a_gradient(model: LanguageModel) -> None:
    scores(model, KEYS, "reward").sum().backward()
    of = {
        role: [p.grad for n, p in model.network.named_parameters() if f".{role}." in n]
        for role in ("reward", "value", "policy")
    }
    assert any(grad is not None and grad.abs().max() > 0 for grad in of["reward"])
    assert all(grad is None for grad in (*of["value"], *of["policy"]))
    assert model.heads["reward"].weight.grad is not None
    assert model.heads["value"].weight.grad is None


def test_a_fresh_head_is_small_and_seeded(base: Base, tiny_config: ModelConfig) -> None:
    found = []
    for seed in (0, 0, 1):
        model = LanguageModel.start(base, tiny_config, seed, scalars=[ScalarRole("reward", None, True)], policy=False)
        found.append(model.heads["reward"].weight.detach().clone())
        assert model.trained == ("reward",)
        assert model.heads["reward"].bias.item() == 0
        model.release()
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].std() == pytest.approx(33**-0.5, rel=0.5)  # 1 / sqrt(hidden + 1), from 32 draws


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_reward_model_is_saved_whole_and_the_value_starts_as_it(
    tiny_config: ModelConfig,
    wide_model_folder: Path,
    tmp_path: Path,
    perturb: Callable[[LanguageModel], None],
    quantization: str,
) -> None:
    changes = {"quantization": quantization, "lora": LoRA(r=4), "name": str(wide_model_folder)}
    config = tiny_config.model_copy(update=changes)
    base = load_base(config)
    first = LanguageModel.start(base, config, 0, scalars=[ScalarRole("reward", None, True)], policy=False)
    perturb(first)
    first.training(False)
    with torch.no_grad():
        expected = scores(first, KEYS, "reward")
    first.save(tmp_path, "reward")
    first.release()
    before = bare(base)
    both = [ScalarRole("reward", str(tmp_path), False), ScalarRole("value", str(tmp_path), True)]
    second = LanguageModel.start(base, config, 5, scalars=both)
    second.training(False)
    with torch.no_grad():
        torch.testing.assert_close(scores(second, KEYS, "reward"), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(scores(second, KEYS, "value"), expected, rtol=0, atol=1e-6)
    assert second.trained == ("policy", "value")
    assert not second.heads["reward"].weight.requires_grad
    second.release()
    assert torch.equal(bare(base), before)  # loading an adapter has left 4-bit weights as they were


def bare(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.network(input_ids=torch.tensor([KEYS[0][0]])).logits


def test_a_reward_model_loads_without_this_project(
    model: LanguageModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """The snippet that README shows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model.save(tmp_path, "reward")
    with torch.no_grad():
        expected = scores(model, KEYS[:1], "reward")
        outside = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(tmp_path)
        ).eval()
        head = load_file(tmp_path / HEAD_FILE)
        ids = torch.tensor([[*KEYS[0][0], *KEYS[0][1]]])
        last = outside(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(last.float() @ head["weight"][0] + head["bias"], expected, rtol=0, atol=1e-5)


def test_normalised_scores_have_mean_0_and_deviation_1_and_the_same_order(model: LanguageModel) -> None:
    with torch.no_grad():
        before = scores(model, KEYS, "reward").double()
        mean, deviation = normalise(model, "reward", KEYS, batch_size=2)
        after = scores(model, KEYS, "reward").double()
    assert mean == pytest.approx(before.mean().item(), abs=1e-6)
    assert deviation == pytest.approx(before.std(correction=0).item(), abs=1e-6)
    torch.testing.assert_close(after, (before - mean) / deviation, rtol=1e-4, atol=1e-4)


def test_an_ensemble_is_combined_and_tells_its_disagreement(model: LanguageModel) -> None:
    answers = [Answer("", "", 1, True, None, "", key) for key in KEYS]
    with torch.no_grad():
        one, two = (scores(model, KEYS, role).tolist() for role in ("reward", "value"))
    ensemble = LearnedReward(model, ("reward", "value"), "min", batch_size=2)
    assert ensemble(answers) == pytest.approx([min(pair) for pair in zip(one, two, strict=True)], abs=1e-5)
    assert ensemble.disagreement == pytest.approx([abs(a - b) / 2 for a, b in zip(one, two, strict=True)], abs=1e-5)
    single = LearnedReward(model, ("reward",), "mean")
    assert single(answers) == pytest.approx(one, abs=1e-5)
    assert single.disagreement == [0, 0, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / HEAD_FILE).unlink(), "an adapter without head.safetensors, expected a reward model"),
        (lambda folder: (folder / HEAD_FILE).write_bytes(b"x"), "head.safetensors: cannot be loaded"),
        (
            lambda folder: save_file(
                {"weight": torch.full((1, 32), float("nan")), "bias": torch.zeros(1)}, folder / HEAD_FILE
            ),
            "values that are not finite",
        ),
        (
            lambda folder: save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, folder / HEAD_FILE),
            r"expected weight \(1, 32\) and bias",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text(
                json.dumps(
                    json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "other/base"}
                )
            ),
            "was trained on the base 'other/base', expected .*: all roles stand on one base",
        ),
    ],
    ids=["no head", "damaged", "not finite", "another shape", "another base"],
)
def test_what_is_no_reward_model_of_this_base_is_refused(
    model: LanguageModel, tiny_config: ModelConfig, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    model.save(tmp_path, "reward")
    base = model.release()
    before = {name: one.clone() for name, one in base.network.state_dict().items()}
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        LanguageModel.start(base, tiny_config, 0, scalars=[ScalarRole("reward", str(tmp_path), False)])
    after = base.network.state_dict()
    assert before.keys() == after.keys()  # the base carries no adapter of the failed start
    assert all(torch.equal(one, after[name]) for name, one in before.items())


def test_full_weights_carry_no_role_beside_them(base: Base, tiny_config: ModelConfig) -> None:
    whole = tiny_config.model_copy(update={"lora": None})
    with pytest.raises(ModelError, match=r"model\.lora=null with the role 'reward'.*Train an adapter"):
        LanguageModel.start(base, whole, 0, scalars=[ScalarRole("reward", None, True)])
