"""Which processes `baton up` starts and how they are told about each other. Nothing is started here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from servicekit.process_env import threads_per_worker

Role = Literal["router", "prefill", "decode"]

DRAIN_S = 8.0  # after the signal, for running requests to finish
WORKER_HOST = "127.0.0.1"  # workers of one machine meet there, whatever address the router listens on

MODULES: Mapping[Role, str] = {"router": "router", "prefill": "prefill_svc", "decode": "decode_svc"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    model_dir: Path
    served_model_name: str
    run_id: str  # tells this run's workers from those of others at the same Redis
    host: str = "127.0.0.1"
    port: int = 8000
    num_prefill: int = 1  # workers; 0: decode workers compute the prompts themselves
    num_decode: int = 1  # groups
    ep_size: int = 1  # processes in each decode group
    threads_per_worker: int | None = None  # None: the cores are split between the workers of a role
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; each worker sees one, in turn
    tls_dir: Path | None = None  # as `baton certs` writes it; None: plain HTTP and gRPC
    disk_kv_dir: Path | None = None  # each worker gets a directory of its own below it
    router_settings: Mapping[str, str] = field(default_factory=dict)  # field name -> value
    worker_settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_prefill < 0:
            raise ValueError(f"--prefill {self.num_prefill}: must be at least 0")
        for option, value in (("--decode", self.num_decode), ("--ep-size", self.ep_size)):
            if value < 1:
                raise ValueError(f"{option} {value}: must be at least 1")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: must be 1 to 65535")
        if self.threads_per_worker is not None and self.threads_per_worker < 1:
            raise ValueError(f"--threads {self.threads_per_worker}: must be at least 1")
        if not all(self.gpus):
            raise ValueError("--gpus: must be names or numbers of devices, comma-separated")

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host
        return f"{'https' if self.tls_dir else 'http'}://{host}:{self.port}"

    @property
    def ca_file(self) -> Path | None:
        return self.tls_dir / "ca.pem" if self.tls_dir else None

    def with_model(self, model_dir: Path) -> UpOptions:
        return replace(self, model_dir=model_dir, served_model_name=self.served_model_name or model_dir.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    name: str  # unique in one run, also the name of the log file
    role: Role
    environment: Mapping[str, str]  # on top of what every child inherits
    address: str  # host:port that it serves: HTTP for the router, gRPC for workers
    metrics_address: str
    num_threads: int
    ep_rank: int = 0

    @property
    def module(self) -> str:
        return MODULES[self.role]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """Processes that live and die together: a router, a prefill worker, or all ranks of a decode group."""

    name: str
    role: Role
    members: tuple[ProcessSpec, ...]

    def with_rendezvous(self, address: str) -> GroupSpec:
        """The same group meeting at another address: a rank that is dying may still hold the old one."""
        if len(self.members) == 1:
            return self
        members = [
            replace(m, environment={**m.environment, "BATON_DECODE_EP_ADDRESS": address})
            for m in self.members
        ]
        return replace(self, members=tuple(members))


def plan_groups(
    options: UpOptions, redis_url: str, num_cpus: float, free_port: Callable[[], int]
) -> list[GroupSpec]:
    """Workers first, the router last. `free_port` is called once for each port that is needed.

    The workers of one role share the cores; the other role gets them all again: a prompt phase and the
    decoding that follows seldom peak together, and threads that wait sleep (docs/log.md).
    """
    planner = _Planner(options, redis_url, num_cpus, free_port)
    prefill = [planner.prefill(index) for index in range(options.num_prefill)]
    decode = [planner.decode(index) for index in range(options.num_decode)]
    return [*prefill, *decode, planner.router()]


class _Planner:
    def __init__(
        self, options: UpOptions, redis_url: str, num_cpus: float, free_port: Callable[[], int]
    ) -> None:
        self._options = options
        self._redis_url = redis_url
        self._num_cpus = num_cpus
        self._free_port = free_port
        self._gpus = itertools.cycle(options.gpus)

    def router(self) -> GroupSpec:
        o = self._options
        address = f"{o.host}:{o.port}"
        own = {"HOST": o.host, "PORT": o.port, "DRAIN_GRACE_S": DRAIN_S}
        environment = self._environment("ROUTER", {**own, **o.router_settings})
        spec = ProcessSpec(
            name="router",
            role="router",
            environment=environment,
            address=address,
            metrics_address=address,
            num_threads=1,
        )
        return GroupSpec(name="router", role="router", members=(spec,))

    def prefill(self, index: int) -> GroupSpec:
        name = f"prefill-{index}"
        return GroupSpec(name=name, role="prefill", members=(self._worker("prefill", name, {}, 0),))

    def decode(self, index: int) -> GroupSpec:
        name = f"decode-{index}"
        size = self._options.ep_size
        if size == 1:
            return GroupSpec(name=name, role="decode", members=(self._worker("decode", name, {}, 0),))
        rendezvous = f"{WORKER_HOST}:{self._free_port()}"
        members = []
        for rank in range(size):
            settings = {
                "GROUP_ID": self._unique(name),
                "EP_SIZE": size,
                "EP_RANK": rank,
                "EP_ADDRESS": rendezvous,
            }
            members.append(self._worker("decode", f"{name}.{rank}", settings, rank))
        return GroupSpec(name=name, role="decode", members=tuple(members))

    def _worker(
        self, role: Literal["prefill", "decode"], name: str, settings: Mapping[str, object], ep_rank: int
    ) -> ProcessSpec:
        o = self._options
        num_workers = o.num_prefill if role == "prefill" else o.num_decode * o.ep_size
        num_threads = o.threads_per_worker or threads_per_worker(num_workers, self._num_cpus)
        port, metrics_port = self._free_port(), self._free_port()
        own: dict[str, object] = {
            "WORKER_ID": self._unique(name),
            "PORT": port,
            "METRICS_PORT": metrics_port,
            "NUM_THREADS": num_threads,
            "DRAIN_S": DRAIN_S,
        }
        if o.disk_kv_dir is not None:
            # By name, not by worker id: the next run finds what this one kept.
            own["DISK_KV_DIR"] = o.disk_kv_dir / name
        environment = self._environment(role.upper(), {**own, **settings, **o.worker_settings})
        if o.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = next(self._gpus)
        return ProcessSpec(
            name=name,
            role=role,
            environment=environment,
            address=f"{WORKER_HOST}:{port}",
            metrics_address=f"{WORKER_HOST}:{metrics_port}",
            num_threads=num_threads,
            ep_rank=ep_rank,
        )

    def _tls(self, service: str) -> dict[str, Path]:
        directory = self._options.tls_dir
        if directory is None:
            return {}
        role = "router" if service == "ROUTER" else "worker"
        files = {"": role, "HTTP_": "http"} if role == "router" else {"": role}
        settings = {"TLS_CA": directory / "ca.pem"}
        for prefix, name in files.items():
            settings |= {
                f"{prefix}TLS_CERT": directory / f"{name}.pem",
                f"{prefix}TLS_KEY": directory / f"{name}.key",
            }
        return settings

    def _unique(self, name: str) -> str:
        return f"{name}-{self._options.run_id}"

    def _environment(self, service: str, settings: Mapping[str, object]) -> dict[str, str]:
        common = {
            "MODEL": self._options.model_dir,
            "SERVED_MODEL_NAME": self._options.served_model_name,
            "HOST": WORKER_HOST,
            "REDIS_URL": self._redis_url,
            "LOG_FORMAT": "json",
            **self._tls(service),
        }
        return {f"BATON_{service}_{name}": str(value) for name, value in {**common, **settings}.items()}
