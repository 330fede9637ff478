import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from model import Attention, Downsample, ResBlock, UNet, Upsample, timestep_embedding
from rng import generator, seed_global


def randomised(net):
    """Every weight drawn anew, so that no zero-initialised layer hides what is behind it."""
    g = generator(0, "test_weights")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g) + (p.ndim == 1) * 0.5)
    return net


# ---- architecture ----

@pytest.mark.parametrize("base, millions", [(32, 2.2), (64, 9.0), (128, 35.7)])
def test_parameter_counts(base, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(base).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert base != 128 or count == 35_746_307  # the published CIFAR-10 DDPM


def test_architecture():
    net = UNet(64)
    assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {16}
    assert len([m for m in net.modules() if isinstance(m, ResBlock)]) == 4 * 2 + 2 + 4 * 3
    assert len([m for m in net.modules() if isinstance(m, Attention)]) == 2 + 1 + 3  # at 16x16, and in the middle
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert UNet(128).norm_out.num_groups == UNet(256, (1,)).norm_out.num_groups == 32


@pytest.mark.parametrize("base", [0, 2, 14, 33, 130])
def test_channels_that_do_not_split_into_groups(base):
    with pytest.raises(ValueError, match=f"base_channels={base}"):
        UNet(base)


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


# ---- layers against independent forms ----

def test_time_embedding():
    """Frequencies 1 to 1e-4. If they rose from 1 to 1e4, neighbours would be as dissimilar as any two timesteps."""
    e = timestep_embedding(torch.arange(1000), 32)
    assert e.shape == (1000, 32) and e[0].tolist() == [0.0] * 16 + [1.0] * 16
    torch.testing.assert_close(e[7, [0, 15]], torch.tensor([7.0, 7e-4]).sin())
    similarity = F.cosine_similarity(e[500], e[500:], dim=1)
    at = [similarity[d].item() for d in (0, 1, 3, 10, 30, 100)]
    assert at[0] == pytest.approx(1, abs=1e-6) and at[1] > 0.95 and at == sorted(at, reverse=True)


def test_a_res_block_is_what_the_paper_draws():
    block, x, emb = randomised(ResBlock(8, 16, 5, 4, 0.3)), torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = F.silu(F.group_norm(h + (emb @ block.emb.weight.T + block.emb.bias)[:, :, None, None], 4,
                            block.norm2.weight, block.norm2.bias, 1e-6))
    torch.testing.assert_close(block.eval()(x, emb), block.conv2(h) + block.skip(x))
    seed_global(0, "dropout")
    expected = block.conv2(F.dropout(h, 0.3)) + block.skip(x)
    seed_global(0, "dropout")
    torch.testing.assert_close(block.train()(x, emb), expected)


def test_every_res_block_reads_the_silu_of_the_time_mlp():
    net, seen = randomised(UNet(8)).eval(), []
    for m in net.modules():
        if isinstance(m, ResBlock):
            m.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    t = torch.tensor([3, 700])
    net(torch.randn(2, 3, 32, 32), t)
    first, _, second = net.time_mlp
    expected = F.silu(second(F.silu(first(timestep_embedding(t, 8)))))
    assert len(seen) == 22
    torch.testing.assert_close(seen, [expected] * 22)


def test_attention_equals_torchs_own():
    net = randomised(Attention(16, 4)).double()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    q, k, v = (y.flatten(2).transpose(1, 2) for y in net.qkv(net.norm(x)).chunk(3, dim=1))  # (B, HW, C)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(net(x), x + net.proj(out))
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), x + net.proj(out))


def test_resampling_with_kernels_of_a_single_one():
    x = torch.randn(2, 3, 8, 8)
    for layer, row, expected in ((Downsample(3), 0, x[:, :, ::2, ::2]), (Downsample(3), 2, x[:, :, 2::2, 2::2]),
                                 (Upsample(3), 1, x.repeat_interleave(2, 2).repeat_interleave(2, 3))):
        with torch.no_grad():
            layer.conv.weight.zero_()[range(3), range(3), row, row] = 1
        H, W = expected.shape[2:]
        assert torch.equal(layer(x)[:, :, :H, :W], expected)
        assert layer(x).shape == ((2, 3, 4, 4) if isinstance(layer, Downsample) else (2, 3, 16, 16))


# ---- the whole network ----

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


def test_sampling_computes_what_training_does():
    """Without a graph some layers work in place: the result is the same and the input is left alone."""
    net, x, t = randomised(UNet(8)).eval(), torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    before, with_graph = x.clone(), net(x, t)
    with torch.no_grad():
        assert torch.equal(net(x, t), with_graph)
    assert torch.equal(x, before)


@pytest.mark.parametrize("instance_norm", [False, True])
def test_the_network_can_output_the_mean_of_eps_but_not_with_instance_norm(monkeypatch, instance_norm):
    """Train on t = 999, where x_t is eps, and take the slope of the predicted channel means against the true ones.

    With one channel a group, its mean is gone before conv_out.
    """
    group_norm = nn.GroupNorm
    monkeypatch.setattr(model.nn, "GroupNorm", lambda g, c, eps: group_norm(c if instance_norm else g, c, eps))
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
    slope = (true @ predicted / (true @ true)).item()
    assert slope < 0.5 if instance_norm else slope > 0.9
