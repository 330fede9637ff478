import pytest
import torch
from torch import nn

import model
from model import Attention, Dropout, ResBlock, UNet, timestep_embedding
from rng import generator, seed_global


def randomised(net):
    """Every weight drawn anew, so that no zero-initialised layer hides what is behind it."""
    g = generator(0, "test_weights")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g) + (p.ndim == 1) * 0.5)
    return net


@pytest.mark.parametrize("base, millions", [(32, 2.2), (64, 9.0), (128, 35.7)])
def test_parameter_counts(base, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(base).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    if base == 128:
        assert count == 35_746_307  # the published CIFAR-10 DDPM


def test_architecture():
    net = UNet(64)
    groups = {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {16}
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    assert len(blocks) == 4 * 2 + 2 + 4 * 3
    assert len([m for m in net.modules() if isinstance(m, Attention)]) == 2 + 1 + 3  # at 16x16, and in the middle
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert UNet(128).norm_out.num_groups == UNet(256, (1,)).norm_out.num_groups == 32


def test_an_untrained_network_predicts_zero_and_every_residual_branch_is_the_identity():
    net = UNet(16)
    assert net(torch.randn(2, 3, 32, 32), torch.tensor([0, 999])).abs().max() == 0
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(ResBlock(16, 16, 8, 4, 0.1)(x, torch.randn(2, 8)), x)
    assert torch.equal(Attention(16, 4)(x), x)


def test_initialisation_has_variance_one_over_the_mean_fan():
    conv = UNet(64).down[0][0].conv1
    assert conv.weight.var().item() == pytest.approx(1 / (64 * 9), rel=0.05) and conv.bias.abs().max() == 0
    qkv = Attention(64, 16).qkv
    assert qkv.weight.var().item() == pytest.approx(1 / 64, rel=0.1)  # each of the three on its own, not 1 / 128


def test_seeded_initialisation_is_repeatable():
    def weights(seed):
        seed_global(seed, "init")
        return torch.cat([p.flatten() for p in UNet(8).parameters()])
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_every_parameter_reaches_the_output():
    net = randomised(UNet(8)).eval()
    net(torch.randn(1, 3, 32, 32), torch.tensor([500])).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_each_example_depends_on_its_own_x_and_t_only():
    net = randomised(UNet(8)).eval()
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([0, 500, 999])
    whole = net(x, t)
    for i in range(3):
        torch.testing.assert_close(net(x[i:i + 1], t[i:i + 1])[0], whole[i], rtol=1e-4, atol=1e-4)
    moved = net(x, torch.tensor([0, 510, 999]))
    assert not torch.allclose(moved[1], whole[1], atol=1e-3) and torch.allclose(moved[2], whole[2], atol=1e-4)


def test_attention_equals_torchs_own():
    net = randomised(Attention(16, 4)).double()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    q, k, v = (y.flatten(2).transpose(1, 2) for y in net.qkv(net.norm(x)).chunk(3, dim=1))  # (B, HW, C)
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(net(x), x + net.proj(out))
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), x + net.proj(out))


def test_sampling_computes_what_training_does():
    """In place and without a graph, and the input is left alone."""
    net, x, t = randomised(UNet(8)).eval(), torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    before, with_graph = x.clone(), net(x, t)
    with torch.no_grad():
        assert torch.equal(net(x, t), with_graph)
    assert torch.equal(x, before)


def test_dropout_drops_p_and_keeps_the_mean():
    x, dropout = torch.rand(16, 8, 32, 32) + 1, Dropout(0.3)
    seed_global(0, "dropout")
    y = dropout(x)
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / x.numel())**0.5)
    torch.testing.assert_close(y[~dropped] / x[~dropped], torch.full_like(y[~dropped], 1 / 0.7), rtol=1e-4, atol=0)
    for one, other in ((dropped[:8], dropped[8:]), (dropped[:, 1:], dropped[:, :-1]),
                       (dropped[..., 1:], dropped[..., :-1])):  # no two places share a draw
        assert (one & other).float().mean().item() == pytest.approx(0.09, abs=4 * (0.09 * 0.91 / one.numel())**0.5)
    assert not torch.equal(dropout(x), y)
    seed_global(0, "dropout")
    assert torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_time_embedding_similarity_falls_with_distance():
    """With frequencies rising from 1 to 10^4, as in the notes, neighbours look as unrelated as strangers."""
    e = timestep_embedding(torch.arange(1000), 32)
    assert e.shape == (1000, 32)
    similarity = torch.nn.functional.cosine_similarity(e[500], e[500:], dim=1)
    at = [similarity[d].item() for d in (0, 1, 3, 10, 30, 100)]
    assert at[0] == pytest.approx(1, abs=1e-6) and at[1] > 0.95 and at == sorted(at, reverse=True)
    assert e[0].tolist() == [0.0] * 16 + [1.0] * 16
    torch.testing.assert_close(e[7, [0, 15]], torch.tensor([7.0, 7e-4]).sin())  # frequencies 1 to 1e-4


def test_double_backward_through_the_network():
    """A Hessian-vector product agrees with a finite difference of gradients."""
    net = randomised(UNet(8, (1, 2), 1)).double().eval()
    x, t = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([500])
    params = list(net.parameters())
    v = [torch.randn(p.shape, dtype=p.dtype, generator=generator(0, "v", i)) for i, p in enumerate(params)]

    def gradient(create_graph=False):
        return torch.autograd.grad((net(x, t) - 1).square().mean(), params, create_graph=create_graph)

    hv = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradient(True), v, strict=True)), params)
    h, sides = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(params, v, alpha=sign * h)
        sides.append(gradient())
        with torch.no_grad():
            torch._foreach_add_(params, v, alpha=-sign * h)
    for a, plus, minus in zip(hv, *sides, strict=True):
        torch.testing.assert_close(a, (plus - minus) / (2 * h), rtol=1e-4, atol=1e-6)


def slope_of_the_mean(monkeypatch, groups_of):
    """Train on t = 999, where x_t is eps, and return the slope of the predicted channel means against the true."""
    group_norm = nn.GroupNorm
    monkeypatch.setattr(model.nn, "GroupNorm", lambda g, c, eps: group_norm(groups_of(g, c), c, eps))
    seed_global(0, "init")
    net, t = UNet(32, (1,), 1, (), 0.0), torch.full((32,), 999)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(100):
        eps = torch.randn(32, 3, 8, 8, generator=generator(0, "eps", step))
        loss = (net(eps, t) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        eps = torch.randn(256, 3, 8, 8, generator=generator(0, "unseen"))
        true, predicted = eps.mean((2, 3)).flatten(), net(eps, t.repeat(8)).mean((2, 3)).flatten()
    return (true @ predicted / (true @ true)).item()


def test_the_network_can_output_the_mean_of_eps(monkeypatch):
    assert slope_of_the_mean(monkeypatch, lambda groups, channels: groups) > 0.9


def test_instance_norm_cannot(monkeypatch):
    """GroupNorm(32) on 32 channels, as in the notes: one channel a group, so its mean is gone before conv_out."""
    assert slope_of_the_mean(monkeypatch, lambda groups, channels: channels) < 0.5


@pytest.mark.parametrize("base", [0, 2, 14, 33, 130])
def test_channels_that_do_not_split_into_groups(base):
    with pytest.raises(ValueError, match="base_channels"):
        UNet(base)
