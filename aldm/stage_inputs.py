"""What the trainings are built from: paths, named as the flags of `aldm train` are. No torch here."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from aldm.errors import UserError

WITHOUT_STARTING_MODEL = ("segmenter", "uncertainty")
"""Trainings that take no `init_from`; the configuration of an uncertainty's is that of its model, fine-tuned or not."""


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """The folders and files that one training is built from; each training needs some of them.

    Attributes:
        store: prepared volumes; every training but ms-spade and diffusion.
        latents: encoded volumes; ms-spade and diffusion.
        ms_spade: run folder of stage 2; diffusion.
        model: exported model; uncertainty.
        pretrained: run folder of resvit-cnn; resvit, unless it starts from a model.
        vit_weights: ImageNet weights of R50+ViT-B/16; resvit. None starts the transformer from random weights.
        init_from: folder of the model whose weights the training starts from; None starts from random weights.
    """

    store: Path | None = None
    latents: Path | None = None
    ms_spade: Path | None = None
    model: Path | None = None
    pretrained: Path | None = None
    vit_weights: Path | None = None
    init_from: Path | None = None

    def needed(self, name: str, stage: str) -> Path:
        """Return the path of that name.

        Raises:
            UserError: it is not given.
        """
        path: Path | None = getattr(self, name)
        if path is None:
            raise UserError(f"the training {stage} is built from `{name}`, which is not given: name its folder")
        return path

    def resolved(self) -> "StageInputs":
        """Return the same places as absolute paths, for a process with another working folder."""
        given = {field.name: path for field in fields(self) if (path := getattr(self, field.name)) is not None}
        return replace(self, **{name: path.resolve() for name, path in given.items()})
