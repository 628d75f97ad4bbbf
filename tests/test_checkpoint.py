"""Checkpoints: what is written is read back, and nothing else is accepted."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from aldm.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    load_checkpoint,
    load_weights,
    read_checkpoint_record,
    save_checkpoint,
    weights_hash,
)
from aldm.errors import UserError
from aldm.presets import tiny


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Conv3d(2, 1, 1))


def saved(folder: Path, kind: str = "unet") -> Path:
    save_checkpoint(folder, kind=kind, config=tiny(), weights=network().state_dict(), meta={"modalities": ["t1", "t2"]})
    return folder


def change(folder: Path, **values: object) -> None:
    record = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(record | values))


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "c"), "unet", "codec")
    assert checkpoint.kind == "unet"
    assert checkpoint.config == tiny()
    assert checkpoint.meta == {"modalities": ["t1", "t2"]}
    wanted = network().state_dict()
    assert checkpoint.weights.keys() == wanted.keys()
    assert all(torch.equal(checkpoint.weights[name], tensor) for name, tensor in wanted.items())
    assert checkpoint.hash == weights_hash(wanted)


def test_weights_that_share_memory_are_written(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    save_checkpoint(
        tmp_path / "c",
        kind="k",
        config=tiny(),
        weights={"a": layer.weight, "b": layer.weight, "c": layer.weight.t()},
        meta={},
    )
    weights = load_checkpoint(tmp_path / "c").weights
    assert torch.equal(weights["a"], weights["b"])
    assert torch.equal(weights["c"], weights["a"].t())


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 3.0])},
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([[1.0], [2.0]])},
        {"a": torch.tensor([1.0, 2.0]).double()},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(1)},
    ],
)
def test_the_hash_depends_on_values_names_shapes_and_types(other: dict[str, torch.Tensor]) -> None:
    assert weights_hash({"a": torch.tensor([1.0, 2.0])}) != weights_hash(other)


def test_the_hash_does_not_depend_on_order_or_layout() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.zeros(2)
    assert weights_hash({"a": a, "b": b}) == weights_hash({"b": b, "a": a.t().contiguous().t()})


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    change(saved(tmp_path / "c"), format_version=FORMAT_VERSION + 1)
    with pytest.raises(UserError, match=f"format version {FORMAT_VERSION + 1}, wanted {FORMAT_VERSION}"):
        load_checkpoint(tmp_path / "c")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind 'unet', wanted 'codec'"):
        load_checkpoint(saved(tmp_path / "c"), "codec")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is damaged, it is not JSON"),
        ("[]", "is damaged, it holds no JSON object"),
        ("{}", "format version None"),
        ('{"format_version": 2}', "it lacks kind; it lacks hash; it lacks config; it lacks meta; write the checkpoint"),
        (
            '{"format_version": 2, "kind": 3, "hash": "", "config": {}, "meta": []}',
            r"kind is 3, wanted text; meta is \[\]",
        ),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (saved(tmp_path / "c") / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        read_checkpoint_record(tmp_path / "c")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "c") / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "reader"), [(CONFIG, "pathlib.Path.read_text"), (WEIGHTS, "aldm.checkpoint.load_file")]
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reader: str
) -> None:
    saved(tmp_path / "c")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reader, refuse)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied"):
        load_checkpoint(tmp_path / "c")


def test_what_a_reader_needs_of_the_meta_is_named(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path / "c"))
    checkpoint.check_meta({"modalities": list})
    with pytest.raises(
        UserError, match=r"meta of .*config\.json is damaged: it lacks latents\.mean; modalities is \['t1"
    ):
        checkpoint.check_meta({"latents.mean": list, "modalities": dict})


def test_the_weights_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    change(saved(tmp_path / "c"), hash="0" * 64)
    with pytest.raises(UserError, match="hashes differ"):
        load_checkpoint(tmp_path / "c")


def test_an_unknown_configuration_key_is_refused(tmp_path: Path) -> None:
    record = json.loads((saved(tmp_path / "c") / CONFIG).read_text())
    change(tmp_path / "c", config=record["config"] | {"colour": "blue"})
    with pytest.raises(UserError, match=r"c/config\.json: unknown key colour: .*; change it there, or train"):
        load_checkpoint(tmp_path / "c")


def test_an_existing_checkpoint_needs_overwrite(tmp_path: Path) -> None:
    before = (saved(tmp_path / "c") / CONFIG).read_bytes()
    with pytest.raises(UserError, match="`overwrite`"):
        saved(tmp_path / "c", kind="other")
    assert (tmp_path / "c" / CONFIG).read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "c", kind="k", config=tiny(), weights={}, meta={"not JSON": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("0.bias"), "missing 0.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda weights: weights.update({"0.bias": torch.zeros(3)}), r"0.bias is \(3,\), wanted \(2,\)"),
    ],
)
def test_weights_load_strictly(edit: object, message: str) -> None:
    weights = dict(network().state_dict())
    edit(weights)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_weights(network(), weights, "somewhere")
