"""The networks: codecs, MS-SPADE, discriminators and the denoising UNet."""
