"""Direct preference optimisation under other divergences than the reverse KL."""

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dpo.losses.objective import Number, PairObjective, require_number, require_one_of
from dpo.losses.reduce import log_ratios, logistic_loss, pair_output
from dpo.types import LossOutput, PairLogps

Divergence = Literal["forward_kl", "reverse_kl", "js", "alpha"]

LARGEST_EXPONENT = 30.0
"""Argument beyond which exponentials go on along their tangent: 1e13 times the pull at the reference is as good as any
more, and its square still fits float32 in a gradient's norm. A clamp would instead drop the gradient of the very pairs
that have fallen farthest."""


@final
@dataclass(frozen=True, kw_only=True)
class FDPO(PairObjective):
    """DPO whose reward is held to the reference by an f-divergence of one's choice.

    loss = -p log σ(z) - (1 - p) log σ(-z),  z = β (g(r_w) - g(r_l)),  r = log π(y|x) - log π_ref(y|x),
    p = P(w preferred), and g = f'(u) up to a constant, u = e^r:
    "reverse_kl" r;  "forward_kl" 1 - 1/u;  "js" log(2u / (1 + u));  "alpha" (1 - u^-α) / α.
    Where the policy equals the reference, g is 0 and the loss is ln 2.

    Paper: arXiv:2309.16240, table 1.
    Differs: the paper's f' of the forward KL is -1/u and that of the reverse KL is r + 1; constants cancel between the
    two completions, and without them every reward is 0 at the reference. A common trainer's coefficient is 1 - α. Below
    r = -30 nats (-30 / α) the exponential of "forward_kl" ("alpha") is continued along its tangent, to stay finite.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference (> 0): larger keeps the policy closer to it."""
    divergence: Divergence = "js"
    """What measures the distance to the reference. "reverse_kl" is DPO and seeks modes; "forward_kl" covers all that
    the reference does, and pulls e^-r times as hard where a likelihood has fallen; "js" and "alpha" lie between."""
    alpha: Number = 0.5
    """Order of the "alpha" divergence (> 0, < 1): near 0 it is the reverse KL, near 1 the forward KL. The others do
    not read it."""

    needs_reference = True
    paper = "arXiv:2309.16240, table 1"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_one_of(self, "divergence", get_args(Divergence))
        require_number(self, "alpha", above=0, below=1)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β g(r)."""
        chosen, rejected = (self.beta * self._derivative(r) for r in log_ratios(logps))
        z = chosen - rejected
        losses = logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))

    def _derivative(self, r: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        match self.divergence:
            case "reverse_kl":
                return r
            case "forward_kl":
                return _alpha_derivative(r, 1)  # the limit of "alpha"
            case "js":
                return math.log(2) + logsigmoid(r)  # u / (1 + u) = σ(r)
            case "alpha":
                return _alpha_derivative(r, self.alpha)


def _alpha_derivative(r: Float[Tensor, " batch"], alpha: Number) -> Float[Tensor, " batch"]:
    """Return (1 - e^(-αr)) / α, its exponential continued along the tangent beyond `LARGEST_EXPONENT`."""
    exponent = -alpha * r
    # relu, not exponent - bounded: two gradients of e^30 that cancel would leave their rounding behind.
    tangent = math.exp(LARGEST_EXPONENT) * relu(exponent - LARGEST_EXPONENT)
    return -(torch.expm1(exponent.clamp(max=LARGEST_EXPONENT)) + tangent) / alpha
