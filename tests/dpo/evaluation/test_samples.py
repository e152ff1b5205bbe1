"""What is measured on samples is what the words say; a broken gold reward is named."""

import json
from dataclasses import replace

import pytest
import torch

from dpo.errors import CheckpointError, RewardError
from dpo.evaluation.samples import EvaluationPrompt, Proxy, Spoken, log_ratios, speak
from dpo.model import reference
from dpo.model.rollout import sample
from dpo.rewards import Reward

PROMPTS = [
    EvaluationPrompt("one", (5, 6, 7)),
    EvaluationPrompt("two", (12,)),
    EvaluationPrompt("three", (50, 51, 52, 53)),
]


def length_of_text(prompt: str, completion: str) -> float:
    return float(len(prompt) + len(completion))


@pytest.fixture
def model(start, perturb):
    model = start()
    perturb(model)
    return model


def keys(samples):
    return [(one.prompt, one.completion) for one in samples]


def spoken(model, **changes):
    settings = {"role": "policy", "gold": length_of_text, "per_prompt": 3, "max_new_tokens": 6, "seed": 0}
    return speak(model, PROMPTS, **{**settings, **changes})


class TestSpeak:
    def test_each_prompt_has_its_own_samples_and_means(self, model):
        said = spoken(model)
        assert said.prompts == ("one", "two", "three")
        samples = sample(model, [one.ids for one in PROMPTS for _ in range(3)], max_new_tokens=6, seed=0)
        for i, text in enumerate(one.text for one in PROMPTS):
            row, answers = samples[3 * i : 3 * i + 3], said.answers[i]
            assert len({one.completion for one in row}) > 1
            assert [one.text for one in answers] == [one.text for one in row]
            assert [one.finished for one in answers] == [one.finished for one in row]
            assert said.gold[i] == pytest.approx(sum(length_of_text(text, one.text) for one in row) / 3)
            assert said.length[i] == pytest.approx(sum(len(one.completion) for one in row) / 3)
            assert said.kl[i] == pytest.approx(sum(log_ratios(model, keys(row))) / 3, abs=1e-5)

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
        said = [
            [[one.text for one in row] for row in spoken(model, role=role).answers] for role in ("reference", "policy")
        ]
        assert said[0] != said[1]

    def test_what_is_written_is_read_back(self, model, tmp_path):
        for said in (spoken(model), spoken(model, gold=None)):
            said.write(tmp_path / "samples.jsonl")
            assert Spoken.read(tmp_path / "samples.jsonl") == said

    def test_groups_have_their_own_prompts_and_survive_the_disk(self, model, tmp_path):
        asked = [replace(PROMPTS[0], group="a"), PROMPTS[1], replace(PROMPTS[2], group="b")]
        said = speak(model, asked, role="policy", gold=None, per_prompt=2, max_new_tokens=4, seed=0)
        said.write(tmp_path / "samples.jsonl")
        again = Spoken.read(tmp_path / "samples.jsonl")
        assert again == said
        assert {name: one.prompts for name, one in again.groups().items()} == {"a": ("one",), "b": ("three",)}
        assert again.groups()["b"].answers == said.answers[2:]
        assert spoken(model).groups() == {}

    def test_a_damaged_row_is_named(self, model, tmp_path):
        file = tmp_path / "samples.jsonl"
        spoken(model).write(file)
        file.write_text(file.read_text()[:-20])
        with pytest.raises(CheckpointError, match=r"samples\.jsonl:3: is damaged .* start the run again"):
            Spoken.read(file)


class SumOfTokens(Reward):
    """What is worth the ids of prompt and completion together, which tells them apart from any text."""

    def __call__(self, answers):
        return [float(sum(one.key[0]) * 1000 + sum(one.key[1])) for one in answers]


BY_TOKENS = Proxy(SumOfTokens(), "sum", own=False)


class TestProxy:
    def test_it_scores_the_tokens_of_the_whole_prompt_with_each_answer(self, model):
        said = spoken(model, proxy=BY_TOKENS)
        samples = sample(model, [one.ids for one in PROMPTS for _ in range(3)], max_new_tokens=6, seed=0)
        expected = [float(sum(one.prompt) * 1000 + sum(one.completion)) for one in samples]
        assert [one.proxy for row in said.answers for one in row] == expected
        assert said.proxy == pytest.approx([sum(expected[3 * n : 3 * n + 3]) / 3 for n in range(3)])
        assert said.estimates()["eval/proxy_reward"].value == pytest.approx(sum(expected) / 9)
        assert said.proxy_by == "sum"
        assert "eval/proxy_reward" not in spoken(model).estimates()

    def test_scores_and_who_gave_them_survive_the_disk_and_go_with_their_group(self, model, tmp_path):
        asked = [replace(PROMPTS[0], group="a"), PROMPTS[1], replace(PROMPTS[2], group="b")]
        said = speak(model, asked, role="policy", gold=None, per_prompt=2, max_new_tokens=4, seed=0, proxy=BY_TOKENS)
        said = replace(said, reference_proxy=(1.0, 2.0, 3.0))
        said.write(tmp_path / "samples.jsonl")
        again = Spoken.read(tmp_path / "samples.jsonl")
        assert again == said
        own = again.groups()["b"]
        assert (own.proxy, own.proxy_by, own.reference_proxy) == ((said.proxy[2],), "sum", (3.0,))

    def test_files_from_before_there_was_one_are_read(self, tmp_path):
        answer = {"text": "t", "tokens": 3, "finished": True, "log_ratio": 0.5, "gold": 1.0}
        (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "p", "answers": [answer]}) + "\n")
        said = Spoken.read(tmp_path / "samples.jsonl")
        assert (said.gold, said.proxy, said.proxy_by, said.reference_proxy) == ((1.0,), None, "", ())


class TestKL:
    def test_a_policy_at_its_reference_has_none(self, start):
        assert spoken(start()).kl == (0.0,) * 3

    def test_the_ratio_is_that_of_full_logits(self, model, naive, monkeypatch):
        samples = sample(model, [one.ids for one in PROMPTS], max_new_tokens=6)
        expected = []
        for one in samples:
            sums = {}
            for role in ("policy", "reference"):
                with model.reading(role) as network:
                    sums[role] = naive(network, one.prompt, one.completion).sum().item()
            expected.append(sums["policy"] - sums["reference"])
        for budget in (1, 4096):
            monkeypatch.setattr(reference, "TOKEN_BUDGET", budget)
            assert log_ratios(model, keys(samples)) == pytest.approx(expected, abs=1e-5)

    def test_the_mode_is_as_before(self, model):
        samples = sample(model, [PROMPTS[0].ids], max_new_tokens=6)
        for mode in (True, False):
            model.training(mode)
            log_ratios(model, keys(samples))
            assert model.network.training is mode

    def test_the_estimate_is_near_the_exact_divergence(self, model):
        """Two tokens over a vocabulary of 313: KL = KL(first) + E[KL(second | first)], an end token adding none."""
        prompt = PROMPTS[0].ids
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

        samples = sample(model, [prompt] * 2000, max_new_tokens=2, batch_size=500)
        ratios = torch.tensor(log_ratios(model, keys(samples)))
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
