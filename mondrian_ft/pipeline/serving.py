"""The advisor service: from the config to values, and the server, until it is stopped."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import registry
from ..data.example import strip_example
from ..data.prompt import build_prompt
from ..data.store import JobStore, advisor_id
from ..errors import (
    AdapterError,
    ConfigError,
    ModelError,
    MondrianError,
    ServerError,
    nearest,
)
from ..files import atomic_write_text
from ..report import screen
from . import versioning
from .places import VISION_FEATURES

if TYPE_CHECKING:
    import socket

    from .. import tasks
    from ..config import Config
    from ..run import Run
    from ..serving.app import Service
    from ..serving.jobs import JobTable
    from ..serving.planning import Persona
    from ..serving.protocol import Model

MakeModel = Callable[["tasks.Serve", "Config", "Run"], "Model"]
START_SECONDS = 600.0
"""An adapter that is not proven by then is taken for one that cannot be loaded."""
SERVED = "qwen3_vl"
"""``model.qwen3_vl.Qwen3VL.model_type``, without importing MLX here."""


def serve(task: tasks.Serve, config: Config, run: Run, make_model: MakeModel | None = None) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    With ``model_mode`` ``fine_tuned`` or ``ab_test`` it listens once the adapters are loaded and
    proven; the base alone is answered with 202 on /health while it loads.

    Args:
        make_model: makes the model's process; None is the real one.

    Raises:
        AdapterError: a tuned model is wanted and there is none, or it cannot be loaded.
        ModelError: the base is of an architecture that is not served.
        DataError, ServerError: the database, the state folder or the port cannot be used.
    """
    from ..serving import ab, local

    hide_token(config, run)
    if task.model_mode != "base" and not arms_of(task, config):
        raise AdapterError(
            f"task.model_mode={task.model_mode} needs an adapter; set task.adapter to an adapter "
            "directory, or to a version or channel of the registry."
        )
    _check_served(config)
    for name in arms_of(task, config):
        check_adapter(name, config)
    _allow_connections(config.serve.max_requests)
    state = Path(config.serve.state_dir)
    secret = ab.secret_of(state)
    started = time.time()
    with _alone(state):
        jobs = job_table(task, state)
        model = (make_model or _supervisor)(task, config, run)
        service = build(task, config, model, secret, jobs, log=_log)
        if jobs is not None and (left := jobs.recover()):
            run.warn(f"jobs that an earlier run of the service left open have failed: {len(left)}")
        if bare := _without_adapter(task, service):
            run.warn(
                f"no adapter for {', '.join(bare)}: with model_mode={task.model_mode} requests for "
                "them are refused unless they ask for mode=base; set task.adapter, or "
                "serve.adapters for each"
            )
        if not local.is_loopback(task.host) and token_of(config) is None:
            run.warn(
                f"task.host={task.host} lets everyone who reaches this machine ask; set "
                f"{config.serve.token_env} to a token"
            )
        with suppress(KeyboardInterrupt):
            asyncio.run(_serve(task, config, run, service))
    run.record(served=service.desk.tally.report(since=started))


def _check_served(config: Config) -> None:
    """Refuse what the model's process would refuse, before anybody waits for it."""
    path = config.model.path
    if path is None:
        return
    file = Path(path).expanduser() / "config.json"
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return  # not here, or damaged: the model's process says so
    if kind != SERVED:
        raise ModelError(
            f"{path} is a {kind} model; the service answers with {SERVED} models alone, since "
            "others have no batches that rows can join"
        )


async def _serve(task: tasks.Serve, config: Config, run: Run, service: Service) -> None:
    """Start the model, listen, and stop both in the end."""
    from ..serving import local
    from ..serving.app import make_app
    from ..serving.patience import run_until_stopped

    model = service.desk.model
    app = make_app(service)
    await model.start()
    try:
        if task.model_mode != "base":
            await _proven(task, config, model)
        listening: socket.socket = local.listen(task.host, task.port)
        with listening:
            said = run.console.print
            said(f"\nThe advisor service, model_mode={task.model_mode}:", markup=False)
            said(f"  {local.url_of(task.host, listening)}", style="bold", markup=False)
            said("Ctrl-C stops it.", markup=False)
            await run_until_stopped(app, listening, backlog=config.serve.max_requests)
    finally:
        await model.stop()


async def _proven(task: tasks.Serve, config: Config, model: Model) -> None:
    """Wait until every adapter that is to answer was loaded and proven.

    Raises:
        AdapterError: one was not.
    """
    from ..serving.protocol import State

    wanted = arms_of(task, config)
    until = asyncio.get_running_loop().time() + START_SECONDS
    while (status := model.status()).state is State.loading:
        if asyncio.get_running_loop().time() > until:
            raise AdapterError(f"The model was not loaded within {START_SECONDS:.0f} seconds.")
        await asyncio.sleep(0.02)
    if status.state is not State.ready:
        raise AdapterError(status.reason or f"The model is {status.state}.")
    there = {one.arm for one in status.arms if one.hash is not None}
    if absent := sorted(wanted - there):
        raise AdapterError(
            f"The model's process is ready without the adapter {absent[0]}; it was not loaded."
        )


def build(
    task: tasks.Serve,
    config: Config,
    model: Model,
    secret: bytes,
    jobs: JobTable | None,
    *,
    log: Callable[[str], object],
) -> Service:
    """What the routes need, from the config; ``log`` takes one line a request."""
    from ..serving.ab import Mode, Router
    from ..serving.advising import Desk, Settings
    from ..serving.app import Service
    from ..serving.front import Limits
    from ..serving.intake import Folders
    from ..serving.tally import FILE, Tally

    serve = config.serve
    adapters = {advisor_id(name) or name: arm for name, arm in (serve.adapters or {}).items()}
    router = Router(Mode(task.model_mode), task.ab_test_split, task.adapter, adapters, secret)
    database, source = _data(task, config)
    people = personas(config, database, tuple(adapters))
    default = advisor_id(config.data.advisor)
    settings = Settings(
        max_queue=serve.max_queue,
        deadline=serve.deadline,
        max_tokens=serve.max_tokens,
        constrained=serve.constrained,
        default_advisor=default if default in people else next(iter(people)),
    )
    most = serve.max_upload_mb * 1_000_000
    # In base64 a photograph is a third longer.
    limits = Limits(
        body=most * 4 // 3 + 1_000_000,
        seconds=serve.upload_seconds,
        requests=serve.max_requests,
        host=task.host,
        hosts=tuple(serve.hosts),
        token=token_of(config),
    )
    folders = [Path(one) for one in (source, serve.upload_dir) if one is not None]
    state = Path(serve.state_dir)
    desk = Desk(
        model,
        router,
        people,
        settings,
        catalog=lambda: catalog(config),
        jobs=jobs,
        tally=Tally(state / FILE, task.ab_test_split),
        uploads=_uploads(task, config),
    )
    return Service(desk, Folders(folders, Path.cwd()), state, limits, most, log)


def _uploads(task: tasks.Serve, config: Config) -> Path | None:
    """Where uploaded photographs are kept.

    Raises:
        ConfigError: they are to be kept without a row that names them.
    """
    serve = config.serve
    if not serve.keep_uploads or serve.upload_dir is None:
        return None
    if task.db_path is None:
        raise ConfigError(
            "serve.keep_uploads=true keeps photographs for the rows of a job database, and there "
            "is none; set task.db_path."
        )
    return Path(serve.upload_dir)


def _log(line: str) -> None:
    """At once: a pipe or a file would else get the lines of an hour ago."""
    print(line, flush=True)


def _data(task: tasks.Serve, config: Config) -> tuple[Path | None, Path | None]:
    """The database that prompts are read from, and the folder of photographs."""
    data = config.data
    if data.db_path is None:
        from ..sample import sample_data

        sample = sample_data(data.seed, Path("outputs/cache/sample").absolute())
        return Path(task.db_path or sample.db_path), sample.source_dir
    first = data.db_path[0] if isinstance(data.db_path, list) else data.db_path
    return Path(task.db_path or first), Path(data.source_dir) if data.source_dir else None


def personas(config: Config, database: Path | None, more: Sequence[str] = ()) -> dict[str, Persona]:
    """The advisors of a database and ``more`` ids, with their prompts, as training had them.

    Raises:
        ConfigError: there is none, or one of ``more`` is none of the database's.
    """
    from ..serving.planning import Persona

    store = JobStore(database) if database is not None else None
    names = store.advisors() if store else {}
    for name in more if names else ():
        if name not in names:
            meant = nearest(name, names)
            hint = f"did you mean {meant}?" if meant else f"it has {', '.join(names)}."
            raise ConfigError(f"serve.adapters.{name}: {database} has no such advisor; {hint}")
    own = advisor_id(config.data.advisor)
    for name in (own, *more):
        if name is not None:
            names.setdefault(name, name)
    if not names:
        raise ConfigError(f"{database} names no advisor; set data.advisor.")
    found = {}
    for name, shown in names.items():
        prompt, source = build_prompt(store, name)
        if config.data.prompt_example.value == "strip":
            prompt = strip_example(prompt)
        found[name] = Persona(name, shown, prompt, source)
    return found


def job_table(task: tasks.Serve, state: Path) -> JobTable | None:
    """The job database to write, if there is one.

    Raises:
        DataError, ServerError: it is none, or was not migrated.
    """
    from ..serving.jobs import JobTable

    return JobTable(Path(task.db_path), service_id(state)) if task.db_path else None


def service_id(state: Path) -> str:
    """What ``jobs.generated_by`` says; drawn once and kept in ``<state>/service_id``."""
    path = state / "service_id"
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        name = f"mondrian_ft-{secrets.token_hex(6)}"
        atomic_write_text(path, name + "\n")
        return name
    except (OSError, UnicodeError) as error:
        raise ServerError(f"{path} cannot be read: {error}.") from None


def catalog(config: Config) -> list[str]:
    """The versions and channels of the registry, and the arms that the service was given."""
    found = registry.versions(Path(config.registry.root), versioning.registry_name(config))
    names = [version.version for version in found]
    channels = sorted({channel for version in found for channel in version.channels})
    return [*channels, *names]


def check_adapter(name: str, config: Config) -> None:
    """Whether an adapter can be found, before anything is loaded.

    Raises:
        AdapterError: there is none; a version of the registry is verified file by file.
    """
    try:
        folder = versioning.find_adapter(name, config)
    except MondrianError as error:
        raise AdapterError(f"The adapter {name} cannot be served: {error}") from None
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"The adapter {name} cannot be served: there is no adapter_model.safetensors in "
            f"{folder}; name a version or channel of registry.name="
            f"{versioning.registry_name(config)}, or an adapter directory, such as "
            f"{config.registry.root}/<another name>/v1."
        )


def _without_adapter(task: tasks.Serve, service: Service) -> list[str]:
    """The advisors for whom a service that is to be tuned has only the base."""
    if task.model_mode == "base":
        return []
    router = service.desk.router
    return [name for name in service.desk.personas if router.tuned(name) is None]


def arms_of(task: tasks.Serve, config: Config) -> set[str]:
    """The adapters that the service is told to answer with."""
    named = [task.adapter, *(config.serve.adapters or {}).values()]
    return {name for name in named if name is not None}


def token_of(config: Config) -> str | None:
    """The token that requests must send; None asks for none."""
    return config.serve.token or os.environ.get(config.serve.token_env) or None


def hide_token(config: Config, run: Run) -> None:
    """Take the token out of what Hydra wrote into the run folder."""
    if config.serve.token is None:
        return
    for path in sorted((run.folder / ".hydra").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if config.serve.token in text:
            atomic_write_text(path, text.replace(config.serve.token, "***"))


def _allow_connections(count: int) -> None:
    """Let the process open so many sockets; macOS gives 256 files where nothing is said."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _alone:
    """Holds a service's folder for one process: two would write each other's jobs."""

    def __init__(self, state: Path) -> None:
        self._path = state / "lock"

    def __enter__(self) -> None:
        import fcntl

        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ServerError(
                f"Another service uses {screen.near(self._path.parent)}; stop it, or set "
                "serve.state_dir to another folder."
            ) from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _supervisor(task: tasks.Serve, config: Config, run: Run) -> Model:
    """The real model's process."""
    from ..sample import MODEL_NAME, model_dir
    from ..serving.supervisor import Supervisor
    from ..serving.wire import Setup

    root, name = versioning.where(config)
    setup = Setup(
        model=str(config.model.path or model_dir()),
        name=config.model.path or MODEL_NAME,
        dtype=str(config.model.dtype),
        quantize_bits=config.model.quantize_bits,
        other_precision=config.model.allow_other_precision,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        arms=tuple(sorted(arms_of(task, config))),
        registry_root=str(root.absolute()),
        registry_name=name,
        features_dir=str(VISION_FEATURES.absolute()),
    )
    if config.serve.max_tokens is not None:
        setup = replace(setup, max_tokens=config.serve.max_tokens)
    return Supervisor(setup, max_queue=config.serve.max_queue)
