"""Sampling depends on its arguments alone, stops where a completion ends, and leaves training as it was."""

from dataclasses import dataclass
from typing import final

import pytest
import torch

from dpo.errors import ModelError
from dpo.model.generation import Backend
from dpo.model.rollout import end_tokens, sample

PROMPTS = [(5, 6, 7), (12,), (50, 51, 52, 53, 54, 55), (70, 71)]
MANY = [(5, 6, 7)] * 24


@pytest.fixture
def model(start, perturb):
    model = start()
    perturb(model)
    return model


def completions(model, prompts=PROMPTS, **settings):
    return [one.completion for one in sample(model, prompts, **{"max_new_tokens": 8, **settings})]


def test_the_seed_decides(model):
    first = completions(model, MANY, seed=1)
    assert completions(model, MANY, seed=1) == first
    assert completions(model, MANY, seed=2) != first
    assert len(set(first)) > 12


def test_the_state_of_the_generator_is_as_before(model):
    state = torch.get_rng_state()
    completions(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_state_of_the_generator_decides_nothing(model):
    first = completions(model)
    torch.rand(5)
    assert completions(model) == first


def test_samples_come_in_the_order_of_the_prompts(model):
    samples = sample(model, PROMPTS, max_new_tokens=8, temperature=0, batch_size=2)
    assert [one.prompt for one in samples] == PROMPTS
    for one in samples:
        assert one.text == model.tokenizer.decode(one.completion, skip_special_tokens=True)


def test_padding_changes_nothing(model):
    together = completions(model, temperature=0)
    assert together == [completions(model, [prompt], temperature=0)[0] for prompt in PROMPTS]
    assert together == completions(model, temperature=0, batch_size=3)


class TestOneByOne:
    """What a completion depends on: its prompt, which of the prompt's it is, and the seed; not on its company."""

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_the_other_prompts_change_nothing(self, model, batch_size):
        together = completions(model, [*MANY[:3], *PROMPTS[1:]], batch_size=batch_size)
        assert together[:3] == completions(model, MANY[:3])
        assert together[3:] == [completions(model, [prompt])[0] for prompt in PROMPTS[1:]]

    def test_the_order_changes_nothing(self, model):
        assert completions(model, PROMPTS[::-1]) == completions(model)[::-1]

    def test_a_longer_limit_goes_on_from_a_shorter_one(self, model):
        short, long = completions(model, max_new_tokens=3), completions(model, max_new_tokens=8)
        assert [one[:3] for one in long] == short

    def test_completions_of_one_prompt_are_each_their_own(self, model):
        prompts = [prompt for prompt in PROMPTS for _ in range(4)]
        first = completions(model, prompts, seed=3)
        assert completions(model, prompts, seed=3) == first
        assert len(set(first)) == 16
        assert first[:4] == completions(model, PROMPTS[:1] * 4, seed=3)
        assert first[0] == completions(model, PROMPTS[:1], seed=3)[0]

    def test_seeds_beside_each_other_share_no_completion(self, model):
        seeds = [set(completions(model, PROMPTS[:1] * 8, seed=seed)) for seed in range(4)]
        assert len(set.union(*seeds)) == 32

    def test_the_backend_gets_each_prompt_with_a_seed_of_its_own(self, model):
        @final
        @dataclass(frozen=True)
        class Echo(Backend):
            def write(self, network, prompts, seeds, sampling):
                assert (sampling.max_new_tokens, sampling.temperature) == (8, 0.5)
                return [
                    [10 + seed % 300, *prompt, *sampling.ends, 4] for prompt, seed in zip(prompts, seeds, strict=True)
                ]

        found = sample(model, MANY[:3] + PROMPTS, max_new_tokens=8, temperature=0.5, backend=Echo(), batch_size=2)
        (end,) = end_tokens(model)
        assert [one.completion[1:] for one in found] == [(*prompt, end) for prompt in MANY[:3] + PROMPTS]
        assert len({one.completion[0] for one in found}) == 7
        assert all(one.finished for one in found)


def test_temperature_0_takes_the_most_likely_token(model):
    (completion,) = completions(model, [PROMPTS[0]], temperature=0, max_new_tokens=4)
    with model.reading("policy") as network:
        for n, token in enumerate(completion):
            before = torch.tensor([[*PROMPTS[0], *completion[:n]]])
            assert network(input_ids=before).logits[0, -1].argmax().item() == token


def test_temperature_divides_the_logits(model):
    cold = completions(model, MANY, temperature=0.01)
    assert len(set(cold)) == 1
    assert cold[0] == completions(model, MANY[:1], temperature=0)[0]


def test_the_first_token_follows_the_distribution(model):
    # 4,000 draws against the probabilities at temperature 2: chi-square over the 20 likeliest tokens and the rest has
    # mean 20 and deviation sqrt(40) = 6.3, so 45 is 4 deviations above.
    count = 4000
    with model.reading("policy") as network:
        probabilities = (network(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 2).softmax(-1)
    drawn = [one[0] for one in completions(model, PROMPTS[:1] * count, max_new_tokens=1, temperature=2, batch_size=500)]
    top = probabilities.topk(20).indices
    seen = torch.bincount(torch.tensor(drawn), minlength=len(probabilities))[top].double()
    expected = count * probabilities[top]
    seen, expected = (torch.cat([one, count - one.sum(0, keepdim=True)]) for one in (seen, expected))
    assert expected.min() > 5
    assert ((seen - expected).square() / expected).sum() < 45


def test_the_role_speaks(model):
    assert completions(model, temperature=0) != completions(model, temperature=0, role="reference")


def test_it_stops_at_the_end_token(model):
    (whole,) = sample(model, [PROMPTS[0]], max_new_tokens=8, temperature=0)
    assert not whole.finished
    assert len(whole.completion) == 8
    stop = whole.completion[2]
    model.network.generation_config.eos_token_id = [stop]
    first = whole.completion.index(stop)
    (ended,) = sample(model, [PROMPTS[0]], max_new_tokens=8, temperature=0)
    assert ended.finished
    assert ended.completion == whole.completion[: first + 1]
    together = sample(model, PROMPTS, max_new_tokens=8, temperature=0)  # others write on, this one is filled up
    assert together[0] == ended


def test_every_way_to_end_is_known(model):
    assert end_tokens(model) == {model.tokenizer.eos_token_id}
    model.network.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model) == {7, 9, model.tokenizer.eos_token_id}
    model.network.generation_config.eos_token_id = None
    assert end_tokens(model) == {model.tokenizer.eos_token_id}


def test_the_full_distribution_whatever_the_model_ships(model):
    expected = completions(model, MANY)
    shipped = model.network.generation_config
    shipped.do_sample, shipped.top_k, shipped.top_p, shipped.temperature = True, 1, 0.1, 0.01
    shipped.repetition_penalty, shipped.min_p = 5.0, 0.9
    assert completions(model, MANY) == expected
    assert model.network.generation_config is shipped


def test_no_dropout_and_the_mode_as_before(start, perturb):
    model = start(lora={"dropout": 0.5})
    perturb(model)
    model.training()
    first = completions(model, temperature=0)
    assert model.network.training
    model.training(False)
    assert completions(model, temperature=0) == first
    assert not model.network.training


def test_an_empty_prompt(model):
    with pytest.raises(ModelError, match="got an empty prompt"):
        completions(model, [(5,), ()])
