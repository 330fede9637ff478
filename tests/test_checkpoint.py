import pytest
import torch

from checkpoint import load_checkpoint, load_file, lock, save_checkpoint
from errors import UserError


def save(folder, step):
    save_checkpoint(folder / "last.pt", {"step": step, "config": {}, "w": torch.full((100,), float(step))})


def test_round_trip_keeps_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "c", step)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["last.pt", "previous.pt"]
    state = load_checkpoint(tmp_path / "c")
    assert state["step"] == 3 and torch.equal(state["w"], torch.full((100,), 3.0))


def test_torch_reads_it_too(tmp_path):
    save(tmp_path, 1)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path, capsys):
    save(tmp_path, 1)
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path)["step"] == 1 and "last.pt" in capsys.readouterr().err


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


@pytest.mark.parametrize("content", [{"step": 1}, {"config": {}}, {"step": "1", "config": {}}, [1]])
def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path, content):
    save_checkpoint(tmp_path / "last.pt", content)
    with pytest.raises(UserError, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(tmp_path)


def test_one_lock_per_folder(tmp_path):
    with lock(tmp_path / "a"), lock(tmp_path / "b"), pytest.raises(UserError, match="in use by process"), lock(
            tmp_path / "a"):
        pass
    with lock(tmp_path / "a"):
        pass
