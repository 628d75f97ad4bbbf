"""The jobs of the manifests, run again as KubeRay and `kubectl apply` do: with what the start before has left."""

from pathlib import Path

import pytest
from kubernetes_objects import one

from aldm.checkpoint import read_checkpoint_record
from aldm.cli import main
from pipelines.kubernetes_commands import words_of
from pipelines.registry_download import find_alias
from pipelines.tracking_server import connect

CHAIN = ("prepare", "train-vqgan", "encode", "train-ms-spade", "train-diffusion", "export", "evaluate", "promote")
QUICK = {
    "train": ["--max-steps", "1", "--engine", "plain"],
    "evaluate": ["--max-subjects", "1", "--source", "t1", "--target", "t2"],
}
"""What is said beside the manifest's words; that jobs do on Ray what they do here has tests of its own."""


def words_here(job: str, shared: Path, dataset: Path) -> list[str]:
    """The command of a job of the overlay dev, on folders of this machine and without a cluster."""
    _, *words = words_of(one("dev", "RayJob", f"aldm-{job}"))
    for flag in {"--num-workers", "--max-failures"} & set(words):
        place = words.index(flag)
        del words[place : place + 2]
    words = [str(dataset) if word == "/shared/dataset" else word.replace("/shared", str(shared), 1) for word in words]
    return [*words, *QUICK.get(words[0], [])]


@pytest.mark.slow
def test_the_whole_chain_runs_twice(brats_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same results: one registered version, which is the champion that the second evaluation measures too."""
    server = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    shared = tmp_path / "shared"
    (shared / "runs").mkdir(parents=True)  # the head's init container makes it
    hashes = []
    for _ in range(2):
        for job in CHAIN:
            assert main(words_here(job, shared, brats_tree)) == 0, job
        hashes.append(read_checkpoint_record(shared / "runs" / "model")["hash"])
    assert hashes[0] == hashes[1]
    champion = find_alias("translator", "champion", server)
    assert champion is not None
    assert (champion.version, champion.hash) == (1, hashes[0])
    assert len(connect(server).search_model_versions("name = 'translator'")) == 1
    assert "champion" in (shared / "runs" / "scores" / "scores.csv").read_text()
    assert {path.name for path in shared.iterdir()} == {"store", "latents", "runs"}
