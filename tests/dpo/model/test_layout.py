"""Packed rows are refused wherever they would be wrong: by their signs, and by trying."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from dpo.errors import ModelError
from dpo.model import layout as module
from dpo.model import logprobs, tree_attention
from dpo.model.forest import Group, Tree
from dpo.model.layout import CLOSE, LEAK, Probe, choose_layout, probe
from dpo.model.tree_attention import NAMES, register
from dpo.model.views import score

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])


@pytest.fixture
def probed(make_network):
    """What the probe finds of a family."""

    def found(family: str) -> Probe:
        network = make_network(family)
        register()
        network.set_attn_implementation(NAMES["sdpa"])
        return probe(network, pad_id=0)

    return found


class TestFallback:
    @pytest.mark.parametrize(("family", "kind"), [("Lfm2", "conv"), ("Mamba", "linear_attention")])
    def test_auto_says_why_once_and_leaves_the_network_as_it_was(self, make_network, caplog, family, kind):
        network = make_network(family)
        before = network.config._attn_implementation
        with torch.no_grad():
            expected = network(input_ids=IDS).logits
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "auto", "sdpa", pad_id=0) == "padded"
        (message,) = (record.getMessage() for record in caplog.records if record.name == "dpo")
        assert message.startswith(f"padded rows: {type(network).__name__} cannot be scored in packed ones")
        assert f"layers of type {kind}" in message
        assert network.config._attn_implementation == before
        with torch.no_grad():
            assert torch.equal(network(input_ids=IDS).logits, expected)

    def test_packed_fails_instead(self, make_network):
        expected = r"model.layout='packed': Lfm2ForCausalLM .* layers of type conv\. Use model.layout=auto"
        with pytest.raises(ModelError, match=expected):
            choose_layout(make_network("Lfm2"), "packed", "sdpa", pad_id=0)

    def test_packed_is_granted_in_silence(self, make_network, caplog):
        network = make_network("Llama")
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "packed", "sdpa", pad_id=0) == "packed"
        assert caplog.messages == []

    def test_padded_is_not_questioned(self, make_network, monkeypatch, caplog):
        network = make_network("Llama")
        monkeypatch.setattr(module, "probe", lambda *_: pytest.fail("probed"))
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "padded", "sdpa", pad_id=0) == "padded"
        assert network.config._attn_implementation == "sdpa"
        assert caplog.messages == []

    @pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
    def test_an_attention_that_cannot_branch(self, make_network, caplog, attention):
        network = make_network("Llama")
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "auto", attention, pad_id=0) == "padded"
        assert f"model.attn_implementation is {attention}" in caplog.text
        assert network.config._attn_implementation == "sdpa"

    def test_flex_attention_without_a_backward_pass(self, make_network, caplog):
        network = make_network("Llama")
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "auto", "flex_attention", pad_id=0) == "padded"
        assert "backward on CPU" in caplog.text
        assert network.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, make_network, packable, dtype):
        assert choose_layout(make_network(packable).to(dtype), "packed", "sdpa", pad_id=0) == "packed"


class TestSigns:
    @pytest.mark.parametrize(
        ("network", "sign"),
        [
            ("bloom", "attention is of its own make"),
            ("convolutions", "recurrent or convolutional layers"),
            ("state", "recurrent or convolutional layers"),
        ],
    )
    def test_seen_without_trying(self, make_network, monkeypatch, caplog, network, sign):
        if network == "bloom":
            config = transformers.BloomConfig(vocab_size=97, hidden_size=8, n_layer=1, n_head=2)
            network = transformers.BloomForCausalLM(config)
        elif network == "convolutions":
            network = make_network("Llama", conv_L_cache=3)
        else:
            network = make_network("Llama")
            network._is_stateful = True
        monkeypatch.setattr(module, "probe", lambda *_: pytest.fail("probed"))
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "auto", "sdpa", pad_id=0) == "padded"
        assert sign in caplog.text

    @pytest.mark.parametrize("family", ["Lfm2", "Mamba"])
    def test_a_model_that_hides_its_signs_is_found_out(self, make_network, monkeypatch, caplog, family):
        monkeypatch.setattr(module, "_static_signs", lambda _: None)
        network = make_network(family)
        before = network.config._attn_implementation
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "auto", "sdpa", pad_id=0) == "padded"
        assert network.config._attn_implementation == before
        assert len(caplog.messages) == 1


def wrong_trees(join):
    """Give attention other trees than the row has."""

    def breaks(monkeypatch):
        right = logprobs.inputs

        def wrong(forest):
            return right(forest if not forest.trees else replace(forest, trees=join(forest.trees)))

        monkeypatch.setattr(logprobs, "inputs", wrong)

    return breaks


def whole(trees: tuple[Tree, ...]) -> Tree:
    """A row without branches."""
    return Tree(0, trees[-1].start + trees[-1].prompt + sum(trees[-1].completions), ())


def no_positions(monkeypatch):
    right = logprobs.inputs

    def wrong(forest):
        given = right(forest)
        columns = torch.arange(forest.input_ids.shape[1]).expand_as(forest.input_ids)
        return {**given, "position_ids": columns} if forest.trees else given

    monkeypatch.setattr(logprobs, "inputs", wrong)


def attends(change):
    """Change the arguments of every block's attention."""

    def breaks(monkeypatch):
        right = tree_attention._attend
        names = ("query", "key", "value", "branches", "window", "scale", "softcap", "sinks")

        def wrong(*args):
            given = dict(zip(names, args, strict=True))
            return right(**{**given, **change(given)})

        monkeypatch.setattr(tree_attention, "_attend", wrong)

    return breaks


def of_branches(name: str):
    """Stop the gradient of later completions at what they attend to."""

    def change(given) -> dict[str, Tensor]:
        later = given["query"].shape[2] != given["key"].shape[2]
        return {name: given[name].detach()} if later else {}

    return attends(change)


MOVES = [
    pytest.param("Llama", wrong_trees(lambda trees: (whole(trees),)), id="no branches"),
    pytest.param("Mistral", wrong_trees(lambda trees: (whole(trees),)), id="no branches, windows"),
    pytest.param(
        "Llama",
        wrong_trees(lambda t: (Tree(0, t[1].start + t[1].prompt, t[1].completions),)),
        id="no groups",
    ),
    pytest.param(
        "Llama",
        wrong_trees(lambda t: tuple(Tree(a.start, a.prompt + a.completions[0], a.completions[1:]) for a in t)),
        id="the first completion is part of the prompt",
    ),
]
DIFFERS = [
    pytest.param("Llama", no_positions, id="columns for positions"),
    *[
        pytest.param(family, attends(lambda _: {"window": None}), id=f"no window, {family}")
        for family in ("Mistral", "Qwen2", "Gemma2", "Gemma3Text", "GptOss")
    ],
    pytest.param("Mistral", attends(lambda given: {"window": given["window"] + 1}), id="a window too wide by one"),
    *[
        pytest.param(family, attends(lambda given: {"scale": given["query"].shape[-1] ** -0.5}), id=f"scale, {family}")
        for family in ("Gemma2", "Granite")
    ],
    pytest.param("Gemma2", attends(lambda _: {"softcap": None}), id="no softcap"),
    pytest.param("GptOss", attends(lambda _: {"sinks": None}), id="no sinks"),
    pytest.param("Llama", attends(lambda given: {"key": given["key"].roll(1, 1)}), id="heads in another order"),
]
SLOPES = [
    *[pytest.param("Llama", of_branches(name), id=f"branches, {name}") for name in ("key", "value", "query")],
    pytest.param("Gemma2", of_branches("value"), id="branches, value, softcap"),
    pytest.param("GptOss", of_branches("key"), id="branches, key, sinks"),
    pytest.param("Llama", attends(lambda given: {"key": given["key"].detach()}), id="every key"),
]


class TestProbe:
    @pytest.mark.parametrize(("family", "breaks"), MOVES)
    def test_a_completion_that_another_sees(self, probed, monkeypatch, family, breaks):
        breaks(monkeypatch)
        found = probed(family)
        assert found.leak > 100 * LEAK[torch.float32]
        assert "moves what must not see it" in str(found.fault(torch.float32))

    @pytest.mark.parametrize(("family", "breaks"), DIFFERS)
    def test_log_probs_that_are_not_those_of_the_sequence_alone(self, probed, monkeypatch, family, breaks):
        breaks(monkeypatch)
        found = probed(family)
        assert found.leak <= LEAK[torch.float32]
        assert found.difference > 100 * CLOSE[torch.float32]
        assert "nats from those of each sequence alone" in str(found.fault(torch.float32))

    @pytest.mark.parametrize(("family", "breaks"), SLOPES)
    def test_a_gradient_that_stops(self, probed, monkeypatch, family, breaks):
        breaks(monkeypatch)
        found = probed(family)
        assert found.leak <= LEAK[torch.float32]
        assert found.difference <= CLOSE[torch.float32]
        assert found.gradient > 100 * CLOSE[torch.float32]
        assert "gradients differ" in str(found.fault(torch.float32))

    def test_values_that_are_not_numbers(self, probed, monkeypatch):
        attends(lambda given: {"value": given["value"] * torch.nan})(monkeypatch)
        assert probed("Llama").fault(torch.float32) is not None

    def test_a_fault_is_the_reason_given(self, make_network, monkeypatch, caplog):
        attends(lambda _: {"window": None})(monkeypatch)
        network = make_network("Mistral")
        with caplog.at_level(logging.INFO, "dpo"):
            assert choose_layout(network, "auto", "sdpa", pad_id=0) == "padded"
        assert "log-probs differ by" in caplog.text
        assert network.config._attn_implementation == "sdpa"

    def test_an_error_is_the_reason_given(self, make_network, monkeypatch):
        def fails(*_):
            raise TypeError("unexpected keyword\nand more")

        monkeypatch.setattr(tree_attention, "_attend", fails)
        network = make_network("Llama")
        with pytest.raises(ModelError, match=r"packed rows: TypeError: unexpected keyword\. Use"):
            choose_layout(network, "packed", "sdpa", pad_id=0)
        assert network.config._attn_implementation == "sdpa"

    def test_the_noise_of_a_right_model_is_far_below_the_tolerance(self, probed, packable):
        found = probed(packable)
        assert found.leak <= LEAK[torch.float32] / 10
        assert found.difference <= CLOSE[torch.float32] / 10
        assert found.gradient <= CLOSE[torch.float32] / 10

    def test_a_window_is_probed_with_a_prompt_longer_than_it(self, make_network, monkeypatch):
        longest = []
        right = tree_attention._attend
        monkeypatch.setattr(
            tree_attention, "_attend", lambda *args: longest.append((args[1].shape[2], args[4])) or right(*args)
        )
        network = make_network("Mistral", sliding_window=40)
        assert choose_layout(network, "auto", "sdpa", pad_id=0) == "packed"
        assert max(keys for keys, _ in longest) > 40 + 8
        assert {window for _, window in longest} == {40}

    @pytest.mark.parametrize("training", [False, True])
    def test_the_model_is_left_as_it_was(self, make_network, training):
        network = make_network("Llama").train(training)
        before = {name: one.clone() for name, one in network.state_dict().items()}
        assert choose_layout(network, "auto", "sdpa", pad_id=0) == "packed"
        assert network.training is training
        assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
        assert all(one.grad is None and not one.requires_grad for one in network.parameters())
        assert not network.get_input_embeddings()._forward_hooks

    def test_dropout_does_not_disturb_it(self, make_network):
        network = make_network("Llama").train()
        for layer in network.model.layers:
            layer.self_attn.attention_dropout = 0.5
        assert choose_layout(network, "packed", "sdpa", pad_id=0) == "packed"
        assert network.training


class TestVerdict:
    right = Probe(leak=0.0, difference=0.0, gradient=0.0, floor=0.0)

    @pytest.mark.parametrize("dtype", list(LEAK))
    @pytest.mark.parametrize(
        ("field", "limits"), [("leak", LEAK), ("difference", CLOSE), ("gradient", CLOSE)], ids=lambda one: str(one)[:9]
    )
    def test_every_number_has_its_limit(self, dtype, field, limits):
        assert replace(self.right, **{field: limits[dtype]}).fault(dtype) is None
        assert replace(self.right, **{field: limits[dtype] * 1.01}).fault(dtype) is not None
        assert replace(self.right, **{field: float("nan")}).fault(dtype) is not None

    def test_a_noisy_model_may_differ_by_its_noise(self):
        noisy = replace(self.right, floor=1e-3)
        assert replace(noisy, difference=7e-3).fault(torch.float32) is None
        assert "differ by 9.0e-03" in str(replace(noisy, difference=9e-3).fault(torch.float32))


class TestModel:
    """The layout found at load is the one examples are scored in."""

    def test_every_prompt_and_completion_is_laid_out_once(self, start, perturb, naive, monkeypatch):
        model = start()
        perturb(model)
        assert model.base.layout == "packed"
        laid = []
        forest = type(model).forest
        monkeypatch.setattr(type(model), "forest", lambda self, groups: laid.append(groups) or forest(self, groups))
        sea, day = (5, 6, 7), (12, 13)
        wanted = [(sea, (20, 21)), (day, (20, 21)), (sea, (30,)), (sea, (20, 21)), (day, (40, 41, 42))]
        scored = score(model, wanted)
        assert laid == [[Group(sea, [(20, 21), (30,)]), Group(day, [(20, 21), (40, 41, 42)])]]
        expected = torch.stack([naive(model.network, *key).sum() for key in wanted])
        torch.testing.assert_close(scored.sums, expected, rtol=0, atol=1e-4)
        assert scored.lengths.tolist() == [2, 2, 1, 2, 3]

        weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5])  # what is scored once is still paid for twice
        ours = torch.autograd.grad((weight * scored.sums).sum(), model.parameters())
        plain = torch.autograd.grad((weight * expected).sum(), model.parameters())
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("layout", "rows"), [("auto", 1), ("packed", 1), ("padded", 3)])
    def test_the_setting_is_followed(self, start, layout, rows):
        model = start(layout=layout)
        forest = model.forest([Group((5, 6), [(7,), (8, 9)]), Group((3,), [(4,)])])
        assert forest.input_ids.shape[0] == rows
        assert bool(forest.trees) == (rows == 1)
