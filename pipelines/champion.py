"""The champion: the version of a registered model that an alias points to, and what another model has to beat.

`aldm evaluate --champion NAME@ALIAS` measures it beside the new model, on the same subjects, pairs and seeds;
`aldm promote` gives the alias to the new model if it is better. Better means: the mean PSNR, dB, over the test subjects
and all ordered pairs of two different modalities that both models translate, inside the store's mask (the brain, or the
foreground where no brain is marked off), is higher. Each is sampled as its own configuration says.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from aldm.words import counted
from pipelines.registry_download import HASH_TAG, Registered, fetched, find_alias
from pipelines.tracking_server import answering, connect, impatient, tracking_uri

if TYPE_CHECKING:
    from aldm.score_rows import MethodKey, ScoreRow

logger = logging.getLogger(__name__)

METHOD = "champion"
"""Its row in the scores."""
ALIAS, FORMER = "champion", "previous"
"""The alias that a champion has unless another is named, and the one that the champion before it gets."""
MASKS = ("brain", "foreground", "volume")
"""Where scores are compared: the first of these regions that the store has."""
NO_CHAMPION_DB = -1000.0
"""What is to be beaten where there is no champion: images in [0, 1] have at least 0 dB."""


@dataclass(frozen=True)
class ChampionComparison:
    """What an evaluation says of a model and of the champion."""

    psnr_db: float
    champion_psnr_db: float | None
    """None where there was no champion."""
    region: str
    volumes: int
    """Translations behind each mean."""
    model_hash: str
    champion: Registered | None

    def to_beat_db(self, min_gain_db: float) -> float:
        """Return the PSNR, dB, that the model has to be above."""
        return NO_CHAMPION_DB if self.champion_psnr_db is None else self.champion_psnr_db + min_gain_db

    def wins(self, min_gain_db: float = 0.0) -> bool:
        """Whether the model takes the champion's place."""
        return self.psnr_db > self.to_beat_db(min_gain_db)

    def verdict(self, min_gain_db: float = 0.0) -> str:
        """Return the sentence that says so."""
        where = f"inside the {self.region}" if self.region != "volume" else "over the whole volume"
        measured = f"mean PSNR {self.psnr_db:.3f} dB {where}, {counted(self.volumes, 'translation')}"
        if self.champion is None:
            return f"{measured}; there is no champion yet"
        result = "better" if self.wins(min_gain_db) else "NOT better"
        margin = f" by more than {min_gain_db:g} dB" if min_gain_db else ""
        champion = f"the champion {self.champion.address} with {self.champion_psnr_db:.3f} dB"
        return f"{measured}: {result}{margin} than {champion}"


def split_name(text: str) -> tuple[str, str]:
    """Return name and alias of NAME or NAME@ALIAS.

    Raises:
        UserError: a name that MLflow does not take.
    """
    from pipelines.registry import check_names

    name, _, alias = text.partition("@")
    check_names(name, alias or ALIAS)
    return name, alias or ALIAS


@dataclass(frozen=True)
class Champion:
    """A registered model that an evaluation measures, and the folder it was downloaded to."""

    model: Registered
    folder: Path


@contextlib.contextmanager
def measured_champion(name: str | None, out: Path) -> Iterator[Champion | None]:
    """Download the champion that an evaluation measures beside its model.

    It lies in a folder beside that of the evaluation, so that workers elsewhere see it, which goes with the block.

    Args:
        name: NAME or NAME@ALIAS of the registered model; None asks for no champion.
        out: folder of the evaluation.

    Yields:
        None where no champion is asked for, or where there is none yet.

    Raises:
        UserError: the registry does not answer, or what it holds is not what was registered.
    """
    if name is None:
        yield None
        return
    server = tracking_uri(out)
    model = find_alias(*split_name(name), server)
    if model is None:
        logger.info("%s: there is no champion yet", name)
        yield None
        return
    logger.info("the champion is %s", model.address)
    with fetched(model, out, server) as folder:
        yield Champion(model, folder)


def read_comparison(scores: Path) -> ChampionComparison:
    """Return what the folder of an `aldm evaluate` says.

    Raises:
        UserError: no such folder, or a model that gave no numbers.
    """
    from aldm.evaluation_settings import EVALUATION_FILE, SCORES_FILE
    from aldm.score_rows import read_csv, translations

    if not (scores / EVALUATION_FILE).is_file() or not (scores / SCORES_FILE).is_file():
        raise UserError(f"{scores} is no evaluation: make one with aldm evaluate --out {scores}")
    record = json.loads((scores / EVALUATION_FILE).read_text())
    rows = translations(read_csv(scores / SCORES_FILE))
    region = next((name for name in MASKS if any(row.region == name for row in rows)), "volume")
    rows = [row for row in rows if row.region == region]
    model, *others = record["models"]
    own = _psnr(rows, _key(model))
    named = record.get("champion")
    champion = None if named is None else Registered(**named)
    theirs = None
    if champion is not None:
        theirs = _psnr(rows, _key(next(other for other in others if other["method"] == METHOD)))
        places = own.keys() & theirs.keys()
        own, theirs = {key: own[key] for key in places}, {key: theirs[key] for key in places}
    if not own:
        raise UserError(f"{scores} has no translation between two modalities that both models know: nothing to compare")
    return ChampionComparison(
        psnr_db=_mean(own, scores),
        champion_psnr_db=None if theirs is None else _mean(theirs, scores),
        region=region,
        volumes=len(own),
        model_hash=model["hash"],
        champion=champion,
    )


def is_current(scores: Path, name: str, alias: str) -> bool:
    """Return whether an evaluation still says who is better: the champion is the one that it measured, or its winner.

    Raises:
        UserError: the registry does not answer.
    """
    comparison = read_comparison(scores)
    now = find_alias(name, alias, tracking_uri(scores))
    return now == comparison.champion or (now is not None and now.hash == comparison.model_hash)


def swap_back(name: str, alias: str, server: str) -> tuple[Registered, Registered]:
    """Let the champion and the one before it change places; return the new champion and the one that it was.

    Raises:
        UserError: there is no champion, or none before it.
    """
    now, former = find_alias(name, alias, server), find_alias(name, FORMER, server)
    if now is None or former is None:
        missing = alias if now is None else FORMER
        raise UserError(
            f"in the registry at {server} {name} has no version with the alias {missing}, so there is nothing to go "
            "back to there; another registry is named by MLFLOW_TRACKING_URI"
        )
    set_champion(former, alias, now, server)
    return former, now


def set_champion(model: Registered, alias: str, former: Registered | None, server: str) -> None:
    """Let the alias point to a version, and the alias `previous` to the one that had it.

    Raises:
        UserError: the server does not take it.
    """
    with answering(server), impatient():
        client = connect(server)
        if former is not None:
            client.set_registered_model_alias(model.name, FORMER, str(former.version))
        client.set_registered_model_alias(model.name, alias, str(model.version))


def find_hash(name: str, digest: str, server: str) -> Registered | None:
    """Return the newest version of a model with these weights, None where there is none.

    Raises:
        UserError: the server does not answer.
    """
    with answering(server), impatient():
        found = connect(server).search_model_versions(f"name = '{name}'")
    same = [int(version.version) for version in found if version.tags.get(HASH_TAG) == digest]
    return Registered(name, max(same), digest) if same else None


def _key(model: dict[str, Any]) -> "MethodKey":
    """Return what the scores of a model's own sampling are filed under."""
    from aldm.score_rows import MethodKey

    if model["kind"] != "aldm":
        return MethodKey(model["method"], "", 0)
    own = model["samplings"][0]
    return MethodKey(model["method"], own["sampler"], own["num_inference_steps"])


def _psnr(rows: "list[ScoreRow]", key: "MethodKey") -> dict[tuple[str, str, str], float]:
    return {(row.subject_id, row.source, row.target): row.psnr_db for row in rows if row.key == key}


def _mean(values: dict[tuple[str, str, str], float], scores: Path) -> float:
    mean = math.fsum(values.values()) / len(values)
    if not math.isfinite(mean):
        raise UserError(f"{scores}: the mean PSNR is {mean}: the model gives no usable images")
    return mean
