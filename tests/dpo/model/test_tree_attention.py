"""Packed rows give every completion the log-probs and gradients that it has alone, in every family of models."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import tanh
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.model import tree_attention
from dpo.model.forest import Forest, Group, Tree
from dpo.model.layout import choose_layout
from dpo.model.logprobs import completion_logps
from dpo.model.tree_attention import NAMES, Branches, inputs, needs_eager

EXTRAS = {
    "mistral": {"window"},
    "qwen2": {"window"},
    "gemma2": {"window", "softcap"},
    "gemma3_text": {"window"},
    "gpt_oss": {"window", "sinks"},
}
"""What else than the plain rule a family's attention has."""
RELATIVE = 1e-4
"""Largest difference from each sequence alone, as a share, in float32."""

Key = tuple[tuple[int, ...], tuple[int, ...]]


def made() -> list[Group]:
    """Three prompts, one longer than the window, of four completions each, one of them longer than the window."""
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 96, (length,), generator=draw).tolist())

    lengths = [(13, (5, 3, 11, 1)), (2, (4, 12, 2, 6)), (5, (1, 1, 7, 3))]
    return [Group(ids(prompt), [ids(length) for length in completions]) for prompt, completions in lengths]


GROUPS = made()


def first(k: int) -> list[Group]:
    return [replace(group, completions=group.completions[:k]) for group in GROUPS]


def each(groups: list[Group]) -> list[Key]:
    return [(group.prompt, completion) for group in groups for completion in group.completions]  # pyright: ignore


def gap(ours: Tensor, expected: Tensor) -> float:
    """The distance as a share of the expected value's norm."""
    return ((ours - expected).norm() / expected.norm()).item()


@dataclass(frozen=True)
class Alone:
    """One sequence through the model's own attention and logits."""

    tokens: Tensor
    gradients: list[Tensor]
    """Of the summed log-prob, for every adapter weight."""


@pytest.fixture(scope="module")
def plain(family, make_network, adapt) -> tuple[Any, list[Any]]:
    network = make_network(family)
    return network, adapt(network)


@pytest.fixture(scope="module")
def alone(plain, naive) -> dict[Key, Alone]:
    """Every sequence on its own. The gradient of a weighted sum follows, whichever of them it takes."""
    network, parameters = plain
    found = {}
    for key in each(GROUPS):
        tokens = naive(network, *key)
        found[key] = Alone(tokens.detach(), list(torch.autograd.grad(tokens.sum(), parameters)))
    return found


@pytest.fixture(scope="module")
def equipped(family, make_network, adapt) -> tuple[Any, list[Any], str]:
    """A network whose attention was set for packed rows, where the family admits them."""
    network = make_network(family)
    layout = choose_layout(network, "auto" if family in {"Lfm2", "Mamba"} else "packed", "sdpa", pad_id=0)
    return network, adapt(network), layout


@contextmanager
def training(network: Any, checkpointing: bool):
    """Train, with or without recomputing activations; yields a list as long as its first layer has run often."""
    passes = []
    layer = next(module for name, module in network.named_modules() if name.endswith("lora_A.default"))
    hook = layer.register_forward_pre_hook(lambda *_: passes.append(1))
    network.train()
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield passes
    finally:
        hook.remove()
        network.gradient_checkpointing_disable()
        network.eval()


class TestEveryFamily:
    """The law of the engine: layout, branches and recomputation change neither log-probs nor adapter gradients."""

    def test_those_that_can_branch_are_packed(self, equipped, family):
        network, _, layout = equipped
        assert layout == ("packed" if family not in {"Lfm2", "Mamba"} else "padded")
        assert (network.config._attn_implementation == NAMES["sdpa"]) == (layout == "packed")

    @pytest.mark.parametrize(
        ("checkpointing", "short"),
        [(False, tree_attention.SHORT), (True, tree_attention.SHORT), (False, 0)],
        ids=["kept", "recomputed", "fused kernel"],
    )
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_equals_each_sequence_alone(self, equipped, alone, k, checkpointing, short, monkeypatch):
        monkeypatch.setattr(tree_attention, "SHORT", short)
        network, parameters, layout = equipped
        groups = first(k)
        forests = [Forest.padded(groups, 0)] + ([Forest.packed(groups)] if layout == "packed" else [])
        expected = [alone[key] for key in each(groups)]
        weight = torch.linspace(-1, 2, len(expected))  # no sum is weighted like another
        values = torch.cat([one.tokens for one in expected])
        sums = torch.stack([one.tokens.sum() for one in expected])
        gradients = [
            sum(w * one.gradients[n] for w, one in zip(weight, expected, strict=True)) for n in range(len(parameters))
        ]
        for forest in forests:
            with training(network, checkpointing) as passes:
                scored = completion_logps(network, forest)
                ours = torch.autograd.grad((weight * scored.sums).sum(), parameters)
                assert len(passes) == (2 if checkpointing else 1)
            worst = max(gap(scored.tokens, values), ((scored.sums - sums) / sums).abs().max().item())
            steepest = max(gap(one, other) for one, other in zip(ours, gradients, strict=True))
            kind = "packed" if forest.trees else "padded"
            assert worst <= RELATIVE, kind
            assert steepest <= RELATIVE, kind


class TestTheRuleShows:
    """These weights tell a right rule from a wrong one; at a standard deviation of 0.02 they would not."""

    @pytest.fixture(scope="class")
    @staticmethod
    def network(packable, make_network):
        network = make_network(packable)
        assert choose_layout(network, "auto", "sdpa", pad_id=0) == "packed"
        return network

    @pytest.fixture
    def moved(self, network):
        """How far a change moves a token's log-prob at most, in nats."""
        forest = Forest.packed(GROUPS)
        with torch.no_grad():
            expected = completion_logps(network, forest).tokens

        def measure(instead: Forest = forest) -> float:
            with torch.no_grad():
                return (completion_logps(network, instead).tokens - expected).abs().max().item()

        assert measure() == 0
        return measure

    def test_without_branches(self, moved):
        forest = Forest.packed(GROUPS)
        everything = Tree(start=0, prompt=forest.input_ids.shape[1], completions=())
        assert moved(replace(forest, trees=(everything,))) > 0.3

    def test_with_groups_that_see_each_other(self, moved):
        forest = Forest.packed(GROUPS)
        _, second, third = forest.trees
        longer = Tree(0, second.start + second.prompt, second.completions)  # the first group as part of its prompt
        assert moved(replace(forest, trees=(longer, third))) > 0.3

    def test_with_positions_that_count_columns(self, moved):
        forest = Forest.packed(GROUPS)
        columns = torch.arange(forest.input_ids.shape[1]).unsqueeze(0)
        assert moved(replace(forest, position_ids=columns)) > 0.1

    @pytest.mark.parametrize("part", ["window", "softcap", "sinks"])
    def test_without_a_part(self, network, moved, monkeypatch, part):
        attend, seen = tree_attention._attend, []

        def without(query, key, value, branches, window, scale, softcap, sinks):
            given = {"window": window, "softcap": softcap, "sinks": sinks}
            seen.append(given[part] is not None)
            return attend(query, key, value, branches, scale=scale, **{**given, part: None})

        monkeypatch.setattr(tree_attention, "_attend", without)
        shift = moved()
        assert any(seen) == (part in EXTRAS.get(network.config.model_type, ()))
        assert (shift > 0.05) == any(seen)


def dense(query, key, value, forest, window, scale, softcap, sinks) -> Tensor:
    """The rule written out for every pair of columns: softmax over a whole table of scores, in the order of columns."""
    group, branch, position = forest.group[0].tolist(), forest.branch[0].tolist(), forest.position_ids[0].tolist()
    time = len(group)
    allowed = torch.tensor(
        [
            [
                group[q] == group[k]
                and k <= q
                and branch[k] in (0, branch[q])
                and (window is None or position[q] - position[k] < window)
                for k in range(time)
            ]
            for q in range(time)
        ]
    )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("bhqw,bhkw->bhqk", query, key) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.exp() * allowed
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return torch.einsum("bhqk,bhkw->bqhw", weights / total, value)


def tensors(forest: Forest) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of four heads, two of them sharing their keys; values wider than keys."""
    time = forest.input_ids.shape[1]
    draw = torch.Generator().manual_seed(time)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)

    return drawn(1, 4, time, 3), drawn(1, 2, time, 3), drawn(1, 2, time, 5)


parts = st.lists(st.just(1), min_size=1, max_size=9)
forests = st.lists(st.builds(Group, parts, st.lists(parts, max_size=4)), min_size=1, max_size=3).filter(
    lambda groups: any(group.completions for group in groups)
)


class TestAgainstTheRule:
    """Block by block equals the whole table, values and gradients."""

    @settings(max_examples=40, deadline=None)
    @given(
        groups=forests,
        window=st.none() | st.integers(1, 12),
        scaling=st.none() | st.just(0.7),
        softcap=st.none() | st.just(0.8),
        sinks=st.booleans(),
        short=st.sampled_from([0, 6, tree_attention.SHORT]),
    )
    def test_any_forest(self, groups, window, scaling, softcap, sinks, short):
        forest = Forest.packed(groups)
        given = tensors(forest)
        logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True) if sinks else None
        wanted = given if logits is None else (*given, logits)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tree_attention, "SHORT", short)  # both kernels, also side by side
            ours, weights = tree_attention._tree_sdpa(
                None, *given, None, scaling, window, softcap, logits, branches=Branches(forest)
            )
        expected = dense(*given, forest, window, 3**-0.5 if scaling is None else scaling, softcap, logits)
        assert weights is None
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        pull = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
        for one, other in zip(
            torch.autograd.grad((ours * pull).sum(), wanted),
            torch.autograd.grad((expected * pull).sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("window", [None, 4])
    def test_flex_attention(self, window):
        """FlexAttention has no backward pass on a CPU; its values are those of the rule."""
        forest = Forest.packed(first(4))
        query, key, _ = (one.detach().float() for one in tensors(forest))
        with torch.no_grad():
            ours, _ = tree_attention._tree_flex(
                torch.nn.Module(), query, key, key, None, window, Branches(forest), scaling=0.7
            )
        torch.testing.assert_close(ours, dense(query, key, key, forest, window, 0.7, None, None), rtol=0, atol=1e-5)

    def test_a_softcap_by_hand(self):
        # The second token sees scores 0 and 4, capped at 1: weights e^tanh(0) and e^tanh(4) of the values 0 and 1.
        forest = Forest.packed([Group([1], [[2]])])
        query, key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.tensor([0.0, 4.0]).view(1, 1, 2, 1)
        value = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
        ours, _ = tree_attention._tree_sdpa(None, query, key, value, None, 1.0, softcap=1.0, branches=Branches(forest))
        high = 2.718281828 ** tanh(4)
        assert ours.flatten().tolist() == pytest.approx([0, high / (1 + high)])

    @pytest.mark.parametrize("name", ["position_bias", "cache", "head_mask", "dropout"])
    def test_what_it_does_not_know_is_refused(self, name):
        forest = Forest.packed(GROUPS)
        with pytest.raises(NotImplementedError, match=name):
            tree_attention._tree_sdpa(None, *tensors(forest), None, branches=Branches(forest), **{name: 0.5})


def test_no_mask_of_the_whole_row_exists(make_network, largest):
    network = make_network("Mistral", max_position_embeddings=2048)
    assert choose_layout(network, "auto", "sdpa", pad_id=0) == "packed"
    forest = Forest.packed([Group([5] * 20, [[6] * 20] * 4) for _ in range(12)])
    with largest:
        network.base_model(**inputs(forest))
    assert largest.elements < forest.input_ids.shape[1] ** 2 / 8


class TestOrdinary:
    """Without branches an equipped network is the network it was."""

    @pytest.fixture(scope="class")
    @staticmethod
    def both(packable, make_network):
        """A network as loaded, and one whose attention was set for packed rows."""
        equipped = make_network(packable)
        assert choose_layout(equipped, "auto", "sdpa", pad_id=0) == "packed"
        return make_network(packable), equipped

    def test_logits(self, both):
        ids = torch.tensor([GROUPS[0].prompt, (9, *GROUPS[1].completions[1])])
        with torch.no_grad():
            expected, ours = (network(input_ids=ids).logits for network in both)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    def test_padded_rows(self, both):
        forest = Forest.padded(GROUPS, 0)
        with torch.no_grad():
            expected, ours = (completion_logps(network, forest).tokens for network in both)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    def test_sampling(self, both):
        ids = torch.tensor([[0] * 8 + list(GROUPS[2].prompt), list(GROUPS[0].prompt)])  # padded on the left, cached
        mask = (ids != 0).long()
        expected, ours = (
            network.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            for network in both
        )
        assert ours.shape == (2, 16)
        assert torch.equal(ours, expected)


class TestInputs:
    def test_padded_rows_carry_a_mask_and_no_branches(self):
        given = inputs(Forest.padded(GROUPS, 0))
        assert given["attention_mask"].shape == given["input_ids"].shape == given["position_ids"].shape
        assert given["attention_mask"].sum().item() == sum(len(p) + len(c) for p, c in each(GROUPS))
        assert not given["use_cache"]
        assert "branches" not in given

    def test_packed_rows_carry_branches_and_no_mask(self):
        given = inputs(Forest.packed(GROUPS))
        assert isinstance(given["branches"], Branches)
        assert given["attention_mask"].numel() == 1
        assert given["position_ids"].max().item() == 13 + 11 - 1


class TestNames:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (transformers.LlamaConfig(), False),
            (transformers.Gemma2Config(), True),
            (transformers.Gemma2Config(attn_logit_softcapping=None), False),
            (transformers.GptOssConfig(), True),
        ],
    )
    def test_what_torchs_kernel_leaves_out(self, config, expected):
        assert needs_eager(config) is expected
