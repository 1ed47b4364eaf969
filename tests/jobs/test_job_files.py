"""The files in jobs/: valid, true to each other and to the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentmill import __version__
from latentmill.config import RunConfig, load_config
from latentmill.models.families.conv import ConvSettings
from latentmill.sources.settings import SourceSettings
from latentmill.training.linearity import LinearitySettings
from latentmill.training.settings import TrainSettings, load_settings

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
STOP_SECONDS = 30  # what a run is given to leave a resumable store


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert found
    return found[1]


def test_the_example_config_is_valid_as_it_is_and_with_every_comment_lifted() -> None:
    text = (JOBS / "encode.yaml").read_text()
    config = load_config(JOBS / "encode.yaml", {})
    assert (config.model, config.format, config.dtype) == ("lin-cae", "parquet", "float16")
    lifted = re.sub(r"^# ?(?=( {2})?[a-z_]+:( |$))", "", text, flags=re.M)
    settings = yaml.safe_load(lifted)
    assert len(settings) > len(yaml.safe_load(text)) + 8
    RunConfig.model_validate(settings)
    assert all(setting in RunConfig.model_fields for setting in settings)


def test_the_runtime_env_is_one_that_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    settings = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    assert RuntimeEnv(**settings).to_dict() == settings
    variables = settings["env_vars"]
    assert (ROOT / variables["PYTHONPATH"] / "latentmill" / "__init__.py").exists()
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= STOP_SECONDS


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    [document] = yaml.safe_load_all((JOBS / "kuberay.yaml").read_text())
    return document


# What the custom resource definition of KubeRay 1.5 demands and knows, by the Go types of
# ray-operator/apis/ray/v1.
JOB_FIELDS = {"entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "rayClusterSpec"}
JOB_FIELDS |= {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams"}


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_ray_job_has_the_form_that_kuberay_demands(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    spec = manifest["spec"]
    assert set(spec) == JOB_FIELDS
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert spec["shutdownAfterJobFinishes"] or not spec["ttlSecondsAfterFinished"]
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == CLUSTER_FIELDS
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for worker in cluster["workerGroupSpecs"]:
        assert set(worker) == WORKER_FIELDS | {"template"}
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for group in groups(manifest):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        [container] = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= set(container)
        # Kubernetes wants the two to be the same where a resource cannot be shared.
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}


def test_the_ray_job_runs_what_the_other_files_say(manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]
    runtime_env = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == runtime_env
    assert spec["entrypoint"] == "latentmill encode --config /etc/latentmill/encode.yaml"
    head, *workers = groups(manifest)
    [mount] = head["template"]["spec"]["containers"][0]["volumeMounts"]
    assert spec["entrypoint"].endswith(f"{mount['mountPath']}/encode.yaml")
    assert head["rayStartParams"]["num-cpus"] == "0"
    for worker in workers:
        limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) >= 1
    images = {one["template"]["spec"]["containers"][0]["image"] for one in (head, *workers)}
    assert images == {f"registry.example.com/latentmill:{__version__}"}
    for group in (head, *workers):
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= 2 * STOP_SECONDS


def test_versions_are_those_that_are_tested(manifest: dict[str, Any]) -> None:
    ray = pinned("ray")
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == ray
    dockerfile = (JOBS / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray}-py311-gpu" in dockerfile
    assert f"registry.example.com/latentmill:{__version__}" in dockerfile


def test_the_pages_commands_name_files_and_settings_that_exist() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"\bjobs/[\w.]+\w", page))
    assert named >= {f"jobs/{path.name}" for path in JOBS.iterdir() if path.is_file()}
    assert all((ROOT / name).exists() for name in named)


def test_the_training_config_has_the_defaults_and_every_setting() -> None:
    text = (JOBS / "train_linear.yaml").read_text()
    lifted = yaml.safe_load(re.sub(r"^# ?(?=[a-z_]+: )", "", text, flags=re.M))
    settings = load_settings(JOBS / "train_linear.yaml", {})
    default = TrainSettings(source=settings.source, out=settings.out)
    assert settings == default
    TrainSettings.model_validate(lifted)
    own = set(TrainSettings.model_fields) - set(SourceSettings.model_fields)
    assert set(lifted) == own | {"source"}
    assert set(lifted["network"]) == set(ConvSettings.model_fields)
    assert set(lifted["linearity"]) == set(LinearitySettings.model_fields)
