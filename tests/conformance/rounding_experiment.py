"""Which rounding of PyTorch's CPU FlashAttention kernel makes its gradients worse than those of plain operations.

    python -m tests.conformance.rounding_experiment        # prints the table of docs/decisions.md

The attentions come from trained checkpoints. Each row computes everything in float64 except one quantity, which it
rounds as the kernel does. It shows the largest error of the gradient, divided by the budget without the term for scores
that are computed again.
"""

from __future__ import annotations

import torch

import attnzoo
from attnzoo.conformance.error_rule import GRADIENT, allowed_error
from attnzoo.spec.heads import expand_heads
from tests.support.checkpoints import load, passage

# Coefficients of the fast exponential in ATen/cpu/vec, 20 units in the last place.
_FAST = (0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0)


def fast_exponential(x):
    """Return the value of the kernel's polynomial for the exponential, without rounding."""
    power = torch.floor(x / torch.log(torch.tensor(2.0, dtype=x.dtype)) + 0.5)
    rest = x - power * 0.693147182464599609375  # ln 2 in float32
    value = torch.zeros_like(x)
    for coefficient in _FAST:
        value = value * rest + coefficient
    return value * torch.exp2(power)


class Experiment:
    """One causal attention on float32 tensors, and a cotangent of its output."""

    def __init__(self, attention):
        (segment,) = attention.segments
        self.scale, self.shared = attention.scale, attention.heads // segment.key.shape[1]
        self.query = attention.query.detach()
        self.key, self.value = (expand_heads(x.detach(), attention.heads) for x in (segment.key, segment.value))
        self.seen = torch.ones(attention.q_len, segment.kv_len, dtype=torch.bool).tril()
        generator = torch.Generator().manual_seed(0)
        self.cotangent = torch.randn(self.query.shape, generator=generator, dtype=torch.float64)

    def scores(self, dtype):
        product = self.query.to(dtype) @ self.key.to(dtype).transpose(-1, -2) * self.scale
        return product.double().masked_fill(~self.seen, float("-inf"))

    def scores_of_the_backward(self):
        """Return the scores of the kernel's backward, which calls BLAS on 64 queries and scales inside the product."""
        blocks = []
        for query in self.query.split(64, dim=2):
            pairs = zip(query.flatten(0, 1), self.key.flatten(0, 1), strict=True)
            blocks.append([torch.addmm(torch.zeros(1), q, k.T, beta=0, alpha=self.scale) for q, k in pairs])
        joined = torch.cat([torch.stack(block) for block in blocks], dim=1)
        return joined.unflatten(0, self.query.shape[:2]).double().masked_fill(~self.seen, float("-inf"))

    def gradient(self, weights, output):
        """The gradient by the formula of a flash backward, in float64."""
        mean = (self.cotangent * output).sum(-1, keepdim=True)
        grad_scores = weights * (self.cotangent @ self.value.double().transpose(-1, -2) - mean)
        grads = [grad_scores @ self.key.double() * self.scale]
        for grad in (
            grad_scores.transpose(-1, -2) @ self.query.double() * self.scale,
            weights.transpose(-1, -2) @ self.cotangent,
        ):
            grads.append(grad.unflatten(1, (-1, self.shared)).sum(2))
        return torch.cat([grad.flatten() for grad in grads])

    def plain(self):
        """The gradient of plain float32 operations by autograd."""
        leaves = [x.clone().requires_grad_() for x in (self.query, self.key, self.value)]
        product = leaves[0] @ leaves[1].transpose(-1, -2) * self.scale
        output = torch.softmax(product.masked_fill(~self.seen, float("-inf")), -1) @ leaves[2]
        return self._joined(torch.autograd.grad(output, leaves, self.cotangent.float()))

    def _joined(self, grads):
        query, *others = grads
        return torch.cat([query.flatten(), *(g.unflatten(1, (-1, self.shared)).sum(2).flatten() for g in others)])

    def ratios(self):
        """Error / budget for each quantity that is rounded."""
        exact = self.scores(torch.float64)
        weights, lse = torch.softmax(exact, -1), exact.logsumexp(-1, keepdim=True)
        output = weights @ self.value.double()
        reference = self.gradient(weights, output)
        eager_error = (self.plain().double() - reference).abs().max()
        budget = allowed_error(GRADIENT, eager_error, reference.abs().max(), torch.float32)
        inputs = (self.query, self.key, self.value)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        saved, saved_lse = kernel(*inputs, 0.0, True, scale=self.scale)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        ran = backward(self.cotangent.float(), *inputs, saved, saved_lse, 0.0, True, scale=self.scale)
        highest = exact.amax(-1, keepdim=True)
        powers = fast_exponential((exact - highest).clamp(min=-80.0)).masked_fill(~self.seen, 0.0)
        fast_lse, fast_output = highest + powers.sum(-1, keepdim=True).log(), powers @ self.value.double()
        fast_output = fast_output / powers.sum(-1, keepdim=True)
        same = torch.softmax(self.scores(torch.float32), -1)
        again = (self.scores_of_the_backward() - saved_lse.double()[..., None]).exp()
        gradients = {
            "the whole kernel": self._joined(ran),
            "the scores of the backward, with the saved output and lse": self.gradient(again, saved.double()),
            "the output, to float32": self.gradient(weights, output.float().double()),
            "the lse, to float32": self.gradient((exact - lse.float().double()).exp(), output),
            "the exponential of the forward: the fast one": self.gradient((exact - fast_lse).exp(), fast_output),
            "scores to float32, the same in both directions": self.gradient(same, same @ self.value.double()),
        }
        return {what: float((grad.double() - reference).abs().max() / budget) for what, grad in gradients.items()}


def attentions(family):
    """Every attention of a checkpoint on 8 passages, by site and passage."""
    model, observed = load(family), {}
    with attnzoo.patch(model, "sdpa") as handle:
        for number in range(8):
            for site in handle.sites:
                name = f"{site.name} on passage {number}"
                site.observer = lambda site, attention, *_, name=name: observed.update({name: attention})
            model(**passage(family, number, 256))
    return observed


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in ("gpt_neox", "gpt_bigcode"):
        ratios = {name: Experiment(attention).ratios() for name, attention in attentions(family).items()}
        worst = sorted(ratios, key=lambda name: -ratios[name]["the whole kernel"])[:2]
        print(f"| {family} | {' | '.join(worst)} |")
        for what in ratios[worst[0]]:
            print(f"| {what} | {' | '.join(f'{ratios[name][what]:.2f}' for name in worst)} |", flush=True)
