"""The equations of reinforcement learning, each in hand numbers; and the laws of the KL estimators."""

import math

import pytest
import torch

from dpo.losses import credit


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def index(*values):
    return torch.tensor(values)


RAGGED = torch.tensor([[True, True, True], [True, True, False]])
NAN = math.nan
P, Q = double(0.5, 0.25, 0.25), double(0.2, 0.3, 0.5)


def test_estimators_at_one_sample():
    # p = 1/2, q = 1/4: k1 = ln 2, k2 = ln(2)^2 / 2, k3 = 1/2 - 1 + ln 2.
    p, q = double(0.5).log(), double(0.25).log()
    assert credit.k1(p, q).item() == pytest.approx(math.log(2), abs=1e-15)
    assert credit.k2(p, q).item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-15)
    assert credit.k3(p, q).item() == pytest.approx(math.log(2) - 0.5, abs=1e-15)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    kl = (P * (P / Q).log()).sum()
    means = [(P * k(P.log(), Q.log())).sum() for k in (credit.k1, credit.k3, credit.k2)]
    torch.testing.assert_close(torch.stack(means[:2]), kl.expand(2), rtol=1e-14, atol=0)
    assert abs(means[2] - kl) > 0.01
    assert (credit.k3(P.log(), Q.log()) > 0).all()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (credit.k1, torch.zeros(3, dtype=torch.float64)),
        # d KL(p || q) / d logit_i = p_i (log(p_i / q_i) - KL)
        (credit.k2, P * ((P / Q).log() - (P * (P / Q).log()).sum())),
        # d KL(q || p) / d logit_i = p_i - q_i
        (credit.k3, P - Q),
    ],
)
def test_gradients_of_the_estimators_on_samples(estimator, expected):
    logits = P.log().requires_grad_()
    (P * estimator(logits.log_softmax(0), Q.log())).sum().backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-13, atol=1e-15)


def test_k3_of_close_distributions_keeps_its_digits_in_float32():
    # k3 = x^2 / 2 + x^3 / 6 + ... for x = log q - log p = 0.0003: 4.5e-8, less than 1 is spaced at
    got = credit.k3(torch.tensor([-3e-4]), torch.zeros(1)).item()
    assert got == pytest.approx(3e-4**2 / 2, rel=2e-3)


@pytest.mark.parametrize("distance", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_losses_and_gradients_stay_finite(distance, advantage):
    log_ratio = torch.tensor([distance], requires_grad=True)
    policy = credit.clipped_policy_loss(log_ratio, torch.tensor([advantage]), low=0.2, high=0.2)
    (policy + credit.k3(-log_ratio, torch.zeros(1))).sum().backward()
    assert policy.isfinite().all()
    assert log_ratio.grad.isfinite().all()


def test_beyond_the_largest_exponent_the_pull_back_stays():
    # A bad token whose ratio grew to e^100: the tangent at 20 has slope e^20, value e^20 (1 + 80).
    log_ratio = double(100.0).requires_grad_()
    loss = credit.clipped_policy_loss(log_ratio, double(-1.0), low=0.2, high=0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(81 * math.exp(20), rel=1e-12)
    assert log_ratio.grad.item() == pytest.approx(math.exp(20), rel=1e-12)
    # k3 = e^20 (1 + 80) - 1 - 100, slope e^20 - 1: still falling as p rises
    log_p = double(-100.0).requires_grad_()
    k3 = credit.k3(log_p, double(0.0))
    k3.sum().backward()
    assert k3.item() == pytest.approx(81 * math.exp(20) - 101, rel=1e-12)
    assert log_p.grad.item() == pytest.approx(1 - math.exp(20), rel=1e-12)


def test_probability_ratio_is_one_at_equality_and_the_exponential_below_the_bound():
    x = double(0.0, -3.0, 19.0)
    assert credit.probability_ratio(x).tolist() == x.exp().tolist()
    assert credit.probability_ratio(torch.zeros(1)).item() == 1


def test_score_stands_at_the_last_sampled_token():
    # -0.5 kl, plus the score at token 3 of row 1 and token 2 of row 2
    kl = double([1.0, -1.0, 0.0], [2.0, 4.0, NAN])
    got = credit.shaped_rewards(double(2.0, -3.0), kl, RAGGED, 0.5)
    assert got.tolist() == [[-0.5, 0.5, 2], [-1, -5, 0]]


def test_gae_by_hand():
    # gamma = lambda = 1/2. Row 1: delta_3 = 2 - 1/2 = 3/2, delta_2 = 0 + 1/4 - 1 = -3/4, delta_1 = 1 + 1/2 - 1/2 = 1,
    # A_3 = 3/2,  A_2 = -3/4 + 3/8 = -3/8,  A_1 = 1 - 3/32 = 29/32.
    # Row 2 ends after two tokens, V_3 = 0:  A_2 = delta_2 = -1,  A_1 = 1 - 1/4 = 3/4.
    rewards, values = double([1.0, 0.0, 2.0], [1.0, 0.0, NAN]), double([0.5, 1.0, 0.5], [0.5, 1.0, NAN])
    got = credit.gae(rewards, values, RAGGED, gamma=0.5, gae_lambda=0.5)
    assert got.tolist() == [[29 / 32, -3 / 8, 3 / 2], [3 / 4, -1, 0]]


def test_gae_at_the_ends_of_lambda():
    # lambda = 1: discounted rewards to go less V, (1 + 2/4, 2/2, 2) - V; lambda = 0: the deltas of the test above.
    rewards, values = double([1.0, 0.0, 2.0]), double([0.5, 1.0, 0.5])
    mask = RAGGED[:1]
    assert credit.gae(rewards, values, mask, gamma=0.5, gae_lambda=1).tolist() == [[1, 0, 1.5]]
    assert credit.gae(rewards, values, mask, gamma=0.5, gae_lambda=0).tolist() == [[1, -0.75, 1.5]]


def test_whitening_reads_sampled_tokens_alone():
    # 1, 3, 5: mean 3, biased variance 8/3 (the unbiased one is 4)
    values, mask = double([1.0, 3.0], [5.0, NAN]), torch.tensor([[True, True], [True, False]])
    step = 2 / math.sqrt(8 / 3 + 1e-8)
    got = credit.whitened(values, mask)
    torch.testing.assert_close(got, double([-step, 0.0], [step, 0.0]), rtol=1e-14, atol=1e-15)
    kept = credit.whitened(values, mask, shift_mean=False)
    torch.testing.assert_close(kept, double([3 - step, 3.0], [3 + step, 0.0]), rtol=1e-14, atol=0)


def test_whitening_what_does_not_vary_gives_zero():
    assert credit.whitened(torch.full((3, 2), 0.1), torch.ones(3, 2, dtype=torch.bool)).abs().max() < 1e-3


def test_groups_by_hand_in_any_order():
    # Prompt 7 has 1, 2, 6: mean 3, of the others 4, 7/2, 3/2, unbiased variance (4 + 1 + 9) / 2 = 7.
    # Prompt 0 has 5, 1: mean 3, unbiased variance 8.
    reward, prompt = double(1.0, 5.0, 2.0, 6.0, 1.0), index(7, 0, 7, 7, 0)
    assert credit.leave_one_out(reward, prompt).tolist() == [-3, 4, -1.5, 4.5, -4]
    assert credit.group_centred(reward, prompt).tolist() == [-2, 2, -1, 3, -2]
    std = double(7.0, 8.0, 7.0, 7.0, 8.0).sqrt() + 1e-4
    expected = double(-2.0, 2.0, -1.0, 3.0, -2.0) / std
    torch.testing.assert_close(credit.group_normalised(reward, prompt), expected, rtol=1e-14, atol=0)


GROUPS = [credit.leave_one_out, credit.group_centred, credit.group_normalised]


@pytest.mark.parametrize("relative", GROUPS)
def test_equal_scores_give_exactly_zero(relative):
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: the distance to a rounded mean, divided by 1e-4, would be noise
    for score in (0.1, 1e4 / 3, -7.7):
        assert relative(torch.full((3,), score), index(1, 1, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("relative", GROUPS)
def test_a_lone_completion_is_refused(relative):
    message = r"^Rollout\.prompt_index: prompt 4 has 1 completion, expected 2 or more .*: sample several completions"
    with pytest.raises(ValueError, match=message):
        relative(double(1.0, 2.0, 3.0), index(3, 3, 4))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.5, -2.4, 0.0),  # good, and already raised enough
        (2.0, 1.1, -2.2, -2.2),
        (2.0, 0.5, -1.0, -1.0),  # good, but lowered: not bounded
        (-2.0, 1.5, 3.0, 3.0),  # bad, but raised: not bounded
        (-2.0, 0.9, 1.8, 1.8),
        (-2.0, 0.5, 1.6, 0.0),  # bad, and already lowered enough
    ],
)
def test_policy_clipping(advantage, ratio, loss, slope):
    # max(-A rho, -A clip(rho, 0.8, 1.2)); d / d log rho = -A rho where the first is taken
    log_ratio = double(ratio).log().requires_grad_()
    got = credit.clipped_policy_loss(log_ratio, double(advantage), low=0.2, high=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-14)
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-14)


def test_the_bounds_are_each_their_own():
    log_ratio = double(1.25, 1.25, 0.7, 0.7).log()
    advantage = double(1.0, 1.0, -1.0, -1.0)
    low_high = credit.clipped_policy_loss(log_ratio, advantage, low=0.2, high=0.5)
    torch.testing.assert_close(low_high, double(-1.25, -1.25, 0.8, 0.8), rtol=1e-14, atol=0)
    assert credit.clipped_share(log_ratio, low=0.2, high=0.5).tolist() == [0, 0, 1, 1]
    assert credit.clipped_share(log_ratio, low=0.4, high=0.2).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (1.25, 3.0, 1.53125, -1.75),  # within the range: (1.25 - 3)^2 / 2
        (2.0, 3.0, 1.125, 0.0),  # moved 1 towards the target: counts as 1.5, (1.5 - 3)^2 / 2
        (2.0, 0.0, 2.0, 2.0),  # moved away from it: not bounded, 2^2 / 2
        (0.0, -1.0, 1.125, 0.0),  # moved 1 down: counts as 0.5
    ],
)
def test_value_clipping(value, target, loss, slope):
    # 1 at sampling, range 1/2
    leaf = double(value).requires_grad_()
    got = credit.clipped_value_loss(leaf, double(1.0), double(target), clip=0.5)
    got.sum().backward()
    assert (got.item(), leaf.grad.item()) == (loss, slope)


def test_explained_variance():
    # target 0, 4, 2: variance 8/3. Off by 0, 2, 1: variance 2/3. 1 - 1/4.
    target, mask = double([0.0, 4.0], [2.0, 9.0]), torch.tensor([[True, True], [True, False]])
    assert credit.explained_variance(double([0.0, 2.0], [1.0, 0.0]), target, mask).item() == pytest.approx(0.75)
    assert credit.explained_variance(target - 5, target, mask).item() == 1  # a constant error is no variance
    assert credit.explained_variance(target, torch.full_like(target, 0.1), mask).item() == 0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.5), (6.6, 0.505), (12.0, 0.51), (600.0, 0.51), (5.4, 0.495), (0.0, 0.49), (-3.0, 0.49)],
)
def test_adapted_coefficient(kl, expected):
    # 0.5 (1 + clip(kl / 6 - 1, ±0.2) * 1000 / 10000)
    got = credit.adapted_coefficient(0.5, kl, 1000, target=6, horizon=10_000)
    assert got == pytest.approx(expected, rel=1e-12)


def test_a_horizon_shorter_than_a_step_of_the_controller_is_refused():
    # 0.2 * 500 completions = 100
    with pytest.raises(ValueError, match=r"^kl_horizon must be above 0\.2 times the 500 completions .*, got 100: "):
        credit.adapted_coefficient(0.5, 6.0, 500, target=6, horizon=100)
    assert credit.adapted_coefficient(0.5, 0.0, 500, target=6, horizon=101) > 0
