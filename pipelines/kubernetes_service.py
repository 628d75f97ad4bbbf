"""A RayService in the Kubernetes API: its configuration, a change of that, and whether an application runs."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aldm.errors import UserError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayservices"
FORMER = "aldm/previous-model"
"""Annotation: the model that was served before; BUILT_IN for the one inside the package."""
BUILT_IN = ""
MERGE_PATCH = "application/merge-patch+json"
"""The kind of patch that custom resources take."""
FIELD_MANAGER = "aldm-k8s-roll"
"""The name under which Kubernetes remembers who has set the configuration, for those who apply manifests again."""
RUNNING, FAILED = "RUNNING", "DEPLOY_FAILED"
CALL_TIMEOUT_S = 30
LOOKS = 2
"""So often in a row an application has to be seen running: its state follows a change with some delay."""


@dataclass(frozen=True)
class State:
    """A RayService as it was read.

    Attributes:
        config: text of spec.serveConfigV2.
        former_model: what the annotation says; None without it.
        generation: counts the changes of the specification.
        version: of the object, for a change that loses nobody else's.
        status: as the operator wrote it.
    """

    config: str
    former_model: str | None
    generation: int
    version: str
    status: dict[str, Any]


class RayService:
    """One RayService."""

    def __init__(self, api: Any, namespace: str, name: str) -> None:
        """Take a `kubernetes.client.CustomObjectsApi`, and where the service is."""
        self._api, self._namespace, self._name = api, namespace, name

    @classmethod
    def connect(cls, namespace: str, name: str, context: str | None = None) -> "RayService":
        """Connect with the account of the pod that this runs in, or else as the kubeconfig says.

        Raises:
            UserError: no package, or neither of the two.
        """
        try:
            from kubernetes import client, config
            from yaml import YAMLError
        except ImportError as error:
            raise UserError("the package kubernetes is not installed: pip install 'aldm[kubeflow]'") from error
        settings = client.Configuration()
        try:
            if context is not None:
                raise config.ConfigException
            config.load_incluster_config(settings)
        except config.ConfigException:
            try:
                config.load_kube_config(context=context, client_configuration=settings)
            except (config.ConfigException, YAMLError, OSError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"no cluster: this is no pod, and the kubeconfig cannot be used ({error})") from error
        settings.retries = 1
        talk = client.ApiClient(settings)
        talk.set_default_header("Content-Type", MERGE_PATCH)  # by itself it sends a kind that custom resources refuse
        return cls(client.CustomObjectsApi(talk), namespace, name)

    def read(self) -> State:
        """Return the service as it is now.

        Raises:
            UserError: there is none, or the API does not answer.
        """
        with self._answering("read"):
            found = self._api.get_namespaced_custom_object(*self._place(), _request_timeout=CALL_TIMEOUT_S)
        meta, spec = found["metadata"], found.get("spec", {})
        if not spec.get("serveConfigV2"):
            raise UserError(f"the RayService {self._name} has no serveConfigV2")
        former = (meta.get("annotations") or {}).get(FORMER)
        generation, version = int(meta["generation"]), str(meta["resourceVersion"])
        return State(spec["serveConfigV2"], former, generation, version, found.get("status") or {})

    def change(self, config: str, *, former_model: str | None, version: str) -> int:
        """Give the service another configuration; return the generation that has it.

        Args:
            config: text of spec.serveConfigV2.
            former_model: noted in the annotation; None removes that.
            version: of the object that the change was made from.

        Raises:
            UserError: it was changed by somebody else meanwhile, or the API does not take it.
        """
        meta = {"annotations": {FORMER: former_model}, "resourceVersion": version}
        body = {"metadata": meta, "spec": {"serveConfigV2": config}}
        with self._answering("change"):
            made = self._api.patch_namespaced_custom_object(
                *self._place(), body, field_manager=FIELD_MANAGER, _request_timeout=CALL_TIMEOUT_S
            )
        return int(made["metadata"]["generation"])

    def runs(self, state: State, application: str) -> bool:
        """Whether the operator has seen the last change, and the application runs on the active cluster alone."""
        status = state.status
        upgrading = any(
            each.get("type") == "UpgradeInProgress" and each.get("status") == "True"
            for each in status.get("conditions") or []
        )
        seen = int(status.get("observedGeneration") or 0) >= state.generation
        return seen and not upgrading and _application(status, application).get("status") == RUNNING

    def wait(self, generation: int, application: str, timeout_s: float, poll_s: float) -> None:
        """Wait until the application runs with the configuration of that generation.

        Raises:
            UserError: it failed, or the time is over; says what its state is.
        """
        until, looks, said = time.monotonic() + timeout_s, 0, "nothing known of it"
        while True:
            try:
                state = self.read()
            except UserError as error:  # an API server may be away for a moment
                said = str(error)
            else:
                looks = looks + 1 if state.generation >= generation and self.runs(state, application) else 0
                if looks >= LOOKS:
                    return
                said = self._describe(state, application, generation)
                if self._failed(state, application, generation):
                    raise UserError(said)
            if time.monotonic() > until:
                raise UserError(f"it was not running after {timeout_s / 60:g} minutes ({said})")
            time.sleep(poll_s)

    def _failed(self, state: State, application: str, generation: int) -> bool:
        seen = int(state.status.get("observedGeneration") or 0) >= generation
        return seen and any(each.get("status") == FAILED for each in _applications(state.status, application))

    def _describe(self, state: State, application: str, generation: int) -> str:
        seen = int(state.status.get("observedGeneration") or 0)
        if seen < generation:
            return f"the operator has not seen the change yet: generation {seen}, wanted {generation}"
        texts = [
            " ".join(filter(None, (str(each.get("status")), _one_line(each.get("message")))))
            for each in _applications(state.status, application)
        ]
        return f"application {application}: {'; '.join(texts) or 'no state yet'}"

    def _place(self) -> tuple[str, str, str, str, str]:
        return GROUP, VERSION, self._namespace, PLURAL, self._name

    @contextlib.contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        """Turn what the API refuses into a UserError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        where = f"the RayService {self._name} in the namespace {self._namespace}"
        try:
            yield
        except ApiException as error:
            reasons = {
                401: "the API server does not know who this is",
                403: f"this account may not {what} it: it needs get and patch of rayservices",
                404: "there is none",
                409: "somebody else changed it meanwhile: run the command again",
            }
            raise UserError(f"{where}: {reasons.get(error.status, f'{error.status} {error.reason}')}") from error
        except (HTTPError, OSError) as error:
            raise UserError(f"{where}: the API server does not answer ({_one_line(str(error))})") from error


def _application(status: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the state of an application on the active cluster."""
    active = status.get("activeServiceStatus") or {}
    return dict((active.get("applicationStatuses") or {}).get(name) or {})


def _applications(status: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return its states on the active cluster and on the one that is being started, where there is one."""
    clusters = [status.get(f"{kind}ServiceStatus") or {} for kind in ("active", "pending")]
    found = [(cluster.get("applicationStatuses") or {}).get(name) for cluster in clusters]
    return [each for each in found if each]


def _one_line(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words if len(words) <= 300 else words[:300] + " ..."
