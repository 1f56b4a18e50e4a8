"""What is wrong with the parts of a cluster.yaml that Ray hands to a cloud unread, found without the cloud."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator
from typing import Any

from pipeline.form_checks import TEXT, WHOLE, YES_OR_NO, form_problems, list_of, mapping, unknown_keys

PROVIDER_KEYS = {
    "aws": ("type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes", "security_group",
            "key_pair", "extra_config", "cloudwatch", "aws_credentials", "disable_node_updaters"),
    "gcp": ("type", "region", "availability_zone", "project_id", "use_internal_ips", "cache_stopped_nodes",
            "gcp_credentials", "disable_node_updaters"),
    "local": ("type", "head_ip", "worker_ips", "external_head_ip", "disable_node_updaters"),
}  # fmt: skip
PROVIDER_NEEDS = {
    "aws": ("region",),
    "gcp": ("region", "availability_zone", "project_id"),
    "local": ("head_ip", "worker_ips"),
}
_GIGABYTES = {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string", "pattern": "^[0-9]+$"}]}
_NO_PUBLIC_ADDRESS = {"type": "array", "maxItems": 0, "say": "is a public address; leave it out"}
_OTHER_INSTANCE_KEYS = (
    "guestAccelerators", "metadata", "labels", "tags", "minCpuPlatform", "shieldedInstanceConfig",
    "confidentialInstanceConfig", "canIpForward", "description", "resourcePolicies", "reservationAffinity",
    "advancedMachineFeatures", "sourceMachineImage", "networkPerformanceConfig", "deletionProtection", "params",
)  # fmt: skip
GCP_INSTANCE = mapping(
    {
        "machineType": TEXT,
        "disks": list_of(
            mapping(
                {
                    "boot": YES_OR_NO, "autoDelete": YES_OR_NO, "type": {"enum": ["PERSISTENT", "SCRATCH"]},
                    "initializeParams": mapping(
                        {"diskSizeGb": _GIGABYTES, "diskType": TEXT, "sourceImage": TEXT, "diskName": TEXT,
                         "labels": {}, "provisionedIops": {}, "provisionedThroughput": {}, "resourceManagerTags": {}},
                        is_closed=True,
                    ),
                    "diskSizeGb": _GIGABYTES, "mode": TEXT, "source": TEXT, "deviceName": TEXT, "index": WHOLE,
                    "interface": TEXT, "diskEncryptionKey": {}, "guestOsFeatures": {}, "architecture": TEXT,
                },
                is_closed=True,
            ),
            least=1,
        ),
        "networkInterfaces": list_of(  # without one, or without its subnetwork, a default network is taken
            mapping(
                {
                    "subnetwork": TEXT, "network": TEXT, "networkIP": TEXT, "nicType": TEXT, "stackType": TEXT,
                    "aliasIpRanges": {}, "queueCount": WHOLE, "networkAttachment": TEXT,
                    "accessConfigs": _NO_PUBLIC_ADDRESS, "ipv6AccessConfigs": _NO_PUBLIC_ADDRESS,
                },
                ["subnetwork"], is_closed=True,
            ),
            least=1,
        ),
        "serviceAccounts": list_of(
            mapping({"email": TEXT, "scopes": list_of(TEXT, least=1)}, ["email", "scopes"], is_closed=True), least=1
        ),
        "scheduling": mapping(
            {
                "provisioningModel": {"enum": ["SPOT", "STANDARD"]},
                "onHostMaintenance": {"enum": ["TERMINATE", "MIGRATE"]},
                "instanceTerminationAction": {"enum": ["DELETE", "STOP"]},
                "automaticRestart": YES_OR_NO, "preemptible": YES_OR_NO, "minNodeCpus": WHOLE, "nodeAffinities": {},
                "maxRunDuration": {}, "localSsdRecoveryTimeout": {}, "onInstanceStopAction": {},
                "terminationTime": TEXT, "availabilityDomain": WHOLE,
            },
            is_closed=True,
        ),
        **{key: {} for key in _OTHER_INSTANCE_KEYS},
    },
    ["machineType", "disks", "networkInterfaces"],
    is_closed=True,
)  # fmt: skip
"""Of Compute Engine's instances.insert, as far as clusters need it."""
MARKETS = ("spot", "capacity-block")


def cloud_problems(content: dict[str, Any]) -> Iterator[str]:
    """What the provider of a file that Ray takes would refuse, or what would leave a node open or apart."""
    provider = content["provider"]
    kind = provider["type"]
    if kind not in PROVIDER_KEYS:
        return
    yield from unknown_keys("provider", provider, PROVIDER_KEYS[kind])
    yield from (f"provider.{key}: is missing" for key in PROVIDER_NEEDS[kind] if not provider.get(key))
    if kind == "local":
        yield from _machine_problems(content)
    for name, node_type in content.get("available_node_types", {}).items():
        where = f"available_node_types.{name}.node_config"
        if kind == "aws":
            yield from _ec2_problems(where, node_type["node_config"])
        elif kind == "gcp":
            yield from _compute_engine_problems(where, node_type["node_config"])


def _ec2_problems(where: str, node_config: dict[str, Any]) -> Iterator[str]:
    """By EC2's own description of RunInstances; Ray takes SubnetIds in place of SubnetId."""
    import botocore.validate

    for key in ("InstanceType", "ImageId", "SubnetIds"):
        if not node_config.get(key):
            yield f"{where}.{key}: is missing"
    subnets = node_config.get("SubnetIds") or ["given"]
    if not isinstance(subnets, list) or not all(isinstance(subnet, str) for subnet in subnets):
        yield f"{where}.SubnetIds: has to be a list of subnets, got {subnets!r:.60}"
        return
    parameters = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    parameters |= {"SubnetId": subnets[0], "MinCount": 1, "MaxCount": 1}
    report: str = botocore.validate.ParamValidator().validate(parameters, _run_instances()).generate_report()
    yield from (f"{where}: {line}" for line in report.splitlines())
    market = node_config.get("InstanceMarketOptions")
    if isinstance(market, dict) and market.get("MarketType") not in MARKETS:
        yield f"{where}.InstanceMarketOptions.MarketType: has to be {' or '.join(MARKETS)}"
    for interface in node_config.get("NetworkInterfaces") or []:
        if isinstance(interface, dict) and interface.get("AssociatePublicIpAddress"):
            yield f"{where}.NetworkInterfaces: AssociatePublicIpAddress is a public address"


@functools.lru_cache(maxsize=1)
def _run_instances() -> Any:
    """EC2's description of what it takes; a second to load."""
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _compute_engine_problems(where: str, node_config: dict[str, Any]) -> Iterator[str]:
    found = list(form_problems(where, node_config, GCP_INSTANCE))
    if found:
        yield from found
        return
    boots = [disk for disk in node_config["disks"] if disk.get("boot")]
    if len(boots) != 1 or not ({"source", "initializeParams"} & set(boots[0])):
        yield f"{where}.disks: one has to say boot: true, and what it is made of"
    for disk in node_config["disks"]:
        if disk.get("boot") and "initializeParams" in disk and not disk["initializeParams"].get("sourceImage"):
            yield f"{where}.disks: initializeParams.sourceImage is missing"


def _machine_problems(content: dict[str, Any]) -> Iterator[str]:
    """Machines that are there already."""
    provider = content["provider"]
    workers = provider.get("worker_ips") or []
    if provider.get("head_ip") in workers:
        yield "provider.worker_ips: holds head_ip, too; the head is no worker"
    for key, address in [("head_ip", provider.get("head_ip")), *(("worker_ips", worker) for worker in workers)]:
        if address is not None and _is_public(str(address)):
            yield f"provider.{key}: {address} is a public address; take the machine's private one"
    options = content.get("docker", {}).get("run_options") or []
    if not any("--volume" in option or option.startswith("-v ") for option in options):
        yield "docker.run_options: add --volume /shared:/shared, a file system of all machines, for data and runs"


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a name
        return False
