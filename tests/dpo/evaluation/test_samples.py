"""What is measured on samples is what the words say; a broken gold reward is named."""

import pytest
import torch

from dpo.errors import RewardError
from dpo.evaluation.samples import log_ratios, speak
from dpo.model.rollout import sample

PROMPTS = [("one", (5, 6, 7)), ("two", (12,)), ("three", (50, 51, 52, 53))]


def length_of_text(prompt: str, completion: str) -> float:
    return float(len(prompt) + len(completion))


@pytest.fixture
def model(start, perturb):
    model = start()
    perturb(model)
    return model


def spoken(model, **changes):
    settings = {"role": "policy", "gold": length_of_text, "per_prompt": 3, "max_new_tokens": 6, "seed": 0}
    return speak(model, PROMPTS, **{**settings, **changes})


class TestSpeak:
    def test_each_prompt_has_its_own_samples_and_means(self, model):
        said = spoken(model)
        assert said.prompts == ("one", "two", "three")
        assert [[one.prompt for one in row] for row in said.samples] == [[ids] * 3 for _, ids in PROMPTS]
        for i, (text, _) in enumerate(PROMPTS):
            row = said.samples[i]
            assert len({one.completion for one in row}) > 1
            assert said.gold[i] == pytest.approx(sum(length_of_text(text, one.text) for one in row) / 3)
            assert said.length[i] == pytest.approx(sum(len(one.completion) for one in row) / 3)
            assert said.kl[i] == pytest.approx(sum(log_ratios(model, row)) / 3, abs=1e-5)

    def test_estimates_carry_the_ledgers_names(self, model):
        said = spoken(model)
        found = said.estimates()
        assert set(found) == {"kl/policy_reference", "eval/length", "eval/gold_reward"}
        assert found["kl/policy_reference"].value == pytest.approx(sum(said.kl) / 3)
        assert found["eval/gold_reward"].value == pytest.approx(sum(said.gold) / 3)
        assert found["eval/length"].value == pytest.approx(sum(said.length) / 3)
        assert {one.n for one in found.values()} == {3}

    def test_without_a_gold_reward(self, model):
        said = spoken(model, gold=None)
        assert said.gold is None
        assert "eval/gold_reward" not in said.estimates()

    def test_the_reference_has_not_moved_from_itself(self, model):
        assert spoken(model, role="reference").kl == (0.0,) * 3
        assert spoken(model, role="reference").samples != spoken(model).samples


class TestKL:
    def test_a_policy_at_its_reference_has_none(self, start):
        assert spoken(start()).kl == (0.0,) * 3

    def test_the_ratio_is_that_of_full_logits(self, model, naive):
        samples = sample(model, [ids for _, ids in PROMPTS], max_new_tokens=6)
        expected = []
        for one in samples:
            sums = {}
            for role in ("policy", "reference"):
                with model.reading(role) as network:
                    sums[role] = naive(network, one.prompt, one.completion).sum().item()
            expected.append(sums["policy"] - sums["reference"])
        for batch_size in (1, 16):
            assert log_ratios(model, samples, batch_size) == pytest.approx(expected, abs=1e-5)

    def test_the_mode_is_as_before(self, model):
        samples = sample(model, [PROMPTS[0][1]], max_new_tokens=6)
        for mode in (True, False):
            model.training(mode)
            log_ratios(model, samples)
            assert model.network.training is mode

    def test_the_estimate_is_near_the_exact_divergence(self, model):
        """Two tokens over a vocabulary of 313: KL = KL(first) + E[KL(second | first)], an end token adding none."""
        prompt = PROMPTS[0][1]
        vocabulary = len(model.tokenizer)
        paths = torch.tensor([[*prompt, token] for token in range(vocabulary)])
        logp = {}
        for role in ("policy", "reference"):
            with model.reading(role) as network:
                logp[role] = network(input_ids=paths).logits[:, -2:].double().log_softmax(-1)
        divergence = (logp["policy"].exp() * (logp["policy"] - logp["reference"])).sum(-1)
        goes_on = torch.arange(vocabulary) != model.tokenizer.eos_token_id
        first = logp["policy"][0, 0].exp()
        exact = (divergence[0, 0] + (first * goes_on * divergence[:, 1]).sum()).item()

        ratios = torch.tensor(log_ratios(model, sample(model, [prompt] * 2000, max_new_tokens=2, batch_size=500), 500))
        error = ratios.std().item() / len(ratios) ** 0.5
        assert exact > 10 * error
        assert ratios.mean().item() == pytest.approx(exact, abs=4 * error)


class TestGold:
    def test_a_failure_stops_the_measurement_and_names_its_key(self, model):
        with pytest.raises(RewardError, match=r"^evaluation\.gold failed on the prompt 'two' .*: ZeroDivisionError"):
            spoken(model, gold=lambda prompt, _: 1 / (prompt != "two"))

    def test_a_number_that_is_not_finite_stops_it_too(self, model):
        with pytest.raises(RewardError, match=r"^evaluation\.gold returned nan for the prompt 'three'"):
            spoken(model, gold=lambda prompt, _: float("nan") if prompt == "three" else 0.0)
