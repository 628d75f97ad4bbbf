"""The comparison methods of the presets that train on a CPU."""

from dataclasses import replace
from typing import Any

from aldm.config_baselines import BaselinesConfig
from aldm.config_training import TrainingConfig


def small_baselines() -> BaselinesConfig:
    """The comparison methods at an eighth to a quarter of their width, with fewer layers, in batches for a CPU."""

    def training(base: TrainingConfig, batch_size: int) -> TrainingConfig:
        return replace(base, batch_size=batch_size, max_steps=3000, validate_every=200, checkpoint_every=200)

    base = BaselinesConfig()
    narrow: dict[str, Any] = {"channels": 16, "discriminator_channels": 16}
    pix2pix, pix2pix_3d, cyclegan, cyclegan_3d = base.pix2pix, base.pix2pix_3d, base.cyclegan, base.cyclegan_3d
    return replace(
        base,
        slice_shape=(64, 80),
        pix2pix=replace(pix2pix, **narrow, num_levels=5, training=training(pix2pix.training, 8)),
        pix2pix_3d=replace(pix2pix_3d, **narrow, num_levels=4, training=training(pix2pix_3d.training, 1)),
        cyclegan=replace(cyclegan, **narrow, num_blocks=6, training=training(cyclegan.training, 4)),
        cyclegan_3d=replace(
            cyclegan_3d, channels=8, num_blocks=6, discriminator_channels=8, training=training(cyclegan_3d.training, 1)
        ),
        nicegan=replace(base.nicegan, **narrow, num_blocks=4, training=training(base.nicegan.training, 4)),
        reggan=replace(
            base.reggan,
            **narrow,
            num_blocks=6,
            registration_channels=16,
            registration_levels=4,
            training=training(base.reggan.training, 8),
        ),
        resvit=replace(
            base.resvit,
            **narrow,
            num_blocks=6,
            hidden_channels=96,
            num_layers=4,
            num_heads=4,
            mlp_channels=384,
            pretraining=training(base.resvit.pretraining, 8),
            training=training(base.resvit.training, 8),
        ),
        dea_gan=replace(base.dea_gan, **narrow, num_levels=4, training=training(base.dea_gan.training, 1)),
        gea_gan=replace(base.gea_gan, **narrow, num_levels=4, training=training(base.gea_gan.training, 1)),
    )


def tiny_baselines(base: BaselinesConfig, quick: dict[str, Any]) -> BaselinesConfig:
    """The comparison methods at widths at which nothing is learnt."""
    narrow: dict[str, Any] = {"channels": 4, "discriminator_channels": 4}

    def small(method: Any, **values: Any) -> Any:
        batch_size = min(method.training.batch_size, 2)
        training = replace(method.training, **quick, batch_size=batch_size)
        return replace(method, **narrow, **values, training=training)

    return replace(
        base,
        slice_shape=(16, 32),
        pix2pix=small(base.pix2pix, num_levels=3),
        pix2pix_3d=small(base.pix2pix_3d, num_levels=3),
        cyclegan=small(base.cyclegan, num_blocks=1, pool_size=2),
        cyclegan_3d=small(base.cyclegan_3d, num_blocks=1, pool_size=2),
        nicegan=small(base.nicegan, num_blocks=1),
        reggan=small(base.reggan, num_blocks=1, registration_channels=4, registration_levels=2),
        resvit=small(
            base.resvit,
            hidden_channels=8,
            num_layers=1,
            num_heads=2,
            mlp_channels=16,
            pretraining=replace(base.resvit.pretraining, **quick, batch_size=2),
        ),
        dea_gan=small(base.dea_gan, num_levels=3),
        gea_gan=small(base.gea_gan, num_levels=3),
    )
