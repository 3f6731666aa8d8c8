"""What docker-compose.yml promises, read by Compose's own loader."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.cli.explain import section_models
from services.cli.supervisor import backend
from services.mesh.trust.names import alternative_names
from services.runtime.config import Settings
from services.runtime.errors import InvalidArgumentError
from tests.production.compose import ROOT, SECRETS, Project, Service, load

if TYPE_CHECKING:
    from collections.abc import Mapping

JOBS = {"consul-acl", "models"}
"""They end."""
OUTSIDE_SECTIONS = {"PLEXUS_STATE"}
"""Variables of the command itself."""
SHARED = {"models"}
"""A volume that one service writes and others only read."""


def test_compose_refuses_a_file_that_is_wrong(composefile_program: Path, tmp_path: Path) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace("service:node-a", "service:nobody"))
    with pytest.raises(ValueError, match="nobody"):
        load(composefile_program, broken)
    broken.write_text(text.replace("stop_grace_period", "stop_grace"))
    with pytest.raises(ValueError, match="stop_grace"):
        load(composefile_program, broken)


def test_every_process_of_plexus_runs_and_the_engines_have_one_owner(project: Project) -> None:
    known = {spec.name for spec in backend.specs(Path("/state"), 8000, 18500, {})}
    count = Counter(service.process for service in project.processes())
    assert set(count) == known
    assert {name for name, number in count.items() if number > 1} == {"control", "queueing"}
    assert set(count.values()) == {1, 2}


def test_each_volume_has_one_writer(project: Project) -> None:
    writers: Counter[str] = Counter()
    for service in project.services.values():
        for mount in service.mounts():
            if mount["type"] == "volume" and not mount.get("read_only"):
                writers[mount["source"]] += 1
    assert dict(writers) == dict.fromkeys(project.content["volumes"], 1)


def with_secrets(service: Service, folder: Path) -> dict[str, str]:
    """The environment of a service where its secrets are in a folder."""
    files = {path: str(folder / source) for path, source in service.secrets.items()}
    return {
        name: files[value] if value.startswith(SECRETS) else value
        for name, value in service.environment.items()
    }


def unread(environment: Mapping[str, str]) -> set[str]:
    """The PLEXUS variables that no configuration key takes its value from.

    Raises:
        InvalidArgumentError: A section or key does not exist, or its value is not valid.
    """
    settings = Settings(environment)
    read = {row.source for name, model in section_models().items() for row in settings.explain(name, model)}
    return {name for name in environment if name.startswith("PLEXUS_")} - read - OUTSIDE_SECTIONS


def test_every_plexus_variable_is_a_configuration_key(project: Project, secrets: Path) -> None:
    processes = project.processes()
    for service in processes:
        assert unread(with_secrets(service, secrets)) == set(), service.name
    assert unread({"PLEXUS_STAT": "/state"}) == {"PLEXUS_STAT"}
    some = with_secrets(processes[0], secrets)
    with pytest.raises(InvalidArgumentError, match=r"server\.hots: unknown key"):
        unread({**some, "PLEXUS_SERVER__HOTS": "10.0.0.1"})


def test_every_secret_file_is_made_mounted_and_private(project: Project, secrets: Path) -> None:
    declared = {name: Path(each["file"]) for name, each in project.content["secrets"].items()}
    assert {path.parent for path in declared.values()} == {ROOT / "secrets"}
    assert all(path.name == name for name, path in declared.items())
    assert {path.name for path in secrets.iterdir()} >= set(declared)
    used = {name for service in project.services.values() for name in service.secrets.values()}
    assert used == set(declared)
    assert not any("ca-key" in name for name in declared), "who signs stays with the operator"
    for service in project.services.values():
        for name, value in service.environment.items():
            if re.search(r"PASSWORD|TOKEN|URL", name):
                assert name.endswith("_FILE"), f"{service.name}: {name} is readable by everyone"
                assert value in service.secrets, f"{service.name}: {name}"


def test_only_the_edge_and_the_uis_have_ports_and_only_for_this_host(project: Project) -> None:
    ports = {
        (port.get("host_ip"), port["target"])
        for service in project.services.values()
        for port in service.content.get("ports") or []
    }
    assert ports == {("127.0.0.1", 8443), ("127.0.0.1", 8501), ("127.0.0.1", 15672)}
    assert not any(service.content.get("network_mode") == "host" for service in project.services.values())


def test_every_container_has_limits_comes_back_and_gains_no_rights(project: Project) -> None:
    for service in project.services.values():
        limits = service.content["deploy"]["resources"]["limits"]
        assert limits["cpus"], service.name
        assert int(limits["memory"]) >= 16 * 2**20, service.name
        assert service.content["restart"] == ("on-failure" if service.name in JOBS else "unless-stopped")
        assert service.content["security_opt"] == ["no-new-privileges:true"], service.name
        assert service.content["logging"]["options"]["max-size"], service.name


def test_ours_run_without_capabilities_on_a_read_only_root(project: Project) -> None:
    ours = [service for service in project.services.values() if service.is_ours]
    assert len(ours) > len(project.processes())
    for service in ours:
        assert service.content["cap_drop"] == ["ALL"], service.name
        assert service.content["read_only"], service.name
        folders = [entry.split(":")[0] for entry in service.content.get("tmpfs") or []]
        assert all(folder.startswith("/") for folder in folders), f"{service.name}: {folders}"
        if service.process:
            assert "/tmp" in folders, service.name  # noqa: S108 - a path in a container
            writable = [mount["target"] for mount in service.mounts() if not mount.get("read_only")]
            assert ("/state" in folders) != ("/state" in writable), service.name


def test_images_are_pinned(project: Project) -> None:
    for service in project.services.values():
        assert re.search(r":\d+\.\d+", service.content["image"]), service.name


def test_who_is_waited_for_healthy_has_a_health_check(project: Project) -> None:
    services = project.services
    for service in services.values():
        for name, wanted in (service.content.get("depends_on") or {}).items():
            other, condition = services[name].content, wanted["condition"]
            if condition == "service_healthy":
                check = other.get("healthcheck") or {}
                # Ours have that of the image.
                assert services[name].process or check.get("test"), f"{service.name}: {name}"
                assert not check.get("disable"), f"{service.name}: {name}"
            elif condition == "service_completed_successfully":
                assert name in JOBS, f"{service.name}: {name}"
            else:
                assert name == service.node, f"{service.name} does not wait until {name} works"
    for service in project.processes():
        if service.process != "control":
            wanted = {name for name in service.content["depends_on"] if name.startswith("control")}
            assert {services[name].node for name in wanted} == {service.node}, service.name


def test_processes_are_registered_with_the_address_of_their_node(project: Project) -> None:
    for service in project.processes():
        assert service.environment["PLEXUS_SERVER__HOST"] == project.address(service.node), service.name
        host, _, port = service.environment["PLEXUS_MESH__CONTROL_PLANES"].partition(":")
        assert port == service.environment["PLEXUS_MESH__CONTROL_PORT"]
        names = alternative_names("spiffe://x/svc/control", "control", project.address(service.node))
        assert host in {str(name.value) for name in names}, "the control plane's certificate has the name"
        for node in {each.node for each in project.processes() if each.process == "control"}:
            assert host in project.content["services"][node]["networks"]["plexus"]["aliases"]


def test_the_engine_gives_no_one_an_address_that_the_file_gives(project: Project) -> None:
    (pool,) = project.content["networks"]["plexus"]["ipam"]["config"]
    fixed = [
        ipaddress.ip_address(network["ipv4_address"])
        for service in project.services.values()
        for network in (service.content.get("networks") or {}).values()
        if network and network.get("ipv4_address")
    ]
    assert len(fixed) == len(set(fixed)) == 3
    for address in fixed:
        assert address in ipaddress.ip_network(pool["subnet"])
        assert address not in ipaddress.ip_network(pool["ip_range"])


def test_mounted_files_are_in_the_checkout(project: Project) -> None:
    for service in project.services.values():
        for mount in service.mounts():
            if mount["type"] == "bind":
                assert Path(mount["source"]).is_relative_to(ROOT)
                assert Path(mount["source"]).exists(), f"{service.name}: {mount['source']}"
                assert mount["read_only"], f"{service.name}: {mount['source']}"
