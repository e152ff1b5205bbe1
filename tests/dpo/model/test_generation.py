"""Draws follow the distribution, and what stands beside a prompt, or is padded, changes nothing."""

import torch

from dpo.model.generation import Generate, Sampling, inverse_cdf

PROMPTS = [(5, 6, 7), (12,), (50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61)]


class TestInverseCDF:
    def test_hand_numbers(self):
        # Probabilities 1/2, 1/4, 0, 1/4: cumulative 0.5, 0.75, 0.75, 1.
        logits = torch.tensor([0.5, 0.25, 0.0, 0.25], dtype=torch.float64).log().expand(6, 4)
        uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.999], dtype=torch.float64)
        assert inverse_cdf(logits, uniform).tolist() == [0, 0, 1, 1, 3, 3]

    def test_a_token_of_probability_0_is_never_drawn(self):
        logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert inverse_cdf(logits, ends).tolist() == [1, 1]

    def test_a_shift_of_the_logits_changes_nothing(self):
        logits = torch.randn(50, 11, dtype=torch.float64)
        uniform = torch.rand(50, dtype=torch.float64)
        assert torch.equal(inverse_cdf(logits + 1e4, uniform), inverse_cdf(logits, uniform))

    def test_evenly_spaced_numbers_count_out_the_distribution(self):
        logits = torch.randn(7, dtype=torch.float64)
        numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        counts = torch.bincount(inverse_cdf(logits.expand(10_000, 7), numbers), minlength=7)
        torch.testing.assert_close(counts / 10_000, logits.softmax(0), rtol=0, atol=2e-4, check_dtype=False)


class TestGenerate:
    def test_padding_on_the_left_changes_nothing(self, make_network, packable):
        network = make_network(packable)
        sampling = Sampling(max_new_tokens=6, temperature=1.0, ends=frozenset({96}), pad_id=0)
        together = Generate().write(network, PROMPTS, range(3), sampling)
        for n, prompt in enumerate(PROMPTS):
            (alone,) = Generate().write(network, [prompt], [n], sampling)
            end = alone.index(96) + 1 if 96 in alone else len(alone)
            assert together[n][:end] == alone[:end]

    def test_a_frozen_head_is_not_copied_for_each_prompt(self, make_network, largest):
        network = make_network("Llama", vocab_size=5000)
        weight = network.get_output_embeddings().weight
        assert not weight.requires_grad  # a trained one is not copied anyway
        sampling = Sampling(max_new_tokens=2, temperature=1.0, ends=frozenset({96}), pad_id=0)
        with largest:
            Generate().write(network, PROMPTS, range(3), sampling)
        assert largest.elements == weight.numel()

    def test_the_network_is_as_before(self, make_network):
        network = make_network("Llama")
        shipped, head = network.generation_config, network.get_output_embeddings()
        sampling = Sampling(max_new_tokens=2, temperature=1.0, ends=frozenset({96}), pad_id=0)
        Generate().write(network, PROMPTS, range(3), sampling)
        assert network.generation_config is shipped
        assert not head._forward_pre_hooks
