"""Configuration: strict from and to dictionaries, and the overrides of the command line."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from aldm.config import CodecConfig, Config, SamplingConfig, from_dict, override, to_dict
from aldm.errors import UserError
from aldm.presets import PRESETS, small


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_a_configuration_survives_json_and_yaml(name: str, dump: Any) -> None:
    config = PRESETS[name]()
    assert from_dict(Config, yaml.safe_load(dump(to_dict(config)))) == config


def test_missing_keys_keep_their_defaults() -> None:
    assert from_dict(Config, {"codec": {"codebook_size": 7}}) == Config(codec=CodecConfig(codebook_size=7))


def test_a_key_of_before_is_read_as_that_of_now() -> None:
    expected = replace(Config(), train_vqgan=replace(Config().train_vqgan, edge_weight=0.5))
    assert from_dict(Config, {"train_vqgan": {"perceptual_weight": 0.5}}) == expected


def test_a_key_under_both_its_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown key train_vqgan\.perceptual_weight: known are .*edge_weight"):
        from_dict(Config, {"train_vqgan": {"perceptual_weight": 0.5, "edge_weight": 0.5}})


@pytest.mark.parametrize("steps", [1, 4])
def test_a_bridge_of_before_is_read_as_its_first_step(steps: int) -> None:
    """Whatever stood beside it: more steps and samples of a bridge are gone."""
    values = to_dict(small())
    values["diffusion"] |= {"objective": "bridge", "bridge_noise": 0.2, "bridge_start_fraction": 0.8}
    values["sampling"] = {"sampler": "bridge", "num_inference_steps": steps, "num_samples": 8, "eta": 1.0}
    assert from_dict(Config, values) == small()
    assert (small().diffusion.objective, small().sampling) == (
        "regression",
        SamplingConfig(sampler="one-step", num_inference_steps=1),
    )


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"codecs": {}}, "unknown key codecs: known are preset, modalities, pair, seed"),
        ({"codec": {"kindd": "haar"}}, r"unknown key codec\.kindd: known are codec\.kind, codec\.channels"),
        ({"codec": 3}, "codec is 3, wanted a mapping"),
        ({"codec": {"kind": "vae"}}, "codec.kind is 'vae', wanted one of: vqgan, haar-vqgan, haar"),
        ({"codec": {"channels": 8}}, r"codec\.channels is 8, wanted a list"),
        ({"codec": {"channels": [8, "a"]}}, r"codec\.channels is 'a' \(str\), wanted int"),
        ({"codec": {"channels": [8, -8]}}, r"CodecConfig\.channels is \(8, -8\), wanted a finite value above 0"),
        ({"preprocess": {"spatial_shape": [8, 8]}}, r"preprocess\.spatial_shape is \[8, 8\], wanted 3 values, got 2"),
        ({"preprocess": {"spatial_shape": [10**5] * 3}}, r"1,000,000,000,000,000 voxels, wanted at most 2,147,483,647"),
        (
            {"preprocess": {"intensity": "whole"}},
            "preprocess.intensity is 'whole', wanted one of: tissue, foreground, paper",
        ),
        ({"preprocess": {"bias_correction": "n3"}}, "preprocess.bias_correction is 'n3', wanted one of: none, n4"),
        ({"seed": 1.5}, r"seed is 1\.5 \(float\), wanted int"),
        ({"seed": True}, r"seed is True \(bool\), wanted int"),
        ({"train_unet": {"learning_rate": "fast"}}, r"learning_rate is 'fast' \(str\), wanted a finite number"),
        ({"train_unet": {"learning_rate": float("nan")}}, "learning_rate is nan .*wanted a finite number"),
        ({"train_unet": {"learning_rate": True}}, "learning_rate is True .*wanted a finite number"),
        ({"train_unet": {"adaptive_weight": "yes"}}, "adaptive_weight is 'yes' .*wanted bool"),
        ({"train_unet": {"crop": [0, 8, 8]}}, r"crop is \(0, 8, 8\), wanted a finite value above 0"),
        ({"ms_spade": {"spade_channels": []}}, r"MSSpadeConfig\.spade_channels is empty, wanted at least one value"),
        ({"ms_spade": {"kernel_size": 4}}, r"ms_spade\.kernel_size is 4, wanted an odd number"),
        ({"codec": {"quantizer": "lfq"}}, "codec.quantizer is 'lfq', wanted one of: codebook, fsq"),
        ({"codec": {"fsq_levels": [8, 1]}}, r"CodecConfig\.fsq_levels is \(8, 1\), wanted 2 to 1.04858e\+06"),
        ({"codec": {"fsq_levels": []}}, r"CodecConfig\.fsq_levels is empty, wanted at least one value"),
        ({"codec": {"fsq_levels": [1024, 1025]}}, r"fsq_levels is .*, 1,049,600 codes, wanted at most 1,048,576"),
        ({"codec": {"codebook_decay": 1.5}}, r"CodecConfig\.codebook_decay is 1\.5, wanted 0 to 1"),
        ({"sampling": {"sampler": "unipc"}}, r"sampling\.sampler is 'unipc', wanted one of: ddpm, ddim, dpm-solver"),
        ({"sampling": {"eta": -1}}, r"SamplingConfig\.eta is -1\.0, wanted 0 to 1"),
        ({"train_unet": {"same_modality_fraction": 2}}, r"same_modality_fraction is 2\.0, wanted 0 to 1"),
        ({"train_unet": {"betas": [0.9, 1.5]}}, r"betas is \(0\.9, 1\.5\), wanted 0 or more and below 1"),
        ({"train_unet": {"betas": [1.0, 1.0]}}, r"betas is \(1\.0, 1\.0\), wanted 0 or more and below 1"),
        ({"train_unet": {"warmup_steps": -1}}, r"warmup_steps is -1, wanted 0 or more"),
        ({"train_vqgan": {"discriminator_layers": 0}}, r"discriminator_layers is 0, wanted a finite value above 0"),
        ({"precision": "fp16"}, "precision is 'fp16', wanted one of: fp32, tf32, bf16"),
        ({"modalities": ["t2", "t1"]}, "wanted distinct and in the vocabulary's order"),
        ({"modalities": ["t1", "t7"]}, "unknown modality 't7': known are t1, t1ce, t2, flair, pd"),
        ({"diffusion": {"zero_terminal_snr": True}}, "zero_terminal_snr is singular for objective 'epsilon'"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Config, values)


def test_a_key_that_is_gone_is_passed_over_with_the_value_that_is_left() -> None:
    values = to_dict(small())
    values["codec"]["codebook_update"] = "ema"
    values["regression_unet"] = {"channels": [16, 32, 64], "lean": False}  # whatever it was
    assert from_dict(Config, values) == small()
    values["codec"]["codebook_update"] = "gradient"
    with pytest.raises(UserError, match="codebook_update is 'gradient', but only 'ema' is left of it: leave the"):
        from_dict(Config, values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_flag_that_is_not_finite_is_refused(value: float) -> None:
    """Flags come in by `replace`, past the conversion of a dictionary's numbers."""
    with pytest.raises(UserError, match=r"spacing_mm is .*, wanted a finite value above 0"):
        replace(small().preprocess, spacing_mm=(1.0, value, 1.0))
    with pytest.raises(UserError, match=r"max_minutes is .*, wanted a finite value above 0"):
        replace(small().train_unet, max_minutes=value)
    with pytest.raises(UserError, match=r"weight_decay is .*, wanted 0 or more"):
        replace(small().train_unet, weight_decay=value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=7", replace(small(), seed=7)),
        ("codec.channels=[8, 16]", replace(small(), codec=replace(small().codec, channels=(8, 16)))),
        ("unet.embed_source=false", replace(small(), unet=replace(small().unet, embed_source=False))),
        ("train_unet.learning_rate=1e-4", replace(small(), train_unet=replace(small().train_unet, learning_rate=1e-4))),
        ("train_unet.max_minutes=1e1", replace(small(), train_unet=replace(small().train_unet, max_minutes=10.0))),
        ("train_unet.betas=[5e-1, 1e-1]", replace(small(), train_unet=replace(small().train_unet, betas=(0.5, 0.1)))),
        ("train_unet.max_steps=null", replace(small(), train_unet=replace(small().train_unet, max_steps=None))),
        ("train_vqgan.crop=null", replace(small(), train_vqgan=replace(small().train_vqgan, crop=None))),
        ("modalities=[t1, t2]", replace(small(), modalities=("t1", "t2"))),
        (
            "train_vqgan.perceptual_weight=0.5",
            replace(small(), train_vqgan=replace(small().train_vqgan, edge_weight=0.5)),
        ),
        ("codec.codebook_update=ema", small()),
        ("diffusion.objective=bridge", small()),
        ("diffusion.bridge_noise=0.3", small()),
        ("sampling.sampler=bridge", small()),
    ],
)
def test_an_override_is_a_replace(assignment: str, expected: Config) -> None:
    assert override(small(), [assignment]) == expected


def test_overrides_are_checked_together_and_the_last_one_wins() -> None:
    config = override(small(), ["train_diffusion.image_space_loss=false", "codec.kind=vqgan", "seed=1", "seed=2"])
    assert (config.codec.kind, config.train_diffusion.image_space_loss, config.seed) == ("vqgan", False, 2)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "is not of the form key.path=value"),
        ("sed=1", "unknown key 'sed'; known there are preset, modalities, pair, seed"),
        ("codec.kindd=haar", r"unknown key 'codec\.kindd'; known there are kind, channels"),
        ("codex.kind=haar", r"unknown key 'codex\.kind'; top-level keys are preset"),
        ("codec.kind.x=haar", r"unknown key 'codec\.kind\.x'"),
        ("seed=[1", "is not YAML"),
        ("seed=many", r"seed is 'many' \(str\), wanted int"),
        ("codec.codebook_update=gradient", "only 'ema' is left of it: leave the key out"),
        ("codec={kind: haar}", None),
    ],
)
def test_a_bad_override_is_explained(assignment: str, message: str | None) -> None:
    if message is None:
        assert override(Config(), [assignment]).codec == CodecConfig(kind="haar")
        return
    with pytest.raises(UserError, match=message):
        override(small(), [assignment])
