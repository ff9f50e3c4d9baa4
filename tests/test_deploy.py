"""What deploys a server fits the server: options, ports, metrics, extras and paths exist, and manifests hold together.

Tools that are not installed skip what needs them; for those that REQUIRE_DEPLOY_TOOLS names, that is a failure.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import typer
import yaml
from prometheus_client import Counter, Gauge, Histogram

from genretrieval.cli import app
from genretrieval_serving.app import Settings
from genretrieval_serving.batcher import STANDING_BATCHES
from genretrieval_serving.observability import Metrics

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "genretrieval"
RUNBOOK = ROOT / "docs" / "operations.md"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
COMMAND: Any = typer.main.get_command(app)
DEFAULTS = {parameter.name: parameter.default for parameter in COMMAND.commands["serve"].params}
PORTS = {name: DEFAULTS[f"{name}_port"] for name in ("http", "grpc", "admin")} | {"probes": 8083}
# Labels that Prometheus puts on what it scrapes.
TARGET_LABELS = {"namespace", "job", "instance"}


def missing(name: str) -> NoReturn:
    """Skip what needs a program that a developer may not have."""
    message = f"{name} is not installed"
    pytest.fail(message) if name in os.environ.get("REQUIRE_DEPLOY_TOOLS", "").split() else pytest.skip(message)


def tool(name: str, *arguments: str | Path, **options: Any) -> str:
    """What a program prints; it has to be content."""
    if shutil.which(name) is None:
        missing(name)
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def parsed(arguments: list[str], environment: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What a verb of `genretrieval` would be called with, defaults included; fails on what it does not take."""
    given: dict[str, Any] = {}
    command, words = COMMAND, list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with pytest.MonkeyPatch.context() as patch:
        for variable in environment or []:
            patch.setenv(variable["name"], variable["name"])
        patch.setattr(command, "callback", given.update)
        command.main(words, standalone_mode=False)
    return given


# --- images ---


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Keyword and rest of every instruction, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.stem)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_an_image_installs_extras_that_exist_at_pinned_versions(dockerfile) -> None:
    lines = instructions(dockerfile)
    (extras,) = (value.removeprefix("EXTRAS=").split(",") for key, value in lines if value.startswith("EXTRAS="))
    assert set(extras) <= set(PYPROJECT["project"]["optional-dependencies"])
    commands = " && ".join(value for key, value in lines if key == "RUN").split("&&")
    installs = [command for command in commands if re.search(r"pip .*install ", command) and "apt-get" not in command]
    assert len(installs) >= 2
    assert all("--constraint constraints.txt" in command for command in installs)
    if "train" not in extras:
        installed, todo = set(), list(extras)
        while todo:
            for requirement in PYPROJECT["project"]["optional-dependencies"][todo.pop()]:
                own = re.fullmatch(r"genretrieval\[(.+)\]", requirement)
                todo += own[1].split(",") if own else []
                installed.add(re.match(r"[\w-]+", requirement)[0])
        assert not installed & {"torch", "transformers", "faiss-cpu", "faiss-gpu", "onnx"}


def test_an_image_runs_the_command_as_nobody_in_particular(dockerfile) -> None:
    last = dict(instructions(dockerfile))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    # The exec form: the command itself is process 1 and hears SIGTERM.
    (program,) = json.loads(last["ENTRYPOINT"])
    assert program in PYPROJECT["project"]["scripts"]
    command = [word for word in json.loads(last["CMD"]) if word != "--help"]
    assert command in ([], ["serve"])
    assert "HEALTHCHECK" not in last
    if "EXPOSE" in last:
        assert [int(port) for port in last["EXPOSE"].split()] == [PORTS["http"], PORTS["grpc"], PORTS["admin"]]
    for label in ("title", "description", "source", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in last["LABEL"]
    version = PYPROJECT["project"]["version"]
    assert ("ARG", f"VERSION={version}") in instructions(dockerfile)


def test_an_image_is_built_from_what_makes_the_wheel_and_nothing_else(dockerfile) -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    sent = {line[1:] for line in ignore if line.startswith("!")}
    targets = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {Path(path).parts[0] for path in [*targets["packages"], *targets["force-include"]]}
    assert sent == needed | {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in sent)
    for key, value in instructions(dockerfile):
        if key == "COPY" and "--from" not in value:
            *sources, _ = value.split()
            assert all(any(fnmatch.fnmatch(name, source) for name in [*sent, "."]) for source in sources)


def test_the_onnxruntime_for_gpus_is_the_one_for_cpus() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    assert pins["onnxruntime-gpu"] == pins["onnxruntime"]


def test_hadolint_finds_nothing(dockerfile) -> None:
    tool("hadolint", dockerfile)


# --- compose.yaml ---


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def test_compose_reads_what_exists(compose) -> None:
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}"
            elif not source.startswith("$"):
                assert source in compose["volumes"], f"{name} mounts {source}"
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"]
        if "build" in service:
            context = DEPLOY / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()


def test_compose_scrapes_and_asks_its_own_servers(compose) -> None:
    servers = [name for name, service in compose["services"].items() if name.startswith("server-")]
    assert len(servers) == 2
    for name in servers:
        given = parsed(compose["services"][name]["command"])
        assert given["probe_port"] == PORTS["probes"]
        assert compose["services"][name]["read_only"] is True
        grace = float(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace > given["drain_delay"] + given["drain_seconds"]
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text("utf-8"))
    (scraped,) = prometheus["scrape_configs"]
    assert scraped["job_name"] == "genretrieval"
    assert scraped["static_configs"] == [{"targets": [f"{name}:{PORTS['probes']}" for name in servers]}]


def test_docker_compose_takes_it(tmp_path) -> None:
    command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if not shutil.which(command[0]) or subprocess.run([*command, "version"], capture_output=True).returncode:
        missing("docker compose")
    file = ["--file", DEPLOY / "compose.yaml", "--profile", "*"]
    tool(*command, *file, "config", "--quiet", env={**os.environ, "BUNDLE": str(tmp_path)})


# --- the chart ---


def render(*options: str | Path) -> list[dict[str, Any]]:
    """The manifests of a release `shop`."""
    text = tool("helm", "template", "shop", CHART, "--namespace", "shop", *options)
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


VALUES = sorted((CHART / "ci").glob("*-values.yaml"))


@pytest.fixture(scope="module", params=VALUES, ids=lambda path: path.stem)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render("--values", request.param)


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = of_kind(manifests, "Deployment")
    return deployment["spec"]["template"]["spec"]


def server(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = pod(manifests)["containers"]
    return container


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_helm_lint_finds_nothing(values) -> None:
    tool("helm", "lint", "--strict", CHART, "--values", values)


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_kubernetes_knows_every_field(values, tmp_path) -> None:
    rendered = tmp_path / "manifests.yaml"
    own = [manifest for manifest in render("--values", values) if "coreos.com" not in manifest["apiVersion"]]
    rendered.write_text(yaml.safe_dump_all(own), "utf-8")
    tool("kubernetes-validate", "--strict", rendered)


def test_the_server_takes_every_option_of_the_chart(manifests) -> None:
    container = server(manifests)
    given = parsed(container["args"], container.get("env"))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {name: port for name, port in PORTS.items() if name in ports}
    assert (given["http_port"], given["grpc_port"]) == (ports["http"], ports["grpc"])
    assert given["probe_port"] == ports["probes"]
    assert ("admin" in ports) == (given["admin_store"] == "GENRETRIEVAL_ADMIN_STORE")
    assert given["admin_port"] == PORTS["admin"]
    assert pod(manifests)["terminationGracePeriodSeconds"] >= given["drain_delay"] + given["drain_seconds"] + 10
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for option, value in given.items():
        if isinstance(value, Path):
            assert any(value.is_relative_to(path) for path in mounts), f"{option}: {value} is not mounted"


def test_the_job_makes_the_alias_that_servers_follow(manifests) -> None:
    for job in of_kind(manifests, "Job"):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        made, followed = parsed(container["args"], container["env"]), parsed(server(manifests)["args"])
        assert made["store"] == "GENRETRIEVAL_ADMIN_STORE"
        assert (made["alias"], made["bundles"]) == (followed["alias"], followed["bundles"])


def test_secrets_stay_out_of_what_is_typed(manifests) -> None:
    assert not of_kind(manifests, "Secret")
    assert not [word for word in server(manifests)["args"] if re.search(r"://[^/]*@|password|secret=", word)]


def test_pods_have_no_rights_and_write_nothing_but_mounts(manifests) -> None:
    spec = pod(manifests)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    users = {dict(instructions(file))["USER"].split(":")[0] for file in DOCKERFILES if file.stem.startswith("serve")}
    assert users == {str(spec["securityContext"]["runAsUser"])}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in spec["volumes"]}


def test_whatever_selects_pods_selects_these_and_names_their_ports(manifests) -> None:
    (deployment,) = of_kind(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    ports = {port["name"] for port in server(manifests)["ports"]}

    def selects(selector: dict[str, str]) -> bool:
        return bool(selector) and selector.items() <= labels

    assert selects(deployment["spec"]["selector"]["matchLabels"])
    for constraint in pod(manifests)["topologySpreadConstraints"]:
        assert selects(constraint["labelSelector"]["matchLabels"])
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert selects(budget["spec"]["selector"]["matchLabels"])
    services = of_kind(manifests, "Service")
    for service in services:
        assert selects(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert selects(policy["spec"]["podSelector"]["matchLabels"])
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} <= ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server(manifests)[probe]["httpGet"]["port"] in ports
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = (service for service in services if wanted <= service["metadata"]["labels"].items())
        names = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= names
        # What the alerts look for as `job`.
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "genretrieval"
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert "replicas" not in deployment["spec"]
        metrics = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"] if "pods" in metric]
        assert set(metrics) <= set(metric_labels())


def test_the_admin_port_is_for_admins(manifests) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    rules = {port["port"]: rule for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert all(rules[name]["from"] for name in ("admin", "probes") if name in rules)
    for service in of_kind(manifests, "Service"):
        names = {port["name"] for port in service["spec"]["ports"]}
        assert ("admin" in names) == service["metadata"]["name"].endswith("-admin")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("server.maxBatsh=8", "Additional property maxBatsh is not allowed"),
        ("image.digest=latest", "image.digest"),
        ("bundles.path=../other", "bundles.path"),
        ("auth.jwt.issuer=https://issuer.example", "auth.jwt.audience"),
        ("adminStore.existingSecret=", "nobody could be told apart"),
        ("bundles.volume=null", "there is no bundle to serve"),
        ("tls.clientCa=true", "tls.clientCa needs tls.existingSecret"),
        (
            "bundles.alias=prod,adminStore.existingSecret=,auth.insecure=true",
            "bundles.alias is part of the admin state",
        ),
        ("bundles.first=one", "bundles.first is the bundle of bundles.alias"),
        ("server.options.bundle=x", "server.options"),
        ("autoscaling.enabled=true,autoscaling.inFlightRows=0,autoscaling.cpuPercent=null", "autoscaling"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(setting, message) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        render("--values", CHART / "ci" / "minimal-values.yaml", "--set", setting)


def test_every_setting_is_described_and_nothing_else_is() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))

    def compare(described: dict[str, Any], given: Any, path: str) -> None:
        if isinstance(given, dict) and "properties" in described and described.get("additionalProperties") is False:
            assert set(described["properties"]) - {"global"} == set(given), path
            for name, value in given.items():
                compare(described["properties"][name], value, f"{path}.{name}")

    assert schema["additionalProperties"] is False
    resources = schema["properties"]["resources"]
    del resources["properties"]["claims"]  # of Kubernetes' own, and left out by default
    compare(schema, values, "values")


def test_an_overloaded_pod_is_well_above_what_the_autoscaler_wants() -> None:
    # It refuses what would be more than a batch that runs and those that may stand, so a higher target adds no pod.
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    most = Settings.max_batch * (1 + STANDING_BATCHES)
    assert values["autoscaling"]["inFlightRows"] * 2 < most


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert str(chart["appVersion"]) == PYPROJECT["project"]["version"]


# --- alerts and the dashboard ---


@cache
def metric_labels() -> dict[str, set[str]]:
    """Labels of every series that a server exports, by name."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
    metrics = Metrics()
    catalogue = SimpleNamespace(revision=0, item_ids=[], gone=[])
    manifest, retriever = SimpleNamespace(version="1", uuid="1"), SimpleNamespace(catalogue=catalogue)
    metrics.watch_arms(lambda: {"primary": SimpleNamespace(manifest=manifest, retriever=retriever)})
    labels = {sample.name: set(sample.labels) for metric in metrics.registry.collect() for sample in metric.samples}
    # A metric with labels has no sample before something was counted.
    for collector in vars(metrics).values():
        if isinstance(collector, Counter | Gauge | Histogram):
            (described,) = collector.describe()
            for suffix in suffixes[described.type]:
                own = {"le"} if suffix == "_bucket" else set()
                labels[described.name + suffix] = own | set(collector._labelnames)
    return {name: own for name, own in labels.items() if not name.endswith("_created")}


def check_expression(expression: str) -> None:
    """A server exports every metric with the labels, and the values of labels, that a PromQL expression names."""
    labels, source = metric_labels(), serving_source()
    known = set()
    for name, matchers in re.findall(r"\b((?:genretrieval|process)_\w+)(?:\{([^}]*)\})?", expression):
        assert name in labels, f"there is no metric {name}: {expression}"
        known |= labels[name] | TARGET_LABELS
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
            assert label in labels[name] | TARGET_LABELS, f"{name} has no label {label}: {expression}"
            if label in {"arm", "outcome", "state", "transport"}:
                words = value.split("|") if "~" in operator else [value]
                assert all(f'"{word}"' in source for word in words), f"nothing sets {label} to {value}: {expression}"
    for grouped in re.findall(r"(?:by|ignoring|on) \(([^)]*)\)", expression):
        assert set(grouped.replace(" ", "").split(",")) <= known | TARGET_LABELS, f"no such label: {expression}"


@cache
def serving_source() -> str:
    return "".join(path.read_text("utf-8") for path in (ROOT / "serving").rglob("*.py"))


@pytest.fixture(scope="module")
def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CHART / "files" / "rules.yaml").read_text("utf-8"))["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "genretrieval.json").read_text("utf-8"))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_alerts_and_the_dashboard_ask_for_what_a_server_exports(alerts, dashboard) -> None:
    for expression in [*(alert["expr"] for alert in alerts), *expressions(dashboard)]:
        check_expression(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("genretrieval_requests_total", "no metric"),
        ("sum by (arm) (genretrieval_queue_depth)", "no such label"),
        ('genretrieval_keyword_slots{status="free"}', "no label status"),
        ('genretrieval_keyword_slots{state="mislaid"}', "nothing sets state to mislaid"),
    ],
)
def test_an_expression_that_asks_for_something_else_is_noticed(expression, message) -> None:
    with pytest.raises(AssertionError, match=message):
        check_expression(expression)


def test_every_metric_is_shown(dashboard) -> None:
    shown = " ".join(expressions(dashboard))
    families = {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in metric_labels() if "genretrieval" in name}
    assert [name for name in sorted(families) if name not in shown] == []


def test_every_alert_has_a_section_in_the_runbook(alerts) -> None:
    headings = re.findall(r"^### (Genretrieval\w+)$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    assert headings == [alert["alert"] for alert in alerts]
    for alert in alerts:
        page, anchor = alert["annotations"]["runbook_url"].split("/blob/main/")[1].split("#")
        assert ROOT / page == RUNBOOK
        assert anchor == alert["alert"].lower()
        assert alert["labels"]["severity"] in {"critical", "warning"}


def test_every_alert_is_seen_to_fire(alerts) -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules.test.yaml").read_text("utf-8"))["tests"]
    fires = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fires == {alert["alert"] for alert in alerts}
    tool("promtool", "test", "rules", DEPLOY / "prometheus" / "rules.test.yaml")


def test_prometheus_reads_its_configuration() -> None:
    tool("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yaml")


def test_prometheus_understands_the_dashboard(dashboard, tmp_path) -> None:
    asked = [text.replace("$__rate_interval", "1m").replace("$namespace", ".*") for text in expressions(dashboard)]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(asked)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), "utf-8")
    tool("promtool", "check", "rules", tmp_path / "rules.yaml")


def test_panels_do_not_lie_on_one_another(dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
