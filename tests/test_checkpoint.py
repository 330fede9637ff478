import pytest
import torch

from checkpoint import CheckpointError, append_jsonl, filter_jsonl, load_checkpoint, read_jsonl, save_checkpoint


def save(folder, step):
    save_checkpoint(folder, {"step": step, "w": torch.full((100,), float(step))})


def test_round_trip_keeps_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "c", step)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["last.pt", "previous.pt"]
    state = load_checkpoint(tmp_path / "c")
    assert state["step"] == 3 and torch.equal(state["w"], torch.full((100,), 3.0))


def test_torch_reads_it_too(tmp_path):
    save(tmp_path, 1)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:100], lambda content: b"",
    lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
])
def test_a_damaged_file_is_passed_over_loudly(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    said = []
    assert load_checkpoint(tmp_path, warn=said.append)["step"] == 1
    assert len(said) == 1 and "last.pt" in said[0] and "step 1" in said[0]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    said = []
    assert load_checkpoint(tmp_path, warn=said.append)["step"] == 1 and "missing" in said[0]


def test_both_damaged_is_an_error_that_names_both(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match=r"last\.pt.*previous\.pt"):
        load_checkpoint(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("ran",)
    save_checkpoint(tmp_path, {"step": 1, "w": Payload()})
    with pytest.raises(CheckpointError, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(tmp_path)


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    filter_jsonl(path, lambda record: True)
    assert not path.exists()
    for step in (1, 2, 3):
        append_jsonl(path, {"step": step, "x": 0.1})
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 3):  # a crash at any byte of the last line
        path.write_bytes(whole[:-cut])
        assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    path.write_bytes(whole)
    filter_jsonl(path, lambda record: record["step"] <= 2)
    append_jsonl(path, {"step": 3, "x": 0.1})
    assert path.read_bytes() == whole  # rewriting is byte-exact
    for cut in range(1, len(whole) // 3):  # what is appended takes the place of a cut line
        path.write_bytes(whole[:-cut])
        append_jsonl(path, {"step": 3, "x": 0.1})
        assert path.read_bytes() == whole
    path.write_bytes(b'{"st')
    append_jsonl(path, {"step": 1, "x": 0.1})
    assert path.read_bytes() == whole[:len(whole) // 3]
    path.write_bytes(whole)
    with pytest.raises(ValueError):
        append_jsonl(path, {"x": float("nan")})
    assert path.read_bytes() == whole
