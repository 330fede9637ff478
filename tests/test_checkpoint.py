import pytest
import torch

from checkpoint import load_checkpoint, load_file, save_checkpoint
from errors import UserError


def save(folder, step):
    save_checkpoint(folder / "last.pt", {"step": step, "config": {}, "w": torch.full((100,), float(step))})


def test_torch_reads_it_too(tmp_path):
    save(tmp_path, 1)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("ran",)
    save_checkpoint(tmp_path / "last.pt", {"step": 1, "config": {}, "w": Payload()})
    with pytest.raises(UserError, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(tmp_path)


def test_a_damaged_last_checkpoint_does_not_replace_the_good_one_before(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last.pt").write_bytes(b"")
    save(tmp_path, 3)
    (tmp_path / "last.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_milestone_is_kept_beside_the_two(tmp_path):
    for name in ("step_000001.pt", "last.pt", "last.pt"):
        save_checkpoint(tmp_path / name, {"step": 1, "config": {}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt", "step_000001.pt"]
    assert load_file(tmp_path / "step_000001.pt")["step"] == 1
