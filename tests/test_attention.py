import pytest
import torch

from wmhlib import attention


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


@pytest.mark.parametrize("scores", [1, 40, 3 * 35, 1 << 21], ids=["a query at a time", "some queries", "some heads", "all at once"])
def test_blocks_of_any_size_give_softmax_attention_and_its_gradients(scores, monkeypatch):
    monkeypatch.setattr(attention, "_SCORES", scores)
    q, k, v = random(2, 4, 5, 6), random(2, 4, 7, 6), random(2, 4, 7, 3)
    d_out = random(2, 4, 5, 3).detach()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    found = attention.attend(q, k, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attention._fused(q, k, v), expected)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), d_out), torch.autograd.grad(expected, (q, k, v), d_out))


def test_half_precision_stays_within_the_rounding_of_the_scores():
    q, k, v = (random(1, 4, 64, 16).detach() for _ in range(3))
    exact = attention.attend(q, k, v)
    half = attention.attend(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16 and (half.double() - exact).norm() < 0.02 * exact.norm()


def test_no_more_scores_than_the_limit_are_held(monkeypatch):
    monkeypatch.setattr(attention, "_SCORES", 64)
    held = []
    monkeypatch.setattr(attention, "_weights", lambda q, k: held.append(q.shape[0] * q.shape[1] * k.shape[1]) or torch.softmax(q @ k.transpose(1, 2), -1))
    attention.attend(random(1, 8, 16, 4), random(1, 8, 16, 4), random(1, 8, 16, 4)).sum().backward()
    assert max(held) <= 64 and sum(held) == 2 * 8 * 16 * 16
