import http.server
import json
import os
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_network
from PIL import Image

import fid
from data import load_images, make_shapes
from errors import UserError
from fid import (
    FeatureStats,
    InceptionV3,
    feature_network,
    frechet_distance,
    frechet_estimate,
    kid,
    kid_estimate,
)
from rng import generator


def random_cov(d, rank=None, seed=0):
    x = np.random.default_rng(seed).standard_normal((rank or 3 * d, d))
    return x.T @ (x * np.linspace(0.1, 2, len(x))[:, None]) / len(x)


def features(n, d=8, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / d**0.5
    return rng.standard_normal((n, d)) @ mix + 0.3 * rng.standard_normal((n, 1)) ** 2 + shift


# ---- Inception ----

@pytest.fixture(scope="module")
def random_inception():
    """InceptionV3 with random weights and running statistics, scaled so that features are of order 1."""
    network, g = InceptionV3(), generator(0, "inception")
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.copy_(torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=g) + 0.4)
        elif value.is_floating_point():
            value.copy_(0.1 * torch.randn(value.shape, generator=g))
    return network


@pytest.fixture(scope="module")
def peer_inception(random_inception):
    inception = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid: tests/requirements-peers.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: random_inception.state_dict())
        return inception.InceptionV3().eval()  # loads strictly: so names and shapes are the published ones


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (75, 120)])
def test_features_equal_pytorch_fids(random_inception, peer_inception, size):
    x = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=generator(0, "x"))
    with torch.no_grad():
        expected = peer_inception(x / 255)[0][:, :, 0, 0]
    ours = random_inception(x)
    assert ours.shape == (2, 2048) and ours.dtype == torch.float32
    assert 0.1 < expected.std() < 10
    assert ((ours - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_features_do_not_depend_on_the_batch(random_inception):
    x = make_shapes(5)
    whole = random_inception(x)
    assert (random_inception(x[2:4]) - whole[2:4]).abs().max() < 1e-5 * whole.abs().max()


def test_inception_is_always_in_eval_mode_and_has_no_gradients(random_inception):
    random_inception.train()
    assert not any(m.training for m in random_inception.modules())
    assert not any(p.requires_grad for p in random_inception.parameters())


# ---- distances ----

@pytest.mark.parametrize("method", ["sqrtm", "eigh"])
def test_unit_gaussians_one_apart_in_every_dimension(method):
    d = 2048
    assert frechet_distance(np.zeros(d), np.eye(d), np.ones(d), np.eye(d), method) == pytest.approx(d, rel=1e-12)


@pytest.mark.parametrize("method", ["sqrtm", "eigh"])
def test_non_commuting_closed_form(method):
    """For 2x2 matrices tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    c, s = np.cos(0.7), np.sin(0.7)
    a, turn = np.diag([4.0, 1.0]), np.array([[c, -s], [s, c]])
    b = turn @ np.diag([9.0, 0.25]) @ turn.T
    assert np.abs(a @ b - b @ a).max() > 1
    trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = 25 + np.trace(a) + np.trace(b) - 2 * trace
    assert frechet_distance([0, 0], a, [3, 4], b, method) == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("rank_a", "rank_b"), [(None, None), (20, None), (None, 20), (20, 30), (1, 1)])
def test_eigh_equals_sqrtm(rank_a, rank_b):
    """Random and non-commuting; of full rank and singular on either side."""
    a, b = random_cov(64, rank_a, seed=1), random_cov(64, rank_b, seed=2)
    values = [frechet_distance(np.zeros(64), *args, method=method) for method in ("sqrtm", "eigh")
              for args in [(a, np.full(64, 0.1), b)]]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("rank", [None, 100])
def test_identity_symmetry_and_sign(rank):
    mu, a, b = np.ones(256), random_cov(256, rank, seed=1), random_cov(256, rank, seed=2)
    assert abs(frechet_distance(mu, a, mu, a, "eigh")) < 1e-6
    there, back = frechet_distance(mu, a, 2 * mu, b, "eigh"), frechet_distance(2 * mu, b, mu, a, "eigh")
    assert there == pytest.approx(back, rel=1e-10) and there > 256
    tiny = frechet_distance(mu, a, mu, a * (1 + 1e-9), "eigh")
    assert -1e-9 < tiny < 1e-6


def test_distances_equal_the_peers(monkeypatch):
    x, y = features(300, 64), features(300, 64, seed=1, shift=0.1)
    stats = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (x, y)]
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="pytorch-fid: tests/requirements-peers.txt")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity: requirements-peers.txt")
    from scipy.linalg import sqrtm
    monkeypatch.setattr(fid_score.linalg, "sqrtm", lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), 0.0))
    ours = [frechet_distance(*stats[0], *stats[1], method) for method in ("sqrtm", "eigh")]
    pytorch_fid = fid_score.calculate_frechet_distance(*stats[0], *stats[1])
    dicts = [{"mu": mu, "sigma": sigma} for mu, sigma in stats]
    torch_fidelity = metric_fid.fid_statistics_to_metric(*dicts, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx([pytorch_fid] * 2, rel=1e-6)
    assert ours == pytest.approx([torch_fidelity] * 2, rel=1e-6)


def test_kid_equals_torch_fidelitys():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity: requirements-peers.txt")
    x, y = features(150, 16), features(200, 16, seed=1, shift=0.2)
    theirs = metric_kid.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subsets=10,
                                               kid_subset_size=50, rng_seed=2020, verbose=False)
    assert kid(x, y, subsets=10, subset_size=50) == pytest.approx(
        (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]), rel=1e-9)


def test_kid_is_unbiased_and_the_frechet_distance_is_not():
    """Two samples of one distribution: KID is 0 on average at any n, the Frechet distance shrinks with n."""
    kids = [kid(features(50, seed=i), features(50, seed=100 + i), subsets=1, subset_size=50)[0] for i in range(60)]
    assert abs(np.mean(kids)) < 3 * np.std(kids) / 60**0.5
    reference = FeatureStats(8).update(features(20_000, seed=7))
    at_50, at_1000 = (np.mean([frechet_estimate(features(n, seed=i), reference).value for i in range(8)])
                      for n in (50, 1000))
    assert at_50 > 5 * at_1000 > 0


BAD = {
    "not finite": lambda mu, s: (mu, s * np.nan), "mu is not finite": lambda mu, s: (mu * np.inf, s),
    "not symmetric": lambda mu, s: (mu, s + np.triu(np.ones_like(s), 1)),
    "indefinite": lambda mu, s: (mu, s - 0.5 * np.eye(len(s))), "do not fit": lambda mu, s: (mu[:-1], s),
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_distribution_is_refused(match, side):
    good = (np.ones(16), random_cov(16))
    pair = [good, good]
    pair[side] = BAD[match](*good)
    for method in ("sqrtm", "eigh"):
        with pytest.raises(ValueError, match=match):
            frechet_distance(*pair[0], *pair[1], method)
    with pytest.raises(ValueError, match="method"):
        frechet_distance(*good, *good, "cholesky")


# ---- sampling errors ----

def weighted_frechet(x, weights, reference):
    mu = weights @ x
    return frechet_distance(mu, (x - mu).T @ ((x - mu) * weights[:, None]), reference.mean, reference.cov, "eigh")


def test_influence_is_the_derivative_of_the_distance():
    """Against a finite difference: shift a little probability onto one sample."""
    x, reference = features(400), FeatureStats(8).update(features(5000, seed=1, shift=0.2))
    influence = frechet_estimate(x, reference).influence
    uniform, h = np.full(400, 1 / 400), 1e-6
    for i in (0, 17, 399):
        onto = np.eye(400)[i] - uniform
        slope = (weighted_frechet(x, uniform + h * onto, reference)
                 - weighted_frechet(x, uniform - h * onto, reference)) / (2 * h)
        assert influence[i] == pytest.approx(slope, rel=0.02, abs=0.02)


@pytest.mark.parametrize(("n", "d"), [(300, 8), (60, 64)])
@pytest.mark.parametrize("kind", ["frechet", "kid"])
def test_stated_errors_match_the_spread_over_fresh_samples(n, d, kind):
    """n above and below the dimension; 60 independent sample sets against one reference."""
    y = features(3000, d, seed=1000, shift=0.3)
    reference = FeatureStats(d).update(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "frechet":
            estimates = [frechet_estimate(features(n, d, seed=i), reference) for i in range(60)]
            values = [e.value for e in estimates]
        else:
            estimates = [kid_estimate(features(n, d, seed=i), SimpleNamespace(sample=y[:500])) for i in range(60)]
            values = [e.value for e in estimates]
    stated, spread = np.mean([e.stderr for e in estimates]), np.std(values, ddof=1)
    assert 0.7 < stated / spread < 1.4  # 60 draws know their spread to 9 %


def test_a_paired_difference_is_known_better_than_its_parts():
    """Two sets made from the same noise: the error of the difference from paired influences matches its spread."""
    reference = FeatureStats(8).update(features(5000, seed=1000))
    differences, stated, unpaired = [], [], []
    for i in range(60):
        a, b = (frechet_estimate(features(300, seed=i) * scale, reference) for scale in (1.1, 1.2))
        differences.append(b.value - a.value)
        stated.append((b.influence - a.influence).std(ddof=1) / 300**0.5)
        unpaired.append(np.hypot(a.stderr, b.stderr))
    spread = np.std(differences, ddof=1)
    assert 0.7 < np.mean(stated) / spread < 1.4
    assert np.mean(unpaired) > 1.5 * spread


def test_fewer_samples_than_dimensions_is_said():
    with pytest.warns(UserWarning, match="5 samples for 8 features: .* biased upwards"):
        frechet_estimate(features(5), FeatureStats(8).update(features(100)))


# ---- moments ----

def test_streamed_and_merged_moments_equal_numpys():
    x = features(1000) * 5 + 1000  # far from zero, where naive sums of squares lose digits
    whole = FeatureStats(8).update(x)
    parts = [FeatureStats(8).update(torch.from_numpy(part)) for part in np.split(x, [1, 400, 401])]
    merged = FeatureStats(8)
    for part in parts:
        merged.merge(part)
    merged.merge(FeatureStats(8)).update(x[:0])
    for stats in (whole, merged):
        assert stats.n == 1000
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_survive_the_disk(tmp_path):
    stats = FeatureStats(8, "lite0", "abc", "def").update(features(100))
    stats.sample = features(10).astype(np.float32)
    stats.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert {"mu", "sigma", "n"} <= set(file.files) and file["mu"].dtype == np.float64
    loaded = FeatureStats.load(tmp_path / "s.npz")
    assert (loaded.n, loaded.features, loaded.weights_hash, loaded.data_hash) == (100, "lite0", "abc", "def")
    assert np.array_equal(loaded.mean, stats.mean) and np.allclose(loaded.cov, stats.cov, rtol=1e-14)
    assert np.array_equal(loaded.sample, stats.sample)
    more = loaded.update(features(50, seed=1))
    both = np.concatenate([features(100), features(50, seed=1)])
    np.testing.assert_allclose(more.cov, np.cov(both, rowvar=False), rtol=1e-10, atol=1e-12)


def test_statistics_published_by_pytorch_fid_load_with_a_warning(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(8), sigma=np.eye(8))
    with pytest.warns(UserWarning, match="unknown origin"):
        stats = FeatureStats.load(tmp_path / "theirs.npz")
    assert stats.n is None and np.array_equal(stats.cov, np.eye(8))
    with pytest.raises(ValueError, match="n is unknown"):
        stats.merge(FeatureStats(8).update(features(5)))


def test_bad_features_are_refused():
    stats = FeatureStats(8)
    for bad, match in [(features(5) * np.nan, "not finite"), (features(5) + np.inf, "not finite"),
                       (features(5, 7), "expected"), (features(5)[0], "expected")]:
        with pytest.raises(ValueError, match=match):
            stats.update(bad)
    assert stats.n == 0
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        _ = stats.update(features(1)).cov
    with pytest.raises(ValueError, match="dimension"):
        stats.merge(FeatureStats(9))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\3\4 a zip cut short", None])
def test_files_that_hold_no_statistics(tmp_path, content):
    path = tmp_path / "s.npz"
    if content is None:
        np.savez(path, other=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="s.npz"):
        FeatureStats.load(path)


# ---- weights ----

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local HTTP server that serves `server.content`, and torch.hub's cache in a folder of this test."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(server.status)
            self.send_header("Content-Length", str(server.length or len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.length, server.status = b"", None, 200
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(fid, "INCEPTION_URL", f"http://127.0.0.1:{server.server_port}/pt_inception-test.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server.cache = tmp_path / "hub" / "checkpoints"
    yield server
    server.shutdown()


def serve_weights(server, monkeypatch, network, tmp_path):
    """Put a file with this network's weights behind the URL, and its hash in place of the published one."""
    torch.save(network.state_dict(), tmp_path / "w.pth")
    server.content = (tmp_path / "w.pth").read_bytes()
    monkeypatch.setattr(fid, "INCEPTION_SHA256", fid.sha256_of(tmp_path / "w.pth")[:8])


def test_weights_are_downloaded_checked_cached_and_loaded(server, monkeypatch, random_inception, tmp_path):
    serve_weights(server, monkeypatch, random_inception, tmp_path)
    x = make_shapes(2)
    assert torch.equal(feature_network("inception")(x), random_inception(x))
    assert [p.name for p in server.cache.iterdir()] == ["pt_inception-test.pth"]
    server.status, server.content = 500, b""  # the second time nothing is fetched
    assert feature_network("inception").weights_hash == fid.sha256_of(tmp_path / "w.pth")
    assert torch.equal(feature_network("inception", tmp_path / "w.pth")(x), random_inception(x))


@pytest.mark.parametrize("fault", ["truncated", "wrong", "interrupted", "missing", "offline"])
def test_downloads_that_fail_leave_nothing_behind(server, monkeypatch, random_inception, tmp_path, fault):
    serve_weights(server, monkeypatch, random_inception, tmp_path)
    if fault == "truncated":
        server.content = server.content[:1000]
    elif fault == "wrong":
        server.content = server.content[:-1] + b"?"
    elif fault == "interrupted":
        server.length, server.content = len(server.content), server.content[:5000]
    elif fault == "missing":
        server.status, server.content = 404, b""
    elif fault == "offline":
        monkeypatch.setattr(fid, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-test.pth")  # nobody listens there
    with pytest.raises(UserError) as error:
        feature_network("inception")
    message = str(error.value)
    assert "\n" not in message
    for way_out in ("--weights PATH", "eval.inception_weights=PATH", "eval.features=lite0"):
        assert way_out in message
    assert list(server.cache.iterdir()) == []


@pytest.mark.parametrize(("content", "match"), [
    (b"<!DOCTYPE html><html>Sign in</html>", "35 bytes"), (b"", "0 bytes"),
    (b"PK" + b"0" * 1000, "1002 bytes"), (None, "no such weights file"),
])
def test_a_file_that_is_not_the_weights(tmp_path, content, match):
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=match) as error:
        feature_network("inception", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_lite0s_hash_is_checked(monkeypatch):
    monkeypatch.setattr(fid, "LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        feature_network("lite0")
    with pytest.raises(ValueError, match="features 'vgg'"):
        feature_network("vgg")


@pytest.fixture(scope="module")
def published_inception():
    path = os.environ.get("FID_WEIGHTS", "")
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", fid.INCEPTION_URL.rsplit("/", 1)[1])
    if not path and not os.path.exists(cached):
        pytest.skip("no FID Inception weights in torch.hub's cache; set FID_WEIGHTS to their path")
    return feature_network("inception", path)


@pytest.mark.weights
def test_published_value_on_cifar10(published_inception, cifar10_root):
    """torch-fidelity's suite: CIFAR-10 train-5000 against test-5000 is 10.32333 +- 0.01."""
    stats = []
    for train in (True, False):
        images = load_images("cifar10", cifar10_root, train)
        chosen = np.random.RandomState(2020).choice(len(images), 5000, replace=False)
        stats.append(FeatureStats(2048).update(fid.extract(published_inception, images[chosen])))
    a, b = stats
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov, "eigh") == pytest.approx(10.32333, abs=0.01)


# ---- lite0 on real images ----

@pytest.fixture(scope="module")
def lite0():
    return feature_network("lite0")


def test_lite0_features(lite0):
    x = make_shapes(4)
    f = lite0(x)
    assert f.shape == (4, 1280) and f.dtype == torch.float32 and (f >= 0).all()
    torch.testing.assert_close(lite0(x[1:3]), f[1:3], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the package's own classifier on the same input, from the same pooled features
        y = (torch.nn.functional.interpolate(x.float(), size=(128, 128), mode="bilinear") - 127) / 128
        torch.testing.assert_close(lite0.net(y), lite0.net._fc(f), rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_distance_rises_with_noise_blur_and_colour_shift(lite0, cifar10_root):
    """Real CIFAR-10: floor below every damage, more damage is further, uniform noise furthest."""
    train = load_images("cifar10", cifar10_root)[:400]
    test = load_images("cifar10", cifar10_root, train=False)[:100].float()
    reference = fid.extract(lite0, train).numpy()
    stats = FeatureStats(1280).update(reference)
    g = generator(0, "damage")
    noise, uniform = torch.randn(test.shape, generator=g), 255 * torch.rand(test.shape, generator=g)
    blurred = [test]
    for _ in range(3):
        padded = torch.nn.functional.pad(blurred[-1], (1, 1, 1, 1), mode="reflect")
        blurred.append(torch.nn.functional.avg_pool2d(padded, 3, stride=1))
    tint = torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    series = {"noise": [test + s * noise for s in (0, 30, 90)], "blur": [blurred[i] for i in (0, 1, 3)],
              "colour": [test + s * tint for s in (0, 50, 100)]}

    def distances(images):
        f = fid.extract(lite0, images.round().clamp(0, 255).to(torch.uint8)).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return frechet_estimate(f, stats).value, kid_estimate(f, SimpleNamespace(sample=reference)).value

    ceiling = distances(uniform)
    for name, images in series.items():
        values = [distances(x) for x in images]
        for by in range(2):
            column = [v[by] for v in values]
            assert column == sorted(column) and column[-1] < ceiling[by], (name, column, ceiling)


# ---- the command ----

def test_the_command_on_folders_arrays_and_statistics(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "feature_network", lambda *_: tiny_network())
    a, b = make_shapes(20).permute(0, 2, 3, 1).numpy(), make_shapes(30, "test").permute(0, 2, 3, 1).numpy()
    folder = tmp_path / "a folder"
    folder.mkdir()
    for i, image in enumerate(a):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b.transpose(0, 3, 1, 2))
    assert fid.main(["--save-stats", str(tmp_path / "b.npz"), str(tmp_path / "stats.npz")]) == 0
    capsys.readouterr()
    values = []
    for first in (folder, tmp_path / "a.npz"):
        for second in (tmp_path / "b.npz", tmp_path / "stats.npz"):
            fid.main([str(first), str(second), "--json", "--features", "lite0"])
            printed = json.loads(capsys.readouterr().out)
            assert printed["n"] == [20, 30]
            values.append(printed["fd_lite0"])
    network = tiny_network()
    stats = [FeatureStats(6).update(network(torch.from_numpy(x).permute(0, 3, 1, 2))) for x in (a, b)]
    expected = frechet_distance(stats[0].mean, stats[0].cov, stats[1].mean, stats[1].cov)
    assert values == pytest.approx([expected] * 4, rel=1e-6)
    fid.main([str(folder), str(folder)])
    assert capsys.readouterr().out.startswith("fid ")


@pytest.mark.filterwarnings("ignore:5 samples for 6 features")
def test_statistics_of_another_network_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "feature_network", lambda *_: tiny_network())
    FeatureStats(6, "inception", "other weights").update(features(20, 6)).save(tmp_path / "s.npz")
    np.savez(tmp_path / "a.npz", make_shapes(5).permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="s.npz"):
        fid.main([str(tmp_path / "a.npz"), str(tmp_path / "s.npz")])


@pytest.mark.parametrize("case", ["nowhere", "empty folder", "text as image", "float array", "text as npz",
                                  "one image", "cut zip", "npy"])
def test_bad_inputs_of_the_command(tmp_path, monkeypatch, case):
    monkeypatch.setattr(fid, "feature_network", lambda *_: tiny_network())
    path = tmp_path / "in"
    if case in ("empty folder", "text as image"):
        path.mkdir()
    if case == "text as image":
        (path / "a.png").write_text("no image")
    if case == "float array":
        path = tmp_path / "in.npz"
        np.savez(path, np.zeros((4, 32, 32, 3)))
    if case == "text as npz":
        path.write_text("no npz")
    if case == "cut zip":
        path.write_bytes(b"PK\3\4 a zip cut short")
    if case == "npy":
        path = tmp_path / "in.npy"
        np.save(path, np.zeros((4, 32, 32, 3), np.uint8))
    if case == "one image":
        path = tmp_path / "in.npz"
        np.savez(path, np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError) as error:
        fid.main([str(path), str(path)])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_statistics_that_are_no_distribution_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "feature_network", lambda *_: tiny_network())
    np.savez(tmp_path / "nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    with pytest.warns(UserWarning, match="unknown origin"), pytest.raises(UserError, match="nan.npz.*not finite"):
        fid.main([str(tmp_path / "nan.npz"), str(tmp_path / "nan.npz")])


def test_an_unknown_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(fid.FEATURES, "inception", lambda weights: tiny_network())
    with pytest.raises(UserError, match="--device cuda:77"):
        fid.main([str(tmp_path), str(tmp_path), "--device", "cuda:77"])


def test_the_command_fails_in_one_line(tmp_path):
    import subprocess
    import sys
    done = subprocess.run([sys.executable, ROOT / "fid.py", "nowhere", "x"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr == "fid.py: error: nowhere: no such file or folder\n"
