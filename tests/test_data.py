import io
import shutil

import numpy as np
import pytest
import torch
from conftest import SHAPES
from PIL import Image

import data
from data import batch_indices, grid_png, load_images, make_shapes, to_model_range, to_uint8
from errors import UserError


def test_pixels_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    y = to_model_range(x)
    assert y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert torch.equal(to_uint8(y), x)
    assert torch.equal(to_uint8(y + 0.4 / 127.5), x)  # rounds, not truncates
    assert torch.equal(to_uint8(y - 0.4 / 127.5), x)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# ---- batches ----

@pytest.mark.parametrize("n, batch_size", [(100, 4), (10, 4), (3, 7), (5, 5), (7, 1)])
def test_batches_cover_each_epoch_without_repetition(n, batch_size):
    steps = 6 * n // batch_size + 1
    stream = torch.cat([batch_indices(1077, step, batch_size, n) for step in range(steps)])
    assert stream.dtype == torch.int64 and len(stream) == steps * batch_size
    epochs = stream[:len(stream) // n * n].reshape(-1, n)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(n).expand_as(epochs))
    if n > 5:
        assert not torch.equal(epochs[0], epochs[1])


def test_batches_are_a_pure_function():
    calls = [(1, 3, 4, 10), (1, 9, 4, 10), (2, 3, 4, 10), (1, 3, 4, 12)]
    first = [batch_indices(*call) for call in calls]
    data._permutation.cache_clear()
    again = [batch_indices(*call) for call in reversed(calls)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[2])


# ---- shapes ----

def test_shapes():
    x = make_shapes(600)
    assert x.shape == (600, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.equal(x[:100], make_shapes(100))  # a longer set begins with the shorter one
    assert len(torch.unique(x.flatten(1), dim=0)) == 600
    assert make_shapes(0).shape == (0, 3, 32, 32)


def test_train_and_test_shapes_share_no_image(monkeypatch):
    for name, n in zip(("SHAPES_TRAIN", "SHAPES_TEST"), SHAPES, strict=True):
        monkeypatch.setattr(data, name, n)
    train, test = load_images("shapes", "nowhere"), load_images("shapes", "nowhere", train=False)
    assert (len(train), len(test)) == (2048, 1024)
    assert len(torch.unique(torch.cat([train, test]).flatten(1), dim=0)) == 2048 + 1024


def test_shapes_have_structure():
    """Neighbouring pixels agree, images differ, all three channels are used: nothing like noise or one colour."""
    x = to_model_range(make_shapes(512))
    steps = (x[..., 1:] - x[..., :-1]).abs()
    assert steps.mean() < 0.05 < steps.amax(dim=(1, 2, 3)).median()  # smooth, with edges
    assert x.mean(dim=(2, 3)).std(dim=0).min() > 0.15 and x.std(dim=(1, 2, 3)).median() > 0.2


# ---- CIFAR-10 ----

def test_unknown_set():
    with pytest.raises(ValueError, match="cifar100"):
        load_images("cifar100", "nowhere")


def test_cifar10_is_byte_exact(cifar10_root):
    train, test = load_images("cifar10", cifar10_root), load_images("cifar10", cifar10_root, train=False)
    assert train.shape == (50_000, 3, 32, 32) and test.shape == (10_000, 3, 32, 32) and train.dtype == torch.uint8
    means = train.double().mean((0, 2, 3)).tolist()
    assert means == pytest.approx([125.306918046875, 122.950394140625, 113.86538318359375], abs=1e-9)


@pytest.mark.parametrize("damage", ["missing", "zeros", "a bit", "a folder"])
def test_a_damaged_cifar10_is_refused_by_file_name(cifar10_root, tmp_path, damage):
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(cifar10_root / "cifar-10-batches-py", folder)
    folder.chmod(0o755)
    batch = folder / "data_batch_3"
    batch.chmod(0o644)
    content = bytearray(batch.read_bytes())
    content[1000] ^= 1
    batch.unlink()
    if damage == "a folder":
        batch.mkdir()
    elif damage != "missing":
        batch.write_bytes(content if damage == "a bit" else bytes(100))
    with pytest.raises(UserError, match="data_batch_3"):
        load_images("cifar10", tmp_path)
    with pytest.raises(UserError, match="data_batch_1"):  # the folder of batches itself: no reason to download
        load_images("cifar10", folder)


# ---- grids ----

def test_grid():
    x = make_shapes(5)
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(grid_png(x)))))
    assert image.shape == (2 * (2 * 33 + 1), 2 * (3 * 33 + 1), 3)  # 5 images: 3 columns, 2 rows
    for i, (top, left) in enumerate([(2, 2), (2, 68), (2, 134), (68, 2), (68, 68)]):
        tile = image[top:top + 64, left:left + 64].permute(2, 0, 1)
        assert torch.equal(tile[:, ::2, ::2], x[i]) and torch.equal(tile[:, 1::2, 1::2], x[i])
    assert not image[:2].any() and not image[68:132, 134:].any()
