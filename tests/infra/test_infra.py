"""infra/ against what it names (Dockerfile, code, metrics, schemas), and by the makers' own tools where they are installed."""

from __future__ import annotations

import ast
import functools
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COMPOSE, GPU = INFRA / "compose.yaml", INFRA / "compose.gpu.yaml"
DOCKERFILE = (INFRA / "Dockerfile").read_text()
MAY_BE_EMPTY = {"VISITOR_SCOPES"}
SECRETS = re.compile(r"PASSWORD|SECRET|KEY|HASH|TOKEN")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(COMPOSE)["services"]
    return found


def example() -> dict[str, str]:
    lines = (INFRA / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def variables() -> dict[str, list[str]]:
    """Every ${NAME...} of the compose files, with what follows the name each time."""
    found: dict[str, list[str]] = {}
    for path in (COMPOSE, GPU):
        text = "\n".join(line.split(" #")[0] for line in path.read_text().replace("$$", "").splitlines())
        for name, rest in re.findall(r"\$\{([A-Za-z_]+)([^}]*)\}", text):
            found.setdefault(name, []).append(rest)
    return found


def filled(tmp_path: Path) -> Path:
    """.env.example as somebody fills it in."""
    text = (INFRA / ".env.example").read_text()
    path = tmp_path / "env"
    values = {"CHAT_NAME": "chat.example.org", "FLOWS_NAME": "flows.example.org", "RECORDS_NAME": "records.example.org"}
    text = re.sub(r"^([A-Z_]+)=$", lambda m: f"{m[1]}={values.get(m[1], '1000')}", text, flags=re.M)
    path.write_text(text.replace("DESK_PASSWORD_HASH=1000", "DESK_PASSWORD_HASH='$2a$14$abc'"))
    return path


def program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"{names[0]} is not installed: this check does NOT run here")


# -- compose ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPOSE, GPU], ids=lambda path: path.name)
def test_the_compose_specification_knows_every_word(path: Path) -> None:
    import jsonschema

    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validate(read(path), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"a": {"imagee": "x"}}}, schema)


def test_every_variable_stands_in_the_example_and_the_reverse() -> None:
    assert variables().keys() == example().keys()
    assert set(example().values()) == {""}, "the example gives no value away"


def test_an_empty_secret_stops_everything() -> None:
    for name, uses in variables().items():
        if name in MAY_BE_EMPTY:
            continue
        assert any(rest.startswith(":?") and len(rest) > 4 for rest in uses), f"{name} may be empty"
        assert all(rest == "" or rest.startswith(":?") for rest in uses), f"{name} has a default"


def test_no_secret_is_written_down() -> None:
    for name, service in services().items():
        for key, value in service.get("environment", {}).items():
            if SECRETS.search(key):
                assert re.search(r"\$\{\w+", str(value)) or key.startswith("PREFECT_SERVER_"), f"{name}: {key}={value}"


def test_only_the_proxy_is_reached_from_outside() -> None:
    assert [name for name, service in services().items() if "ports" in service] == ["proxy"]
    networks = read(COMPOSE)["networks"]
    assert {name for name, network in networks.items() if (network or {}).get("internal")} == {"chat", "pages", "data"}
    assert not {"flows", "pages"} & set(services()["service"]["networks"]), "the public service sees Prefect or MLflow"
    assert "data" not in services()["proxy"]["networks"]


def test_every_service_that_stays_has_a_healthcheck() -> None:
    stays = {name for name, service in services().items() if service["restart"] != "no"}
    assert services().keys() - stays == {"setup"}
    assert {name for name, service in services().items() if "test" in service.get("healthcheck", {})} == stays


def test_what_is_waited_for_and_joined_exists() -> None:
    whole = read(COMPOSE)
    for name, service in services().items():
        for other, condition in service.get("depends_on", {}).items():
            assert other in whole["services"], f"{name} waits for {other}"
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in whole["services"][other]
        assert set(service["networks"]) <= whole["networks"].keys()
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                source = volume.split(":")[0]
                assert source in whole["volumes"] or (INFRA / source).exists(), f"{name}: {source}"
    assert read(GPU)["services"].keys() <= whole["services"].keys()


def test_images_have_a_version() -> None:
    for name, service in services().items():
        if "build" not in service:
            assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", service["image"]), f"{name}: {service['image']}"
    for image in re.findall(r"^FROM (\S+) AS|--from=(\S+)", DOCKERFILE, flags=re.M):
        name = image[0] or image[1]
        assert ":" in name or name in targets(), name


def test_pools_are_those_of_prefect_yaml() -> None:
    wanted = {each["work_pool"]["name"] for each in read(ROOT / "prefect.yaml")["deployments"]}
    started = {
        command[command.index("--pool") + 1]
        for service in services().values()
        if "--pool" in (command := service.get("command", []))
    }
    made = ast.literal_eval(re.search(r"^POOLS = (.*)$", (INFRA / "setup.py").read_text(), flags=re.M)[1])  # type: ignore[index]
    assert wanted == started == set(made)


def test_docker_compose_reads_both_files(tmp_path: Path) -> None:
    compose = shutil.which("docker-compose")
    if compose:
        command = [compose]
    elif subprocess.run([program("docker"), "compose", "version"], capture_output=True).returncode == 0:
        command = ["docker", "compose"]
    else:
        pytest.skip("docker compose is not installed: its own check does NOT run here")
    files = ["-f", str(COMPOSE), "-f", str(GPU), "config", "--format", "json"]
    env = {key: value for key, value in os.environ.items() if key not in example()}
    good = subprocess.run([*command, "--env-file", filled(tmp_path), *files], capture_output=True, text=True, env=env)
    assert good.returncode == 0, good.stderr
    whole = json.loads(good.stdout)["services"]
    assert whole["trainer"]["build"]["target"] == "gpu-worker"
    assert whole["trainer"]["environment"]["THUMBWHEEL_DATABASE_URL"], "the GPU file adds, and replaces nothing"
    assert whole["proxy"]["environment"]["DESK_PASSWORD_HASH"] == "$$2a$$14$$abc"  # as config shows a literal $
    empty = subprocess.run(
        [*command, "--env-file", INFRA / ".env.example", *files], capture_output=True, text=True, env=env
    )
    assert "is missing a value" in empty.stderr
    assert not empty.stdout


# -- Dockerfile ---------------------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, flags=re.M))


def stage(name: str) -> str:
    return re.split(r"^FROM ", DOCKERFILE.split(f" AS {name}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def test_targets_exist_and_do_not_run_as_root() -> None:
    named = {
        service["build"]["target"]
        for path in (COMPOSE, GPU)
        for service in read(path)["services"].values()
        if "build" in service
    }
    assert named == {"service", "worker", "gpu-worker"} <= targets()
    for name in named:
        assert "USER thumbwheel" in stage(name)


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    allowed = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.M) for source in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_uv_is_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"UV_VERSION := (\S+)", makefile)[1] == re.search(r"/uv:(\S+)", DOCKERFILE)[1]  # type: ignore[index]


# import name -> what is installed, where they differ
DISTRIBUTIONS = {"yaml": "pyyaml", "markdown_it": "markdown-it-py", "psycopg": "psycopg[binary]"}
OPTIONAL = {"triton", "gguf", "transformers", "peft"}  # where a machine has them


def test_the_service_image_installs_what_the_service_imports() -> None:
    installed = set(re.findall(r"[\w\[\]-]+", stage("service").split("constraints.txt", 1)[1].split("COPY")[0]))
    pinned = {re.split(r"[=\[ ]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    needed = set()
    for path in [*(ROOT / "feedback").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                needed.add(node.module.split(".")[0])
    needed -= {*sys.stdlib_module_names, "feedback", "models", *OPTIONAL}
    wanted = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in needed}
    assert wanted <= installed, wanted - installed
    assert {name.split("[")[0] for name in installed} <= pinned


# -- commands -----------------------------------------------------------------------------------------------------


@functools.cache  # a help text takes seconds
def options(*command: str) -> str:
    env = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-m", *command, "--help"], capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("name", ["service", "worker", "trainer", "prefect", "prefect-services", "mlflow"])
def test_commands_have_these_options(name: str) -> None:
    command = [str(part) for part in services()[name]["command"]]
    words = command[2:] if command[:2] == ["python", "-m"] else command
    given = [word for word in words if word.startswith("--")]
    program = words[: next((place for place, word in enumerate(words) if word.startswith("--")), len(words))]
    text = options(*program)
    for option in given:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{' '.join(program)} knows no {option}"


def test_python_modules_of_commands_exist() -> None:
    for service in services().values():
        command = service.get("command", [])
        if command[:2] == ["python", "-m"]:
            assert (ROOT / (command[2].replace(".", "/") + ".py")).exists(), command
        elif command[:1] == ["python"]:
            assert (ROOT / command[1]).exists(), command


def test_prefect_knows_these_settings() -> None:
    from prefect.settings.models.root import Settings

    known = set()

    def walk(model: Any, prefix: str) -> None:
        for key, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation, f"{prefix}_{key.upper()}")
            known.add(f"{prefix}_{key.upper()}")
            for alias in getattr(field.validation_alias, "choices", []):
                if isinstance(alias, str):
                    known.add(alias.upper())

    walk(Settings, "PREFECT")
    used = {key for service in services().values() for key in service.get("environment", {}) if key[:8] == "PREFECT_"}
    used = {key for key in used if not key.startswith("PREFECT_REDIS_") and key != "PREFECT_DB_PASSWORD"}
    assert used <= known, used - known


def test_the_parts_know_these_settings() -> None:
    from feedback.identity import SECRET
    from feedback.settings import Settings
    from flows.environment import Environment

    ours = {f"THUMBWHEEL_{key.upper()}" for model in (Settings, Environment) for key in model.model_fields} | {SECRET}
    merged = [*services().values(), *read(GPU)["services"].values()]
    used = {key for service in merged for key in service.get("environment", {}) if key.startswith("THUMBWHEEL_")}
    assert used <= ours, used - ours
    address = services()["proxy"]["networks"]["chat"]["ipv4_address"]
    assert services()["service"]["environment"]["THUMBWHEEL_TRUSTED_PROXIES"] == address


# -- PostgreSQL, the proxy, alerts --------------------------------------------------------------------------------


NAMES = ("prefect", "mlflow", "feedback")
PASSWORD = 'it\'s "one"'


@pytest.fixture
def made(postgres_server: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """What postgres.sh makes: where it is, as psycopg's arguments and as an environment for PostgreSQL's programs."""
    import psycopg

    program("psql")
    where = psycopg.conninfo.conninfo_to_dict(postgres_server.replace("+psycopg", ""))
    env = {**os.environ, "PGHOST": str(where["host"]), "PGPORT": str(where["port"]), "PGUSER": str(where["user"])}
    env |= {"POSTGRES_USER": env["PGUSER"], **{f"{name.upper()}_DB_PASSWORD": PASSWORD for name in NAMES}}
    try:
        make(env)
        yield where, env
    finally:
        drop(postgres_server)


def make(env: dict[str, str]) -> None:
    subprocess.run(["sh", str(INFRA / "postgres.sh")], check=True, env=env, capture_output=True)


def drop(postgres_server: str) -> None:
    import psycopg

    with psycopg.connect(postgres_server.replace("+psycopg", ""), autocommit=True) as connection:
        for name in NAMES:
            connection.execute(f"DROP DATABASE IF EXISTS {name}")
            connection.execute(f"DROP ROLE IF EXISTS {name}")


def test_postgres_gets_its_users_and_databases(made: tuple[dict[str, Any], dict[str, str]]) -> None:
    import psycopg

    where, _ = made
    for name in NAMES:
        with psycopg.connect(**{**where, "dbname": name, "user": name, "password": PASSWORD}) as connection:
            connection.execute("CREATE TABLE t (a int)")
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        psycopg.connect(**{**where, "dbname": "prefect", "user": "feedback"})


def test_what_the_runbook_dumps_it_restores(
    made: tuple[dict[str, Any], dict[str, str]], postgres_server: str, tmp_path: Path
) -> None:
    from feedback import keys
    from feedback.store import Store

    where, env = made
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    dump = re.search(r"(pg_dump) -U postgres (\S+) \$name", runbook)
    restore = re.search(r"(pg_restore) -U postgres (.+) -d \$name", runbook)
    assert dump and restore
    url = f"postgresql+psycopg://feedback@{where['host']}:{where['port']}/feedback"

    def store() -> Store:
        opened = Store(url)
        opened.migrate()
        return opened

    before = store()
    with before.write() as connection:
        keys.create(connection, "one", ["chat"], "me", None)
    before.close()
    saved = tmp_path / "feedback.dump"
    with saved.open("wb") as file:
        subprocess.run([program(dump[1]), *dump[2].split(), "feedback"], check=True, env=env, stdout=file)
    drop(postgres_server)
    make(env)  # as an empty volume has it
    with saved.open("rb") as file:
        subprocess.run([program(restore[1]), *restore[2].split(), "-d", "feedback"], check=True, env=env, stdin=file)
    after = store()
    try:
        with after.write() as connection:  # the tables are its user's again
            assert keys.create(connection, "two", ["chat"], "me", None)[0].id == 2
            assert [key.name for key in keys.listed(connection)] == ["one", "two"]
    finally:
        after.close()


def test_caddy_is_told_what_it_asks_for_and_logs_in_before_the_pages() -> None:
    text = (INFRA / "Caddyfile").read_text()
    assert set(re.findall(r"\{\$(\w+)\}", text)) == services()["proxy"]["environment"].keys()
    blocks = dict(re.findall(r"^\{\$(\w+)\} \{\n(.*?)^\}", text, flags=re.M | re.S))
    for name, where in {"FLOWS_NAME": "prefect:4200", "RECORDS_NAME": "mlflow:5000"}.items():
        assert "import login" in blocks[name]
        assert f"reverse_proxy {where}" in blocks[name]
    assert {match.split(":")[0] for match in re.findall(r"reverse_proxy (\S+)", text)} <= services().keys()


def test_caddy_takes_its_file(tmp_path: Path) -> None:
    caddy = program("caddy")
    version = subprocess.run([caddy, "version"], capture_output=True, text=True).stdout
    if int(re.findall(r"\d+", version)[1]) < 8:
        pytest.skip(f"Caddy {version.strip()} is too old for basic_auth: its own check does NOT run here")
    digest = "$2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG"
    env = {"CHAT_NAME": "a.example.org", "FLOWS_NAME": "b.example.org", "RECORDS_NAME": "c.example.org"}
    env |= {"DESK_USER": "desk", "DESK_PASSWORD_HASH": digest, "HOME": str(tmp_path)}
    command = [caddy, "validate", "--adapter", "caddyfile", "--config", str(INFRA / "Caddyfile")]
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr


def alerts() -> list[dict[str, Any]]:
    return [rule for group in read(INFRA / "alerts.yaml")["groups"] for rule in group["rules"]]


def exported() -> set[str]:
    """The names of all series that /metrics has, by the code that makes them."""
    from types import SimpleNamespace

    from feedback.metrics import Metrics, gauges

    metrics = Metrics()
    waiting = SimpleNamespace(qsize=lambda: 0)
    service = SimpleNamespace(writer=SimpleNamespace(queue=waiting), tasks=[], engine=SimpleNamespace(model_hash=None))
    metrics.watch(SimpleNamespace(**vars(service), store=None))
    names = {family.name for family in gauges(None)}
    metrics.requests.labels("GET", "/", 200).inc()
    metrics.seconds.labels("GET", "/").observe(1)
    for collector in (metrics.requests, metrics.seconds):
        names |= {sample.name for family in collector.collect() for sample in family.samples}
    return names | set(metrics.registry._names_to_collectors)


def test_alerts_ask_for_metrics_that_exist() -> None:
    names = exported()
    for rule in alerts():
        asked = set(re.findall(r"\bthumbwheel_\w+", rule["expr"]))
        assert asked <= names, f"{rule['alert']}: {asked - names}"
        assert asked or "up{" in rule["expr"]


def test_every_alert_has_its_paragraph() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    headings = set(re.findall(r"^### (\w+)$", runbook, flags=re.M))
    assert headings == {rule["alert"] for rule in alerts()}
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_promtool_takes_the_rules() -> None:
    found = subprocess.run([program("promtool"), "check", "rules", str(INFRA / "alerts.yaml")], capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
