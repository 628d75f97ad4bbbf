"""A registered model on its way into a service: hash, smoke test, the RayService patched, watched and put back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_kubernetes import FakeKubernetes
from safetensors.torch import load_file, save_file
from untrained import save_untrained

from aldm.checkpoint import load_checkpoint, save_checkpoint
from aldm.errors import UserError
from aldm.smoke_test import smoke_test
from pipelines import kubernetes_roll
from pipelines.kubernetes_service import RayService
from pipelines.registry import register
from pipelines.registry_download import fetch, find_alias, is_version, resolve
from pipelines.serve_config import DEPLOY, model_of, with_model
from pipelines.tracking_server import connect
from serve.models import find_model

CONFIG = DEPLOY.read_text()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry: translator 1 works (alias champion), 2 has NaN weights, 3 is 1 with a wrong hash."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    register(save_untrained(folder / "good"), "translator", "champion", uri)
    good = load_checkpoint(folder / "good")
    broken = {
        name: weight * float("nan") if weight.is_floating_point() else weight for name, weight in good.weights.items()
    }
    save_checkpoint(folder / "nan", kind=good.kind, config=good.config, weights=broken, meta=good.meta)
    register(folder / "nan", "translator", None, uri)
    register(folder / "good", "translator", None, uri)
    connect(uri).set_model_version_tag("translator", "3", "hash", "0" * 64)
    return folder


@pytest.fixture(autouse=True)
def server(registry: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{registry}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def with_served(model: str | None) -> str:
    return with_model(CONFIG, model, "aldm")


def roll(*words: object) -> int:
    return kubernetes_roll.main([*map(str, words), "--log-level", "warning"])


def test_an_alias_is_resolved_to_a_version_and_what_is_none_is_refused(server: str) -> None:
    assert resolve("models:/translator@champion", server).address == "models:/translator/1"
    assert find_alias("translator", "nobody", server) is None
    assert find_alias("nothing", "champion", server) is None
    for address in ("translator", "models:/translator", "models:/translator/latest", "models:/m-0123", "models:/a@b@c"):
        with pytest.raises(UserError, match="wanted models:/NAME/VERSION"):
            resolve(address, server)
    with pytest.raises(UserError, match="has no models:/translator/99: register it there"):
        resolve("models:/translator/99", server)
    assert is_version("models:/translator/7")
    assert not any(map(is_version, ("models:/translator@champion", "models:/translator", "runs/model", "")))


def test_weights_that_are_not_those_registered_are_refused(server: str, tmp_path: Path, monkeypatch) -> None:
    """By the roll, and by a service that is started with them."""
    with pytest.raises(UserError, match="models:/translator/3 is not what was registered"):
        roll("--model", "models:/translator/3", "--out", tmp_path / "serve.yaml")
    with pytest.raises(UserError, match="it is not used"):
        find_model("models:/translator/3", tmp_path / "work")
    assert not (tmp_path / "serve.yaml").exists()
    assert list((tmp_path / "work" / "models").iterdir()) == []


def test_a_download_that_was_changed_is_made_again(server: str, tmp_path: Path) -> None:
    """Even where its config.json was changed to fit: the registry's hash counts."""
    model = resolve("models:/translator/1", server)
    folder = fetch(model, tmp_path, server)
    before = (folder / "weights.safetensors").read_bytes()
    assert fetch(model, tmp_path, server) == folder
    weights = load_file(folder / "weights.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "weights.safetensors")
    good = load_checkpoint(find_model(None, tmp_path).folder)  # anything with a config.json of its own
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"hash": good.hash}))
    assert fetch(model, tmp_path, server) == folder
    assert (folder / "weights.safetensors").read_bytes() == before


def test_the_smoke_test_wants_a_finite_volume_on_the_grid(registry: Path, monkeypatch) -> None:
    assert "finite" in smoke_test(registry / "good")
    with pytest.raises(UserError):
        smoke_test(registry / "nan")
    from aldm.translate import Translator

    translate = Translator.translate

    def moved(self, *args, **options):
        result = translate(self, *args, **options)
        shift = np.zeros((4, 4))
        shift[0, 3] = 1
        return replace(result, volume=replace(result.volume, affine=result.volume.affine + shift))

    monkeypatch.setattr(Translator, "translate", moved)
    with pytest.raises(UserError, match="not on the grid"):
        smoke_test(registry / "good")


def test_a_configuration_is_written_with_the_version_and_all_else_as_it_was(tmp_path: Path, capsys) -> None:
    out = tmp_path / "serve.yaml"
    assert roll("--model", "models:/translator@champion", "--out", out, "--dry-run") == 0
    assert not out.exists()
    assert roll("--model", "models:/translator@champion", "--out", out) == 0
    wanted = yaml.safe_load(CONFIG)
    wanted["applications"][0]["args"]["model"] = "models:/translator/1"
    assert yaml.safe_load(out.read_text()) == wanted
    service = {"kind": "RayService", "metadata": {"name": "x"}, "spec": {"serveConfigV2": CONFIG, "other": 1}}
    manifest = yaml.safe_dump_all([{"kind": "Secret"}, service])
    (tmp_path / "all.yaml").write_text(manifest)
    assert roll("--model", "models:/translator/1", "--out", out, "--manifest", tmp_path / "all.yaml") == 0
    secret, made = yaml.safe_load_all(out.read_text())
    assert secret == {"kind": "Secret"}
    assert yaml.safe_load(made["spec"].pop("serveConfigV2")) == wanted
    assert made == {"kind": "RayService", "metadata": {"name": "x"}, "spec": {"other": 1}}
    for text in ("a: 1", "- 1", "kind: RayService", "applications: 3"):
        with pytest.raises(UserError, match="neither the manifest"):
            model_of(text, "aldm")
    with pytest.raises(UserError, match="no application 'other', only aldm"):
        model_of(CONFIG, "other")


@pytest.fixture
def applied(tmp_path: Path, monkeypatch):
    """Return what rolls a model to a fake cluster's service."""

    def run(fake: FakeKubernetes, model: str, *words: object) -> int:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        return roll("--model", model, "--apply", "--poll-seconds", 0.01, "--timeout-minutes", 0.05, *words)

    return run


def test_a_model_that_works_is_given_to_the_service(applied, capsys) -> None:
    with FakeKubernetes(with_served("models:/translator/0"), lambda model: ("RUNNING", "")) as fake:
        assert applied(fake, "models:/translator@champion", "--dry-run") == 0
        assert fake.patches == []
        assert applied(fake, "models:/translator@champion") == 0
        (patch,) = fake.patches
        assert fake.managers == {"aldm-k8s-roll"}  # docs/cluster.md has what kubectl says of it
        assert patch["metadata"]["annotations"] == {"aldm/previous-model": "models:/translator/0"}
        assert yaml.safe_load(patch["spec"]["serveConfigV2"]) == yaml.safe_load(with_served("models:/translator/1"))
        assert fake.service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
        assert "aldm k8s roll --model models:/translator/0" in capsys.readouterr().out
        assert applied(fake, "models:/translator/1") == 0
        assert "already" in capsys.readouterr().out
        assert len(fake.patches) == 1


def fails(*models: str):
    """What becomes of an application: these models fail."""
    return lambda model: ("DEPLOY_FAILED", "no\nmemory") if model in models else ("RUNNING", "")


@pytest.mark.parametrize("before", ["models:/translator/0", None])
@pytest.mark.parametrize("note", ["models:/translator/9", None])
def test_a_model_that_fails_in_the_service_is_taken_back(applied, before: str | None, note: str | None) -> None:
    with FakeKubernetes(with_served(before), fails("models:/translator/1")) as fake:
        fake.service["metadata"]["annotations"] = {"aldm/previous-model": note} if note else {}
        with pytest.raises(
            UserError, match=r"models:/translator/1 does not run: .*DEPLOY_FAILED no memory.* was put back"
        ):
            applied(fake, "models:/translator/1")
        assert fake.model == before
        assert fake.service["spec"]["serveConfigV2"] == with_served(before)
        assert fake.note == note
        assert len(fake.patches) == 2


def test_taking_a_model_back_keeps_what_others_have_changed_meanwhile(applied) -> None:
    """One change is made while the roll waits, another between the reading and the changing of the put-back."""
    with FakeKubernetes(with_served("models:/translator/0"), fails("models:/translator/1")) as fake:
        taken = fake.patch
        changes = [{"max_queue": 5}, {"keep_hours": 2}]

        def patch(kind, body):
            answer = taken(kind, body)
            if len(fake.patches) == 1 and answer[0] == 200:
                fake.edit(lambda args: args.update(changes.pop(0)))
            return answer

        fake.patch = patch
        fake.before_patch = lambda n: (
            fake.edit(lambda args: args.update(changes.pop(0))) if n == 1 and changes else None
        )
        with pytest.raises(UserError, match="models:/translator/0 was put back and runs"):
            applied(fake, "models:/translator/1")
        assert changes == []
        wanted = yaml.safe_load(with_served("models:/translator/0"))
        wanted["applications"][0]["args"] |= {"max_queue": 5, "keep_hours": 2}
        assert yaml.safe_load(fake.service["spec"]["serveConfigV2"]) == wanted
        assert fake.note is None


def test_a_model_that_somebody_else_gave_the_service_meanwhile_stays(applied) -> None:
    both = fails("models:/translator/1", "models:/translator/8")
    with FakeKubernetes(with_served("models:/translator/0"), both) as fake:
        taken = fake.patch

        def patch(kind, body):
            answer = taken(kind, body)
            fake.edit(lambda args: args.update(model="models:/translator/8"))
            return answer

        fake.patch = patch
        with pytest.raises(UserError, match="somebody else has given the service models:/translator/8"):
            applied(fake, "models:/translator/1")
        assert fake.model == "models:/translator/8"
        assert len(fake.patches) == 1


def test_a_service_that_always_changes_is_left_and_that_is_said(applied) -> None:
    with FakeKubernetes(with_served("models:/translator/0"), fails("models:/translator/1")) as fake:
        fake.before_patch = lambda taken: fake.edit(lambda args: None) if taken else None
        with pytest.raises(UserError, match="could not be put back, so the service is left with models:/translator/1"):
            applied(fake, "models:/translator/1")
        assert fake.model == "models:/translator/1"


def test_a_model_that_never_runs_is_taken_back(applied) -> None:
    def outcome(model: str | None) -> tuple[str, str]:
        return ("DEPLOYING", "") if model == "models:/translator/1" else ("RUNNING", "")

    with FakeKubernetes(with_served(None), outcome) as fake:
        with pytest.raises(UserError, match=r"was not running after .* DEPLOYING"):
            applied(fake, "models:/translator/1", "--timeout-minutes", 0.01)
        assert fake.model is None


def test_a_state_from_before_the_change_is_not_taken_for_its_success(applied) -> None:
    """The operator has not seen the change: the RUNNING that it reports is the former model's."""
    blind = FakeKubernetes(with_served(None), lambda model: ("RUNNING", ""), looks_until_seen=10**9)
    with blind as fake, pytest.raises(UserError, match="has not seen the change"):
        applied(fake, "models:/translator/1", "--timeout-minutes", 0.005)


@pytest.mark.parametrize("before", ["models:/translator/0", None])
def test_a_roll_that_was_stopped_goes_on_and_still_knows_the_former_model(applied, before: str | None) -> None:
    """The one inside the package as well, which has no address."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with FakeKubernetes(with_served(before), lambda model: ("DEPLOYING", "")) as fake:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RayService, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                applied(fake, "models:/translator/1")
        assert fake.model == "models:/translator/1"
        fake.outcome = fails("models:/translator/1")
        with pytest.raises(UserError, match="was put back and runs"):
            applied(fake, "models:/translator/1")
        assert fake.model == before
        assert fake.note is None


def test_without_a_known_former_model_nothing_is_put_back(applied) -> None:
    """It would be the model inside the package, which nobody has asked for."""
    with FakeKubernetes(with_served("models:/translator/1"), fails("models:/translator/1")) as fake:
        with pytest.raises(UserError, match="Nothing was put back: the model before it is not known"):
            applied(fake, "models:/translator/1")
        assert fake.service["spec"]["serveConfigV2"] == with_served("models:/translator/1")
        assert fake.note is None


def test_a_broken_model_never_reaches_the_service(applied) -> None:
    with FakeKubernetes(with_served(None), lambda model: ("RUNNING", "")) as fake:
        with pytest.raises(UserError, match="models:/translator/2 is not rolled out"):
            applied(fake, "models:/translator/2")
        with pytest.raises(UserError, match="not what was registered"):
            applied(fake, "models:/translator/3")
        assert fake.patches == []


def test_what_cannot_be_reached_or_done_is_said_in_one_line(applied, tmp_path: Path, monkeypatch) -> None:
    with FakeKubernetes(with_served(None), lambda model: ("RUNNING", "")) as fake:
        with pytest.raises(UserError, match="other in the namespace aldm: there is none"):
            applied(fake, "models:/translator/1", "--service", "other")
        get = fake.get

        def changed():
            answer = get()
            copy = json.loads(json.dumps(answer[1]))
            fake.service["metadata"]["resourceVersion"] = "99"  # somebody else, between reading and changing
            return 200, copy

        fake.get = changed
        with pytest.raises(UserError, match="somebody else changed it meanwhile"):
            applied(fake, "models:/translator/1")
        assert fake.patches == []
    with pytest.raises(UserError, match="the API server does not answer"):
        roll("--model", "models:/translator/1", "--apply")  # the kubeconfig of the server that has gone
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(UserError, match="the kubeconfig cannot be used"):
        roll("--model", "models:/translator/1", "--apply")
    for damaged in ("a: [", "some words", "- a list"):
        (tmp_path / "none").write_text(damaged)
        with pytest.raises(UserError, match="the kubeconfig cannot be used"):
            roll("--model", "models:/translator/1", "--apply")
    with pytest.raises(UserError, match="give --out too"):
        roll("--model", "models:/translator/1", "--manifest", tmp_path / "x.yaml")
    for absent in ("models:/translator/9", "models:/nobody/1", "models:/translator@prod", "models:/nobody@champion"):
        with pytest.raises(UserError, match=f"has no {absent}: register it there"):
            roll("--model", absent)
    with pytest.raises(UserError, match="give one of them"):
        roll("--model", "models:/translator/1", "--apply", "--out", tmp_path / "x.yaml")
