"""The named presets: the tables of the paper's supplement, and files that start from a preset."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from aldm.config import Config, to_dict
from aldm.errors import UserError
from aldm.presets import PRESETS, brats, brats_haar, ixi, load_preset, released, small, tiny


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_name_and_says_its_name(name: str) -> None:
    assert load_preset(name) == PRESETS[name]()
    assert load_preset(name).preset == name


@pytest.mark.parametrize("preset", [brats, ixi])
def test_table_a_of_the_supplement(preset: object) -> None:
    config = preset()  # type: ignore[operator]
    codec = config.codec
    assert (codec.kind, codec.channels, codec.codebook_size, codec.embedding_dim) == ("vqgan", (256, 512, 512), 8192, 3)
    assert (config.train_vqgan.batch_size, config.train_vqgan.epochs) == (1, 500)


@pytest.mark.parametrize("preset", [brats, ixi, released])
def test_table_b_of_the_supplement(preset: object) -> None:
    ms_spade = preset().ms_spade  # type: ignore[operator]
    assert (ms_spade.in_channels, ms_spade.res_channels) == (128, (256, 256))
    assert (ms_spade.spade_channels, ms_spade.kernel_size) == ((256, 256, 256, 128), 7)
    assert not ms_spade.source_skip


@pytest.mark.parametrize("preset", [brats, ixi])
def test_table_c_of_the_supplement(preset: object) -> None:
    config = preset()  # type: ignore[operator]
    diffusion = config.diffusion
    assert config.unet.channels == (128, 256, 512)
    assert (diffusion.objective, diffusion.schedule, diffusion.num_train_timesteps) == (
        "epsilon",
        "scaled-linear",
        1000,
    )
    assert (diffusion.beta_start, diffusion.beta_end) == (0.0015, 0.0195)
    assert (config.train_diffusion.batch_size, config.train_diffusion.epochs) == (1, 800)
    assert config.train_diffusion.ema_decay > 0


def test_the_grids_of_the_two_data_sets() -> None:
    assert brats().preprocess.spatial_shape == (192, 192, 144)
    assert ixi().preprocess.spatial_shape == (160, 256, 224)
    assert brats().modalities == ("t1", "t1ce", "t2", "flair")
    assert ixi().modalities == ("t1", "t2", "pd")


@pytest.mark.parametrize("preset", [brats, ixi, released])
def test_the_adversarial_and_codebook_terms_are_on(preset: object) -> None:
    """The authors' public configuration sets both to zero; no preset inherits that."""
    config = preset()  # type: ignore[operator]
    assert config.train_vqgan.adversarial_weight > 0
    assert config.train_ms_spade.adversarial_weight > 0
    assert config.codec.commitment_weight > 0


@pytest.mark.parametrize("name", PRESETS)
def test_latents_fit_every_grid(name: str) -> None:
    """Codec and U-Net halve the grid again and again; every size on the way is whole."""
    config = PRESETS[name]()
    halvings = config.codec.haar_levels if config.codec.kind == "haar" else len(config.codec.channels) - 1
    for size in (*config.preprocess.spatial_shape, *(config.train_vqgan.crop or ())):
        assert size % 2**halvings == 0
    for unet in (config.unet, config.haar_unet):
        assert [width for width in unet.channels if width % unet.norm_groups] == []


def test_the_haar_preset_has_the_papers_volumes_and_no_finer_attention() -> None:
    ours, papers = brats_haar(), brats()
    assert (ours.preprocess, ours.modalities) == (papers.preprocess, papers.modalities)
    assert ours.unet.attention_levels == (len(ours.unet.channels) - 1,)
    halvings = [
        ours.codec.haar_levels + len(ours.unet.channels),
        len(papers.codec.channels) + len(papers.unet.channels) - 1,
    ]
    assert halvings[0] == halvings[1]


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_file_starts_from_the_preset_that_it_names(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    values = {"preset": "small", "seed": 3, "codec": {"haar_levels": 2}}
    path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values))
    expected = replace(small(), seed=3, codec=replace(small().codec, haar_levels=2))
    assert load_preset(str(path)) == expected


def test_a_resolved_configuration_is_a_preset_file(tmp_path: Path) -> None:
    """config.yaml of a run folder starts the same run again."""
    config = replace(tiny(), seed=5, activation_checkpointing=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_preset(str(tmp_path / "config.yaml")) == config


def test_a_file_of_before_may_have_a_key_of_then(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("preset: small\ntrain_vqgan: {perceptual_weight: 0.5}\n")
    expected = replace(small(), train_vqgan=replace(small().train_vqgan, edge_weight=0.5))
    assert load_preset(str(tmp_path / "a.yaml")) == expected


def test_a_file_without_a_preset_starts_from_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 3\ntrain_unet: {learning_rate: 1e-4}\n")
    config = load_preset(str(tmp_path / "a.yaml"))
    assert config == replace(Config(), seed=3, train_unet=replace(Config().train_unet, learning_rate=1e-4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("seed: 2026-13-01", "is not YAML"),
        ("- 1\n", "holds list, wanted a mapping"),
        ("", "holds NoneType, wanted a mapping"),
        ("codec: {kindd: haar}", r"unknown key codec\.kindd"),
        ("codec: 3", "codec is 3, wanted a mapping"),
        ("preset: [1]", r"preset is \[1\] \(list\), wanted str"),
        ("1: 2", "unknown key 1: known are preset"),
        ("codec: {null: 1, 2026-01-01: 2}", r"unknown key codec\.2026-01-01, codec\.None: known are codec\.kind"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml.*{message}"):
        load_preset(str(tmp_path / "a.yaml"))


def test_a_file_that_cannot_be_read_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("preset: small # größer".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.yaml cannot be read as text in UTF-8: .*invalid start byte"):
        load_preset(str(path))

    def refuse(*arguments: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"cannot be read .*Permission denied"):
        load_preset(str(path))


@pytest.mark.parametrize("name", ["smal", "missing.yaml", "/", ""])
def test_an_unknown_preset_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        UserError, match=r"wanted one of tiny, small, brats, ixi, released, brats-haar, or an existing \.yaml file"
    ):
        load_preset(name)
