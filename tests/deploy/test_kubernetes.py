"""The manifests follow Kubernetes' schemas, and agree with each other, the image and the settings."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import kubernetes_validate
import pytest

from service.api.access import Access, access_to
from service.api.keys import parse_key_line
from tests.deploy.files import KUBERNETES, LAST_WORDS_S, VARIABLES, dockerfile, documents, read, settings_of

VERSIONS = ("1.31", "1.37")  # the oldest and the newest that are tested
OF_AN_OPERATOR = {"ServiceMonitor", "PrometheusRule"}  # not in Kubernetes' own schemas
Manifests = dict[str, Any]


def patched(base: Any, patch: Any) -> Any:
    """A strategic merge, as far as these patches need it: lists of things with a name are merged by it."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: patched(base.get(key), value) for key, value in patch.items()}}
    if isinstance(base, list) and all(isinstance(each, dict) and "name" in each for each in [*base, *patch]):
        given = {each["name"]: each for each in patch}
        kept = [patched(each, given.pop(each["name"], {})) for each in base]
        return [*kept, *given.values()]
    return copy.deepcopy(patch)


def manifests(name: str) -> Manifests:
    base = documents(KUBERNETES / "base")
    if name == "gpu":
        for kind, patch in documents(KUBERNETES / "gpu").items():
            base[kind] = patched(base[kind], patch)
    return base


@pytest.fixture(params=["base", "gpu"])
def applied(request: pytest.FixtureRequest) -> Manifests:
    return manifests(request.param)


def pod_of(applied: Manifests) -> Any:
    return applied["StatefulSet"]["spec"]["template"]["spec"]


def container_of(applied: Manifests) -> Any:
    [container] = pod_of(applied)["containers"]
    return container


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["base", "gpu"])
def test_follow_the_schemas(name: str, version: str) -> None:
    for manifest in manifests(name).values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_notice_a_mistake() -> None:
    manifest = manifests("base")["StatefulSet"]
    manifest["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("folder", ["base", "gpu", "monitoring"])
def test_every_file_is_in_the_kustomization(folder: str) -> None:
    kustomization = read(KUBERNETES / folder / "kustomization.yaml")
    named = {*kustomization.get("resources", []), *(each["path"] for each in kustomization.get("patches", []))}
    there = {path.name for path in (KUBERNETES / folder).iterdir()} - {"kustomization.yaml", "secret.example.yaml"}
    assert named - {"../base"} == there


def test_the_image_is_the_one_that_kustomizations_name(applied: Manifests) -> None:
    for folder in ("base", "gpu"):
        [image] = read(KUBERNETES / folder / "kustomization.yaml")["images"]
        assert image["name"] == container_of(applied)["image"]


def test_settings_are_settings_that_can_be_read(applied: Manifests) -> None:
    data = applied["ConfigMap"]["data"]
    assert set(data) <= VARIABLES
    assert settings_of(data).model
    assert container_of(applied)["args"] == ["serve"]
    assert {each["name"] for each in container_of(applied)["env"]} == {"HF_TOKEN"}


def test_a_pod_may_end_in_its_own_time(applied: Manifests) -> None:
    drain = settings_of(applied["ConfigMap"]["data"]).drain_timeout_s
    [command, pause] = container_of(applied)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod_of(applied)["terminationGracePeriodSeconds"] > int(pause) + drain + LAST_WORDS_S


def test_ports_agree(applied: Manifests) -> None:
    [port] = container_of(applied)["ports"]
    [offered] = applied["Service"]["spec"]["ports"]
    assert port["containerPort"] == int(dockerfile("EXPOSE")) == settings_of({}).port
    assert offered["targetPort"] == port["name"]
    [rule] = applied["NetworkPolicy"]["spec"]["ingress"]
    assert [each["port"] for each in rule["ports"]] == [port["name"]]


def test_probes_ask_what_is_public(applied: Manifests) -> None:
    container = container_of(applied)
    asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in asked.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    for probe in asked.values():
        assert probe["port"] == container["ports"][0]["name"]
        assert access_to("GET", probe["path"], metrics_public=False) is Access.PUBLIC


def test_a_pod_has_no_rights(applied: Manifests) -> None:
    pod, container = pod_of(applied), container_of(applied)
    user, group = map(int, dockerfile("USER").split(":"))
    assert pod["securityContext"] | {"fsGroupChangePolicy": ""} == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "fsGroupChangePolicy": "",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]
    assert not pod["enableServiceLinks"]
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_all_that_is_written_to_is_mounted(applied: Manifests) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(applied)["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in applied["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in pod_of(applied)["volumes"]}
    assert {"/data", "/cache", "/tmp"} <= set(mounts)
    assert {mounts["/data"], mounts["/cache"]} == claims
    assert set(mounts.values()) == claims | volumes


def test_selectors_find_the_pods(applied: Manifests) -> None:
    labels = applied["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert applied["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert applied["Service"]["spec"]["selector"] == labels
    assert applied["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert applied["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert applied["StatefulSet"]["spec"]["serviceName"] == applied["Service"]["metadata"]["name"]
    assert pod_of(applied)["serviceAccountName"] == applied["ServiceAccount"]["metadata"]["name"]
    assert container_of(applied)["envFrom"][0]["configMapRef"]["name"] == applied["ConfigMap"]["metadata"]["name"]


def test_the_example_of_a_secret_is_read_as_keys(applied: Manifests) -> None:
    secret = applied["Secret"]
    [volume] = [each for each in pod_of(applied)["volumes"] if "secret" in each]
    [item] = volume["secret"]["items"]
    [mount] = [each for each in container_of(applied)["volumeMounts"] if each["name"] == volume["name"]]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert applied["ConfigMap"]["data"]["VBLORA_API_KEY_FILE"] == f"{mount['mountPath']}/{item['path']}"
    keys = [key for line in secret["stringData"][item["key"]].splitlines() if (key := parse_key_line(line))]
    assert [key.tenant for key in keys] == ["acme"]


def test_the_gpu_is_asked_for_where_the_device_is_cuda() -> None:
    gpu, base = manifests("gpu"), manifests("base")
    assert container_of(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings_of(gpu["ConfigMap"]["data"]).device == "cuda"
    assert "nvidia.com/gpu" not in container_of(base)["resources"]["limits"]


def test_the_monitor_selects_the_service() -> None:
    monitor, service = read(KUBERNETES / "monitoring" / "servicemonitor.yaml"), manifests("base")["Service"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert access_to("GET", endpoint["path"], metrics_public=True) is Access.PUBLIC


@pytest.mark.parametrize("name", sorted(str(path.relative_to(KUBERNETES)) for path in KUBERNETES.glob("*/*.yaml")))
def test_every_manifest_is_of_a_kind_that_is_checked(name: str) -> None:
    kind = read(KUBERNETES / name)["kind"]
    assert kind in {*manifests("base"), *OF_AN_OPERATOR, "Kustomization"}
    assert (kind in OF_AN_OPERATOR) == (name.startswith("monitoring/") and kind != "Kustomization")
