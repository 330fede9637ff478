import json
import os
import warnings
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_network
from PIL import Image

import fid
from data import load_images, make_shapes
from errors import UserError
from fid import METRICS, FeatureStats, feature_network, frechet_distance, frechet_estimate, kid
from rng import generator


def random_cov(d, rank=None, seed=0):
    x = np.random.default_rng(seed).standard_normal((rank or 3 * d, d))
    return x.T @ (x * np.linspace(0.1, 2, len(x))[:, None]) / len(x)


def features(n, d=8, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / d**0.5
    return rng.standard_normal((n, d)) @ mix + 0.3 * rng.standard_normal((n, 1)) ** 2 + shift


def reference(n, d=8, sample=500):
    x = features(n, d, seed=1000, shift=0.3)
    stats = FeatureStats(d).update(x)
    stats.sample = x[:sample]
    return stats


# ---- Inception ----

@pytest.fixture(scope="module")
def random_inception():
    """InceptionV3 with random weights and running statistics, scaled so that features are of order 1."""
    network, g = fid.InceptionV3(), generator(0, "inception")
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.copy_(torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=g) + 0.4)
        elif value.is_floating_point():
            value.copy_(0.1 * torch.randn(value.shape, generator=g))
    return network


@pytest.mark.parametrize("size", [(32, 32), (75, 120)])
def test_features_equal_pytorch_fids(random_inception, size, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid: tests/requirements-peers.txt")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: random_inception.state_dict())
    peer = inception.InceptionV3().eval()  # loads strictly: so names and shapes are the published ones
    x = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=generator(0, "x"))
    with torch.no_grad():
        expected = peer(x / 255)[0][:, :, 0, 0]
    ours = random_inception(x)
    assert ours.shape == (2, 2048) and ours.dtype == torch.float32 and 0.1 < expected.std() < 10
    assert ((ours - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_inception_treats_each_image_alone_and_never_trains(random_inception):
    x = make_shapes(5)
    whole = fid.extract(random_inception, x, batch_size=2)
    random_inception.train()
    assert (random_inception(x) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert not any(p.requires_grad for p in random_inception.parameters())


# ---- distances ----

@pytest.mark.parametrize("method", ["sqrtm", "eigh"])
def test_closed_forms(method):
    """Unit Gaussians; and 2x2 matrices that do not commute, where tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    assert frechet_distance(np.zeros(99), np.eye(99), np.ones(99), np.eye(99), method) == pytest.approx(99, rel=1e-12)
    c, s = np.cos(0.7), np.sin(0.7)
    a, turn = np.diag([4.0, 1.0]), np.array([[c, -s], [s, c]])
    b = turn @ np.diag([9.0, 0.25]) @ turn.T
    expected = 25 + np.trace(a + b) - 2 * np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance([0, 0], a, [3, 4], b, method) == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("rank_a", "rank_b"), [(None, None), (20, None), (None, 20), (20, 30), (1, 1)])
def test_eigh_equals_sqrtm(rank_a, rank_b):
    """Random and non-commuting; of full rank and singular on either side."""
    args = np.zeros(64), random_cov(64, rank_a, seed=1), np.full(64, 0.1), random_cov(64, rank_b, seed=2)
    assert frechet_distance(*args, "eigh") == pytest.approx(frechet_distance(*args), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 100])
def test_identity_and_symmetry(rank):
    mu, a, b = np.ones(256), random_cov(256, rank, seed=1), random_cov(256, rank, seed=2)
    assert abs(frechet_distance(mu, a, mu, a, "eigh")) < 1e-6
    there, back = frechet_distance(mu, a, 2 * mu, b, "eigh"), frechet_distance(2 * mu, b, mu, a, "eigh")
    assert there == pytest.approx(back, rel=1e-10) and there > 256


def test_distances_equal_the_peers(monkeypatch):
    stats = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (features(300, 64), features(300, 64, 1, shift=0.1))]
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="pytorch-fid: tests/requirements-peers.txt")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity: requirements-peers.txt")
    from scipy.linalg import sqrtm  # pytorch-fid 0.3.0 asks it for an argument that SciPy has removed since
    monkeypatch.setattr(fid_score.linalg, "sqrtm", lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), 0.0))
    dicts = [{"mu": mu, "sigma": sigma} for mu, sigma in stats]
    theirs = [fid_score.calculate_frechet_distance(*stats[0], *stats[1]),
              metric_fid.fid_statistics_to_metric(*dicts, verbose=False)["frechet_inception_distance"]]
    for method in ("sqrtm", "eigh"):
        assert theirs == pytest.approx([frechet_distance(*stats[0], *stats[1], method)] * 2, rel=1e-6)


def test_kid_equals_torch_fidelitys():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity: requirements-peers.txt")
    x, y = features(150, 16), features(200, 16, seed=1, shift=0.2)
    theirs = metric_kid.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subsets=10,
                                               kid_subset_size=50, rng_seed=2020, verbose=False)
    assert kid(x, y, subsets=10, subset_size=50) == pytest.approx(
        (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]), rel=1e-9)


def mmd(x, y):
    """The unbiased MMD^2 of KID's kernel, written out."""
    k_xx, k_yy, k_xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (k_xx, k_yy)]
    return sum(within) - 2 * k_xy.mean()


def test_kid_is_the_mean_mmd_of_subsets_of_the_reference_sample():
    x, ref = features(40), reference(300, sample=40)
    assert kid(x, ref.sample, subsets=2, subset_size=40) == pytest.approx((mmd(x, ref.sample), 0), abs=1e-12)
    assert METRICS["kid"](x, ref).value == pytest.approx(mmd(x, ref.sample), rel=1e-12)


BAD = {
    "not finite": lambda mu, s: (mu, s * np.nan), "mu is not finite": lambda mu, s: (mu * np.inf, s),
    "not symmetric": lambda mu, s: (mu, s + np.triu(np.ones_like(s), 1)),
    "indefinite": lambda mu, s: (mu, s - 0.5 * np.eye(len(s))), "do not fit": lambda mu, s: (mu[:-1], s),
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_distribution_is_refused(match, side):
    good = (np.ones(16), random_cov(16))
    pair = [good, good]
    pair[side] = BAD[match](*good)
    for method in ("sqrtm", "eigh"):
        with pytest.raises(ValueError, match=match):
            frechet_distance(*pair[0], *pair[1], method)


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="cholesky"):
        frechet_distance([0], [[1]], [0], [[1]], "cholesky")
    with pytest.raises(ValueError, match="vgg"):
        feature_network("vgg")
    for size in (1, 6):
        with pytest.raises(ValueError, match=f"={size}"):
            kid(features(9), features(5), subset_size=size)


# ---- sampling errors ----

def frechet(x, ref):
    return frechet_distance(x.mean(axis=0), np.cov(x, rowvar=False, bias=True), ref.mean, ref.cov)


@pytest.mark.parametrize(("metric", "distance"), [("fd", frechet), ("kid", lambda x, ref: mmd(x, ref.sample))])
def test_influence_is_the_derivative(metric, distance):
    """(n - 1) times the fall of the distance when sample i is left out."""
    x, ref = features(700), reference(5000)
    estimate, whole = METRICS[metric](x, ref), distance(x, ref)
    pull = np.array([699 * (whole - distance(np.delete(x, i, axis=0), ref)) for i in range(0, 700, 70)])
    np.testing.assert_allclose(estimate.influence[::70], pull, rtol=0.02, atol=0.02 * estimate.influence.std())
    assert estimate.stderr == pytest.approx(np.sqrt((estimate.influence**2).sum() / 699 / 700), rel=1e-9)


@pytest.mark.filterwarnings("ignore:60 samples for 64 features")
@pytest.mark.parametrize(("n", "d"), [(100, 8), (60, 64)])
@pytest.mark.parametrize("metric", METRICS)
def test_stated_errors_match_the_spread_over_fresh_samples(n, d, metric):
    """n above and below the dimension; 60 independent sample sets against one reference."""
    ref = reference(3000, d)
    estimates = [METRICS[metric](features(n, d, seed=i), ref) for i in range(60)]
    spread = np.std([e.value for e in estimates], ddof=1)
    assert 0.7 < np.mean([e.stderr for e in estimates]) / spread < 1.4  # 60 draws know their spread to 9 %


# ---- moments ----

def test_streamed_and_merged_moments_equal_numpys():
    x = features(1000) * 5 + 1000  # far from zero, where naive sums of squares lose digits
    merged = FeatureStats(8)
    for part in np.split(x, [1, 400, 401]):
        merged.merge(FeatureStats(8).update(torch.from_numpy(part)))
    for stats in (FeatureStats(8).update(x), merged.merge(FeatureStats(8)).update(x[:0])):
        assert stats.n == 1000
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
        assert np.array_equal(stats.cov, stats.cov.T)


def test_moments_survive_the_disk(tmp_path):
    stats = FeatureStats(8, "lite0", "abc", "def").update(features(100))
    stats.sample = features(10).astype(np.float32)
    stats.save(tmp_path / "s.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder"):
        stats.save(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"s.npz", "folder"}
    loaded = FeatureStats.load(tmp_path / "s.npz")
    assert (loaded.n, loaded.features, loaded.weights_hash, loaded.data_hash) == (100, "lite0", "abc", "def")
    assert np.array_equal(loaded.mean, stats.mean) and np.array_equal(loaded.sample, stats.sample)
    both = np.concatenate([features(100), features(50, seed=1)])
    np.testing.assert_allclose(loaded.update(both[100:]).cov, np.cov(both, rowvar=False), rtol=1e-10, atol=1e-12)


def test_statistics_published_by_pytorch_fid_load_with_a_warning(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(8), sigma=np.eye(8))
    with pytest.warns(UserWarning, match="theirs.npz"):
        stats = FeatureStats.load(tmp_path / "theirs.npz")
    assert stats.n is None and np.array_equal(stats.cov, np.eye(8))
    for a, b in [(stats, FeatureStats(8)), (FeatureStats(8), stats)]:
        with pytest.raises(ValueError, match="None"):
            a.merge(b)


@pytest.mark.parametrize(("bad", "match"), [(features(5) * np.nan, "finite"), (features(5) + np.inf, "finite"),
                                            (features(5, 7), "7"), (features(5)[0], "8,")])
def test_bad_features_are_refused(bad, match):
    stats = FeatureStats(8)
    with pytest.raises(ValueError, match=match):
        stats.update(bad)
    assert stats.n == 0


def test_too_few_samples_are_refused_or_warned_of():
    with pytest.raises(ValueError, match="not 1"):
        _ = FeatureStats(8).update(features(1)).cov
    with pytest.raises(ValueError, match="9"):
        FeatureStats(8).merge(FeatureStats(9))
    with pytest.warns(UserWarning, match="7 samples for 8 features"):
        frechet_estimate(features(7), reference(100))
    with warnings.catch_warnings(action="error"):
        frechet_estimate(features(8), reference(100))


# ---- weights ----

@pytest.fixture
def release(tmp_path, monkeypatch):
    """A published weights file at a file: address. A small network stands for Inception. The cache is empty."""
    path = tmp_path / "published" / "weights.pth"
    path.parent.mkdir()
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    monkeypatch.setattr(fid, "InceptionV3", lambda: torch.nn.Linear(2, 3))
    monkeypatch.setattr(fid, "INCEPTION_URL", path.as_uri())
    monkeypatch.setattr(fid, "INCEPTION_SHA256", sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return SimpleNamespace(path=path, cache=tmp_path / "hub" / "checkpoints")


def test_weights_are_downloaded_checked_cached_and_loaded(release, tmp_path):
    expected, content = torch.load(release.path)["weight"], release.path.read_bytes()
    network = feature_network("inception")
    assert torch.equal(network.weight, expected) and network.weights_hash == sha256(content).hexdigest()
    assert [p.name for p in release.cache.iterdir()] == ["weights.pth"]
    release.path.unlink()  # the second time nothing is fetched
    assert torch.equal(feature_network("inception").weight, expected)
    (tmp_path / "mine.pth").write_bytes(content)
    (release.cache / "weights.pth").write_bytes(b"")  # a path given goes before the cache
    assert torch.equal(feature_network("inception", tmp_path / "mine.pth").weight, expected)


@pytest.mark.parametrize("fault", ["offline", "other download", "cut cache", "cut file", "no file"])
def test_weights_that_cannot_be_had(release, tmp_path, fault):
    """The message names the file and the ways out. A bad download leaves nothing behind."""
    given, named = None, release.cache / "weights.pth"
    if fault == "offline":
        release.path.unlink()
    elif fault == "other download":
        release.path.write_bytes(release.path.read_bytes() + b"?")
    elif fault == "cut cache":
        release.cache.mkdir(parents=True)
        named.write_bytes(release.path.read_bytes()[:100])
    else:
        given = named = tmp_path / "w.pth"
    if fault == "cut file":
        named.write_bytes(release.path.read_bytes()[:100])
    with pytest.raises(UserError) as error:
        feature_network("inception", given)
    for fact in (str(named), fid.INCEPTION_URL, "--weights", "eval.inception_weights=", "lite0"):
        assert fact in str(error.value)
    assert ("100 bytes" in str(error.value)) == ("cut" in fault) == named.exists()


@pytest.mark.weights
def test_published_value_on_cifar10(cifar10_root):
    """torch-fidelity's suite: CIFAR-10 train-5000 against test-5000 is 10.32333 +- 0.01."""
    path, cached = os.environ.get("FID_WEIGHTS"), os.path.basename(fid.INCEPTION_URL)
    if not path and not os.path.exists(f"{torch.hub.get_dir()}/checkpoints/{cached}"):
        pytest.skip("no FID Inception weights in torch.hub's cache; set FID_WEIGHTS to their path")
    network, stats = feature_network("inception", path), []
    for train in (True, False):
        images = load_images("cifar10", cifar10_root, train)
        chosen = np.random.RandomState(2020).choice(len(images), 5000, replace=False)
        stats.append(FeatureStats(2048).update(fid.extract(network, images[chosen])))
    a, b = stats
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov, "eigh") == pytest.approx(10.32333, abs=0.01)


# ---- lite0 ----

def test_lite0_features_and_weights(monkeypatch):
    lite0, x = feature_network("lite0"), make_shapes(4)
    f = lite0(x)
    assert f.shape == (4, 1280) and f.dtype == torch.float32 and (f >= 0).all()
    with torch.no_grad():  # the package's own classifier on the same input, from the same pooled features
        y = (torch.nn.functional.interpolate(x.float(), size=(128, 128), mode="bilinear") - 127) / 128
        torch.testing.assert_close(lite0.net(y), lite0.net._fc(f), rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu"):
        torch.testing.assert_close(lite0(x), f)
    monkeypatch.setattr(fid, "LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        feature_network("lite0")


# ---- the tables and the command ----

@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(fid.FEATURES, "inception", tiny_network)
    monkeypatch.setitem(fid.FEATURES, "mine", tiny_network)  # a network is added to one table only


def pngs(folder, images):
    (folder / "below").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "below" / f"{i:03d}.png")
    return folder


def test_the_command_on_folders_arrays_and_statistics(tiny, tmp_path, capsys):
    a, b = (make_shapes(n, split).permute(0, 2, 3, 1).numpy() for n, split in ((60, "train"), (30, "test")))
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b.transpose(0, 3, 1, 2))
    assert fid.main(["--save-stats", str(tmp_path / "b.npz"), str(tmp_path / "stats.npz")]) == 0
    (x, y), network = ([torch.from_numpy(i).permute(0, 3, 1, 2) for i in (a, b)]), tiny_network()
    stats = [FeatureStats(6).update(network(images)) for images in (x, y)]
    expected = frechet_distance(stats[0].mean, stats[0].cov, stats[1].mean, stats[1].cov)
    for first in (pngs(tmp_path / "a folder", a), tmp_path / "a.npz"):
        for second in (tmp_path / "b.npz", tmp_path / "stats.npz"):
            capsys.readouterr()
            assert fid.main([str(first), str(second), "--json", "--features", "mine"]) == 0
            assert json.loads(capsys.readouterr().out) == {
                "fd_mine": pytest.approx(expected, rel=1e-6), "n": [60, 30], "features": "mine",
                "weights_hash": network.weights_hash}
    fid.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    assert f"fid {expected:.6f}" in capsys.readouterr().out


def test_rounding_below_zero_prints_as_zero(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "frechet_distance", lambda *_, **__: -1e-13)
    np.savez(tmp_path / "a.npz", make_shapes(9).numpy())
    fid.main([str(tmp_path / "a.npz")] * 2)
    assert "fid 0.000000" in capsys.readouterr().out


def test_a_folder_gives_batches_of_one_size_in_order_of_names(tmp_path):
    images = [np.full((4 if i == 52 else 3, 5, 3), i, np.uint8) for i in range(55)]
    batches = list(fid.folder_images(pngs(tmp_path / "f", images)))
    assert [tuple(b.shape) for b in batches] == [(50, 3, 3, 5), (2, 3, 3, 5), (1, 3, 4, 5), (2, 3, 3, 5)]
    assert torch.cat([b[:, 0, 0, 0] for b in batches]).tolist() == list(range(55))


IMAGES = np.zeros((20, 32, 32, 3), np.uint8)
BAD_FILES = {  # what a file holds: bytes, or the arrays of an npz
    "nothing": b"", "text": b"no npz", "a cut zip": b"PK\3\4 cut", "floats": {"x": IMAGES / 1.0},
    "grey images": {"x": IMAGES[..., :1]}, "one image": {"x": IMAGES[:1]}, "no array": {},
    "images of no size": {"x": IMAGES[:, :0]},
    "another size": {"mu": np.zeros(3), "sigma": np.eye(3)},
    "other weights": {"mu": np.zeros(6), "sigma": np.eye(6), "weights_hash": "another", "features": "inception"},
    "indefinite": {"mu": np.zeros(6), "sigma": -np.eye(6)},
}


@pytest.mark.filterwarnings("ignore:.*unknown origin")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tiny, tmp_path, kind):
    path = tmp_path / "in.npz"
    if isinstance(BAD_FILES[kind], bytes):
        path.write_bytes(BAD_FILES[kind])
    else:
        np.savez(path, **BAD_FILES[kind])
    with pytest.raises(UserError, match="in.npz"):
        fid.main([str(path)] * 2)
