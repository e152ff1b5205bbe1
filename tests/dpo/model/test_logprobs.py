"""The engine equals a loop over full logits, values and gradients, and never holds full logits."""

import math
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpo.errors import ModelError
from dpo.model import logprobs as module
from dpo.model.base import LanguageModel, load_base
from dpo.model.forest import Forest, Group
from dpo.model.layout import choose_layout
from dpo.model.logprobs import Head, Spread, check_head, completion_hidden, completion_logps, token_scores

BOTH = Spread(entropy=True, collision=True)

GROUPS = [
    Group((5, 6, 7), ((20, 21, 3), (30, 3))),
    Group((12,), ((40, 41, 42, 43, 44, 3),)),
    Group((50, 51, 52, 53, 54), ((60,), (61, 62, 63, 3))),
]
SIZE = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def network_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    match kind:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZE))
        case "gemma2":
            return Gemma2ForCausalLM(Gemma2Config(**SIZE, final_logit_softcapping=2.0))
        case "cohere":
            return CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.3))
        case "granite":
            return GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=4.0))
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=True))
        case _:
            raise AssertionError(kind)


class TestAgainstNaive:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("chunk", [1, 3, 256])
    def test_values_and_adapter_gradients(self, tiny_config, naive, perturb, dtype, tolerance, chunk):
        base = load_base(tiny_config)
        base.network.to(dtype)
        model = LanguageModel.start(base, tiny_config, seed=0)
        perturb(model)
        scored = completion_logps(model.network, Forest.padded(GROUPS, 0), chunk)
        expected = [naive(model.network, group.prompt, one) for group in GROUPS for one in group.completions]
        assert scored.tokens.dtype == dtype
        torch.testing.assert_close(scored.tokens, torch.cat(expected), rtol=0, atol=tolerance)
        torch.testing.assert_close(scored.sums, torch.stack([one.sum() for one in expected]), rtol=0, atol=tolerance)
        assert scored.lengths.tolist() == [len(one) for one in expected]

        weight = torch.linspace(-1, 1, len(expected), dtype=dtype)  # no sum is weighted like another
        ours = torch.autograd.grad((weight * scored.sums).sum(), model.parameters())
        plain = torch.autograd.grad(
            sum(w * one.sum() for w, one in zip(weight, expected, strict=True)), model.parameters()
        )
        assert sum(gradient.abs().sum() for gradient in plain) > 1
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "gpt2", "qwen2"])
    def test_every_head(self, naive, kind):
        network = network_of(kind).double().eval().requires_grad_(False)
        scored = completion_logps(network, Forest.padded(GROUPS, 0))
        expected = [naive(network, group.prompt, one) for group in GROUPS for one in group.completions]
        torch.testing.assert_close(scored.tokens, torch.cat(expected), rtol=0, atol=1e-6)  # some heads cast to float32

    @pytest.mark.parametrize("chunk", [1, 3, 256])
    @pytest.mark.parametrize("scale", [1.0, 0.4])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("biased", [False, True])
    def test_gradient_of_the_hidden_state(self, biased, softcap, scale, chunk):
        torch.manual_seed(0)
        weight = torch.randn(11, 5, dtype=torch.float64)
        head = Head(weight, torch.randn(11, dtype=torch.float64) if biased else None, scale, softcap)
        hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        target = torch.tensor([0, 10, 3, 3, 7, 1, 9])
        logits = head.logits(hidden)
        expected = logits.log_softmax(-1)[torch.arange(7), target]
        torch.testing.assert_close(token_scores(hidden, target, head, chunk).logprobs, expected, rtol=0, atol=1e-12)
        assert torch.autograd.gradcheck(lambda h: token_scores(h, target, head, chunk).logprobs, hidden)

    def test_the_head_formula(self):
        head = Head(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1.0, -1.0]), scale=0.5, softcap=2.0)
        # W h + b = (2 * 1 + 1, 3 * 2 - 1) = (3, 5); halved (1.5, 2.5); 2 tanh(x / 2)
        expected = 2 * torch.tanh(torch.tensor([[0.75, 1.25]]))
        torch.testing.assert_close(head.logits(torch.tensor([[1.0, 2.0]])), expected)

    @pytest.mark.parametrize("chunk", [1, 3, 256])
    @pytest.mark.parametrize("trained", ["weight", "bias", "both"])
    def test_a_trained_head(self, trained, chunk):
        torch.manual_seed(0)
        weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=trained != "bias")
        bias = torch.randn(11, dtype=torch.float64, requires_grad=trained != "weight")
        hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        target = torch.arange(7)
        wanted = [tensor for tensor in (weight, bias, hidden) if tensor.requires_grad]
        head = Head(weight, bias, scale=0.5, softcap=3.0)
        mixed = torch.linspace(-1, 2, 7, dtype=torch.float64)
        ours = torch.autograd.grad((mixed * token_scores(hidden, target, head, chunk).logprobs).sum(), wanted)
        logits = 3 * torch.tanh(0.5 * (hidden @ weight.t() + bias) / 3)
        values = logits.log_softmax(-1)[torch.arange(7), target]
        plain = torch.autograd.grad((mixed * values).sum(), wanted)
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(token_scores(hidden, target, head, chunk).logprobs, values.detach())

    def test_sixteen_bit_weights_give_float32_sums(self):
        head = Head(torch.randn(11, 5).bfloat16())
        assert token_scores(torch.randn(4, 5), torch.arange(4), head).logprobs.dtype == torch.float32


def scores(hidden, target, weight, bias=None, scale=1.0, softcap=None):
    """Log-probs and entropies by the definition, from full logits."""
    logits = hidden @ weight.t()
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    return logprobs[torch.arange(len(target)), target], -(logprobs.exp() * logprobs).sum(-1)


class TestTiles:
    """A frozen head walks over the vocabulary in tiles; how wide they are changes nothing."""

    target = torch.tensor([0, 10, 3, 3, 7, 1, 9])

    @pytest.fixture
    def columns(self, monkeypatch):
        """Set the width of a tile, for the seven tokens here."""
        return lambda count: monkeypatch.setattr(module, "TILE", {"cpu": 7 * count})

    @pytest.mark.parametrize("count", [1, 3, 5, 10, 11, 100])  # of 11: 5 and 10 leave token 10 a tile of its own
    @pytest.mark.parametrize("scale", [1.0, 0.4])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("biased", [False, True])
    def test_any_width(self, columns, biased, softcap, scale, count):
        columns(count)
        torch.manual_seed(0)
        weight = 2 * torch.randn(11, 5, dtype=torch.float64)
        bias = torch.randn(11, dtype=torch.float64) if biased else None
        hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        ours = token_scores(hidden, self.target, Head(weight, bias, scale, softcap), spread=BOTH)
        logprobs, entropies = scores(hidden, self.target, weight, bias, scale, softcap)
        torch.testing.assert_close(ours.logprobs, logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.entropies, entropies.detach(), rtol=0, atol=1e-12)
        full = Head(weight, bias, scale, softcap).logits(hidden.detach()).log_softmax(-1)
        torch.testing.assert_close(ours.collisions, full.exp().square().sum(1).log(), rtol=0, atol=1e-12)
        mixed = torch.linspace(-1, 2, 7, dtype=torch.float64)
        (slope,) = torch.autograd.grad((mixed * ours.logprobs).sum(), hidden)
        (expected,) = torch.autograd.grad((mixed * logprobs).sum(), hidden)
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("count", [1, 4, 11])
    def test_gradcheck(self, columns, count):
        columns(count)
        torch.manual_seed(0)
        head = Head(torch.randn(11, 5, dtype=torch.float64), None, 0.7, 3.0)
        hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda h: token_scores(h, self.target, head).logprobs, hidden)

    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
    def test_extreme_logits(self, columns, order, count):
        columns(count)
        logits = torch.tensor([1e4, -1e4, 9999.0, 0.0])[order]
        hidden = torch.ones(7, 1, requires_grad=True)
        target = torch.tensor([0, 1, 2, 3, 0, 1, 2])
        ours = token_scores(hidden, target, Head(logits.unsqueeze(1)), spread=BOTH)
        # The two highest differ by one nat: p = 1 / (1 + 1/e), and 1/(e + 1); the others are out of their sight.
        rest = math.log1p(math.exp(-1))
        torch.testing.assert_close(ours.logprobs.detach(), logits[target] - 1e4 - rest, rtol=1e-6, atol=1e-6)
        low = 1 / (math.e + 1)
        assert ours.entropies.tolist() == pytest.approx([rest + low] * 7, abs=1e-5)
        assert ours.collisions.tolist() == pytest.approx([math.log(low**2 + (1 - low) ** 2)] * 7, abs=1e-5)
        ours.logprobs.sum().backward()
        torch.testing.assert_close(hidden.grad.squeeze(1), logits[target] - 1e4 + low, rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize("count", [1, 3, 11])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
    )
    def test_gradients_of_tokens_that_are_almost_certain(self, columns, dtype, tolerance, count):
        """W_y and the mean of W are alike to twenty digits: left in the sum, the label would cancel to nothing."""
        columns(count)
        torch.manual_seed(0)
        weight = torch.randn(11, 5)
        weight[:, 0] = torch.arange(11.0)  # the logits, which sixteen bits hold exactly
        hidden = torch.zeros(7, 5)
        hidden[:, 0] = 1
        weight, hidden = weight.to(dtype), hidden.to(dtype)
        for label in range(11):
            certain = weight.clone()
            certain[label, 0] = 56
            ours, exact = (one.detach().clone().requires_grad_() for one in (hidden, hidden.double()))
            target = torch.full((7,), label)
            token_scores(ours, target, Head(certain)).logprobs.sum().backward()
            wide = certain.double()
            others = (exact @ wide.t()).softmax(-1).index_fill(1, torch.tensor([label]), 0)
            expected = others.sum(1, keepdim=True) * wide[label] - others @ wide
            assert expected.norm() < 1e-15
            assert (ours.grad.double() - expected).norm() <= tolerance * expected.norm()

    def test_the_plain_formula_loses_them(self):
        logits = torch.tensor([[0.0, 1.0, 30.0]])
        weight = torch.randn(3, 5)
        lost = weight[2] - logits.softmax(-1) @ weight
        wide = logits.double().softmax(-1)[:, :2]
        expected = wide.sum() * weight[2].double() - wide @ weight[:2].double()
        assert (lost - expected).norm() > 0.5 * expected.norm()


class TestEntropiesAndCollisions:
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("chunk", [2, 256])
    def test_are_those_of_the_definition_and_carry_no_gradient(self, trained, chunk):
        torch.manual_seed(0)
        hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=trained)
        target = torch.arange(5)
        ours = token_scores(hidden, target, Head(weight, scale=1.5), chunk, spread=BOTH)
        expected = scores(hidden, target, weight, scale=1.5)
        torch.testing.assert_close(ours.entropies, expected[1].detach(), rtol=0, atol=1e-12)
        assert not ours.entropies.requires_grad
        probabilities = Head(weight.detach(), scale=1.5).logits(hidden.detach()).softmax(-1)
        torch.testing.assert_close(ours.collisions, probabilities.square().sum(1).log(), rtol=0, atol=1e-12)
        assert not ours.collisions.requires_grad
        torch.testing.assert_close(
            torch.autograd.grad(ours.logprobs.sum(), hidden), torch.autograd.grad(expected[0].sum(), hidden)
        )

    @pytest.mark.parametrize("trained", [False, True])
    def test_of_no_and_of_full_certainty(self, trained):
        weight = torch.zeros(8, 2)
        weight[3, 1] = 100
        hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        ours = token_scores(hidden, torch.tensor([0, 3]), Head(weight.requires_grad_(trained)), spread=BOTH)
        assert ours.entropies.tolist() == pytest.approx([math.log(8), 0], abs=1e-6)
        assert ours.collisions.tolist() == pytest.approx([-math.log(8), 0], abs=1e-6)
        assert ours.logprobs.tolist() == pytest.approx([-math.log(8), 0], abs=1e-6)

    @pytest.mark.parametrize("trained", [False, True])
    def test_only_where_asked_for(self, trained):
        head = Head(torch.randn(5, 3, requires_grad=trained))
        plain = token_scores(torch.randn(2, 3), torch.tensor([0, 1]), head)
        assert (plain.entropies, plain.collisions) == (None, None)
        some = token_scores(torch.randn(2, 3), torch.tensor([0, 1]), head, spread=Spread(collision=True))
        assert some.entropies is None
        assert some.collisions is not None

    def test_of_a_forest(self):
        network = network_of("llama").eval().requires_grad_(False)
        forest = Forest.padded(GROUPS, 0)
        assert completion_logps(network, forest).entropies is None
        ours = completion_logps(network, forest, spread=BOTH).entropies
        logprobs = network(input_ids=forest.input_ids).logits.log_softmax(-1)
        expected = -(logprobs.exp() * logprobs).sum(-1).flatten()[forest.source]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


class TestTemperature:
    """The final logits, after scale, bias and softcap, are divided: values, gradients, entropies and collisions."""

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("count", [4, 11])  # tiles
    def test_of_a_head(self, monkeypatch, count, trained, softcap, temperature):
        monkeypatch.setattr(module, "TILE", {"cpu": 5 * count})
        torch.manual_seed(0)
        hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=trained)
        bias = torch.randn(11, dtype=torch.float64, requires_grad=trained)
        target = torch.tensor([0, 10, 3, 7, 7])
        ours = token_scores(hidden, target, Head(weight, bias, 1.5, softcap).tempered(temperature), 3, spread=BOTH)
        logits = 1.5 * (hidden @ weight.t() + bias)
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        full = (logits / temperature).log_softmax(-1)
        expected = full[torch.arange(5), target]
        torch.testing.assert_close(ours.logprobs, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.entropies, -(full.exp() * full).sum(-1).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.collisions, full.exp().square().sum(-1).log().detach(), rtol=0, atol=1e-12)
        wanted = [hidden, weight, bias] if trained else [hidden]
        mixed = torch.linspace(-1, 2, 5, dtype=torch.float64)
        slopes = torch.autograd.grad((mixed * ours.logprobs).sum(), wanted)
        plain = torch.autograd.grad((mixed * expected).sum(), wanted)
        for one, other in zip(slopes, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
    def test_of_a_model(self, kind, trained):
        network = network_of(kind).eval().requires_grad_(False)
        network.get_output_embeddings().weight.requires_grad_(trained)
        forest = Forest.padded(GROUPS, 0)
        logits = network(input_ids=forest.input_ids).logits.flatten(0, 1)[forest.source]
        expected = (logits / 0.6).log_softmax(-1).gather(1, forest.target.unsqueeze(1)).squeeze(1)
        ours = completion_logps(network, forest, temperature=0.6).tokens
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        plain = completion_logps(network, forest).tokens
        assert (plain - expected).abs().max() > 0.1
        assert torch.equal(completion_logps(network, forest, temperature=1.0).tokens, plain)

    @pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
    def test_not_a_temperature(self, temperature):
        with pytest.raises(ValueError, match=f"got temperature {temperature}, expected a number above 0"):
            Head(torch.randn(3, 2)).tempered(temperature)


class TestHidden:
    """What scalar heads read is that of each sequence alone, values and gradients, in every layout."""

    groups = (
        Group((5, 6, 7), ((20, 21, 3), (30, 3), (31,), (32, 33, 34, 35, 36))),
        Group((12,), ((40, 41, 42, 43, 44, 3), (41,), (42, 43), (45, 46, 47))),
    )

    @pytest.fixture(scope="class")
    @staticmethod
    def network(make_network, adapt):
        network = make_network("Llama")
        assert choose_layout(network, "packed", "sdpa", pad_id=0) == "packed"
        adapt(network)
        return network.double()  # its norms stay in float32

    @pytest.mark.parametrize("k", [1, 2, 4])
    @pytest.mark.parametrize("layout", ["packed", "padded", "padded wider"])
    def test_equals_each_sequence_alone(self, network, layout, k):
        groups = [Group(group.prompt, group.completions[:k]) for group in self.groups]
        beyond = [Group((9,) * 20, ((8,),))] if layout == "padded wider" else []  # it widens every row
        forest = Forest.packed(groups) if layout == "packed" else Forest.padded([*groups, *beyond], 96)
        found = completion_hidden(network, forest)
        source, last = [], []
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt, *completion]])
                alone = network.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
                source += alone[len(group.prompt) - 1 : -1]  # before each completion token
                last.append(alone[-1])
        at_source, at_last = found.at_source[: len(source)], found.at_last[: len(last)]
        torch.testing.assert_close(at_source, torch.stack(source), rtol=0, atol=1e-5)
        torch.testing.assert_close(at_last, torch.stack(last), rtol=0, atol=1e-5)

        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for ours, expected in ((at_source, source), (at_last, last)):
            weight = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
            slopes = torch.autograd.grad((weight * ours).sum(), parameters, retain_graph=True)
            plain = torch.autograd.grad((weight * torch.stack(expected)).sum(), parameters, retain_graph=True)
            assert max(slope.abs().max() for slope in plain) > 0.1
            for one, other in zip(slopes, plain, strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm()

    def test_the_head_makes_log_probs_of_them(self, network):
        forest = Forest.packed(self.groups)
        hidden, _ = completion_hidden(network, forest)
        expected = token_scores(hidden, forest.target, Head.of(network)).logprobs
        assert torch.equal(completion_logps(network, forest).tokens, expected)


class TestPadding:
    @pytest.fixture
    def network(self):
        return network_of("llama").double().eval().requires_grad_(False)

    def test_the_amount_of_padding_changes_nothing(self, network):
        together = completion_logps(network, Forest.padded(GROUPS, 0)).tokens
        alone = [completion_logps(network, Forest.padded([group], 96)).tokens for group in GROUPS]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)

    def test_the_side_of_the_padding_changes_nothing(self, network):
        right = Forest.padded(GROUPS, 0)
        time = right.input_ids.shape[1]
        pads = (~right.attention_mask).sum(1)
        column = (torch.arange(time) - pads.unsqueeze(1)) % time  # rotates each row's padding to its start
        row = right.source // time
        left = replace(
            right,
            input_ids=right.input_ids.gather(1, column),
            position_ids=right.position_ids.gather(1, column),
            group=right.group.gather(1, column),
            branch=right.branch.gather(1, column),
            source=right.source + pads[row],
        )
        assert not left.attention_mask[1, 0]
        ours, expected = completion_logps(network, left).tokens, completion_logps(network, right).tokens
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


class TestMemory:
    @pytest.fixture
    def hidden(self):
        return torch.randn(600, 16, requires_grad=True)

    @pytest.mark.parametrize("trained", [False, True])
    def test_logits_exist_for_one_chunk_only(self, monkeypatch, hidden, trained):
        rows, saved = [], []
        logits = Head.logits
        monkeypatch.setattr(Head, "logits", lambda self, h, *columns: rows.append(len(h)) or logits(self, h, *columns))
        weight = torch.randn(97, 16, requires_grad=trained)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            token_scores(hidden, torch.arange(600) % 97, Head(weight), chunk=64).logprobs.sum().backward()
        assert max(rows) == 64
        assert (600, 97) not in saved
        if not trained:
            assert saved == [(600, 16)]
            assert sum(rows) == 600  # the backward pass computes none again

    def test_the_models_own_head_is_never_called(self, monkeypatch, start):
        network = start().network
        monkeypatch.setattr(network.lm_head, "forward", lambda *_: pytest.fail("full logits"))
        completion_logps(network, Forest.padded(GROUPS, 0)).sums.sum().backward()

    @pytest.mark.parametrize("wanted", [False, True])
    def test_a_frozen_head_makes_a_tile_of_logits_at_most(self, monkeypatch, largest, wanted):
        monkeypatch.setattr(module, "TILE", {"cpu": 64 * 150})
        hidden, head = torch.randn(600, 8, requires_grad=wanted), Head(torch.randn(997, 8))
        with largest:
            scored = token_scores(hidden, torch.arange(600), head, chunk=64, spread=BOTH)
            if wanted:
                scored.logprobs.sum().backward()
        assert largest.elements == 64 * 150  # more than the weights' 997 x 8, less than a chunk's 64 x 997

    def test_a_trained_head_makes_a_chunk_of_logits_at_most(self, largest):
        hidden, weight = torch.randn(600, 8, requires_grad=True), torch.randn(997, 8, requires_grad=True)
        with largest:
            token_scores(hidden, torch.arange(600), Head(weight), chunk=64, spread=BOTH).logprobs.sum().backward()
        assert largest.elements == 64 * 997

    def test_no_gradient_buffer_where_none_is_wanted(self, monkeypatch, hidden):
        head, target = Head(torch.randn(97, 16)), torch.arange(600) % 97
        expected = token_scores(hidden, target, head).logprobs.detach()
        monkeypatch.setattr(torch, "empty_like", lambda *_: pytest.fail("a gradient buffer"))
        with torch.no_grad():
            assert torch.equal(token_scores(hidden, target, head).logprobs, expected)
        assert torch.equal(token_scores(hidden.detach(), target, head).logprobs, expected)


class TestRefusals:
    @pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "gpt2", "qwen2"])
    def test_known_heads_pass(self, kind):
        check_head(network_of(kind).eval(), tolerance=1e-3)

    def test_an_unknown_transformation_of_the_logits(self):
        class Doubling(LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out.logits = out.logits * 2
                return out

        with pytest.raises(ModelError, match=r"Doubling: the log-probs .* differ .* by .* at most 0\.001"):
            check_head(Doubling(LlamaConfig(**SIZE)).eval(), tolerance=1e-3)

    def test_values_that_are_not_numbers(self):
        network = network_of("llama").eval()
        with torch.no_grad():
            network.lm_head.weight[:] = torch.nan
        with pytest.raises(ModelError, match="differ from the model's own by nan"):
            check_head(network, tolerance=1e-3)

    def test_an_adapter_on_the_head_is_not_overlooked(self, start):
        model = start(lora={"target_modules": ["lm_head"]})
        with pytest.raises(ModelError, match="leave the head out of the adapter"):
            completion_logps(model.network, Forest.padded(GROUPS, 0))

    def test_shapes_are_executed(self):
        with pytest.raises(TypeCheckError):
            token_scores(torch.randn(4, 5), torch.arange(3), Head(torch.randn(11, 5)))
        with pytest.raises(TypeCheckError):
            Head(torch.randn(11, 5), torch.randn(10))
