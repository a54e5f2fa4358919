"""
Every key of the configuration: type, default, unit, bounds, description. The one place; the parser, `lazyfs config
show` and docs/configuration.md are made from it.

Layer: config. Who calls: everybody reads the dataclasses; config.loading makes them. All frozen; none holds a secret
(passwords are in files that are named here, and read by who needs them).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lazyfs import limits
from lazyfs.config.key import Key
from lazyfs.config.key import key as _key
from lazyfs.config.kinds import AbsolutePath, Address, Amount, Choice, Flag, Kind, Number, Paths, Size, Url
from lazyfs.config.mirrortable import Mirror
from lazyfs.config.peerstable import Peers
from lazyfs.config.trackertable import Tracker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_FILE = "/etc/lazyfs/config.toml"
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Daemon:
    """[daemon]"""

    run_dir: str = _key(AbsolutePath(), "/run/lazyfs",
                        "Sockets, records of mounts, private mount points. Must be empty after a reboot: a tmpfs. "
                        "`LAZYFS_RUN_DIR` sets it too.", restart=True)
    cache_dir: str = _key(AbsolutePath(), "/var/lib/lazyfs/cache",
                          "Where fetched data is kept, for the next start too; `lazyfs mount` without a daemon uses "
                          "it likewise.", restart=True)
    driver: str = _key(Choice(("auto", "erofs", "fuse")), "auto",
                       "How images reach the kernel, where an order does not say: erofs needs Linux 6.12, auto picks.")
    read_timeout_s: float = _key(Number(0.1, 3600), limits.READ_DEADLINE_S,
                                 "A read whose data has not come by then ends with an error.", unit="s")
    read_policy: str = _key(Choice(("error", "wait")), "error",
                            "What a read does whose source fails, or is late: end with an error, or ask again and "
                            "again, `read_timeout_s` each time, until its reader is killed or its image unmounted.")
    prefetch: bool = _key(Flag(), True, "Fetch what an image's start needs as soon as it is mounted.")
    prefetch_lists: bool = _key(Flag(), True,
                                "For an image without a hot part, look in its registry for a prefetch list beside it, "
                                "after the mount; what was found is kept with the image for a day.")
    prefetch_streams: int = _key(Number(1, 4, whole=True), 4,
                                 "Requests of prefetch under way at the same time; one image has as few as fill the "
                                 "link.")
    prefetch_rate: int = _key(Size(), 0,
                              "No more than this a second is fetched ahead, all images together; 0: no bound.",
                              unit="bytes/s")
    prefetch_max_bytes: int = _key(Size(), 0,
                                   "No more than this is fetched ahead of one image, compressed; 0: no bound.",
                                   unit="bytes")
    start_timeout_s: float = _key(Number(1, 600), 30.0,
                                  "A new worker that has not loaded by then is given up, and started again.", unit="s")
    heartbeat_s: float = _key(Number(0.1, 60), 1.0, "How often a worker gives its keeper a sign of life.", unit="s")
    hang_s: float = _key(Number(2, 3600), 10.0,
                         "A worker without a sign of life, or that answers nothing although it is asked, for that "
                         "long is killed and replaced. At least twice `heartbeat_s`.", unit="s")
    abort_s: float = _key(Number(10, 86400), 120.0,
                          "If no worker has served for that long, the connection is aborted: readers get errors, "
                          "instead of waiting for ever; images are to be mounted anew. More than `hang_s` and "
                          "`start_timeout_s` together.", unit="s")
    confine: bool = _key(Flag(), True,
                         "The worker gives up the rights that it does not need (docs/threat-model.md), and so do the "
                         "credential helpers that it starts; false: for helpers that need more, setuid programs for "
                         "example.")
    health_address: str = _key(Address(), "",
                               "Where `/healthz`, `/readyz` and `/metrics` are served over HTTP; empty: nowhere. A "
                               "port alone means loopback.")
    slow_read_s: float = _key(Number(0.001, 3600), 1.0,
                              "A read that takes as long is kept for `lazyfs trace`, and counted.", unit="s")


@dataclass(frozen=True)
class Cache:
    """[cache]"""

    quota_bytes: int = _key(Size(), 0, "Cached data above this is evicted, least recently used first, if it is not "
                                       "mounted; 0: no quota.", unit="bytes")
    free_floor_bytes: Amount = _key(Size(share=True), Amount(percent=5.0),  # noqa: RUF009 - frozen
                                    "So much of the cache's file system stays free: eviction begins below it, "
                                    "prefetch stops.", unit="bytes or %")
    evict_interval_s: float = _key(Number(1, 3600), 30.0, "How often both are looked at.", unit="s")
    scrub_interval_s: float = _key(Number(0, 366 * _DAY_S), 7 * _DAY_S,
                                   "Each device in the cache is looked through for damage that often; 0: never.",
                                   unit="s")
    scrub_rate: int = _key(Size(), 32 * limits.MIB,
                           "No more than this a second is read for it, when nobody else uses the disk; 0: no bound.",
                           unit="bytes/s")
    verify_reads: int = _key(Number(0, 1_000_000, whole=True), 16,
                             "Of the first reads of chunks that were there when the worker started, one of so many "
                             "checks its chunk; 0: none.")
    full_copy: str = _key(Choice(("off", "on", "idle")), "on",
                          "Whether images that are read are copied into the cache as a whole, in the background, where "
                          "an order does not say; idle: only while nothing else is read on this node.")
    full_copy_after_s: float = _key(Number(0, 86400), 30.0, "So long after its first read an image's copy begins.",
                                    unit="s")
    full_copy_rate: int = _key(Size(), 16 * limits.MIB,
                               "No more than this a second is copied, all images together, compressed; 0: no bound.",
                               unit="bytes/s")


@dataclass(frozen=True)
class Snapshotter:
    """[snapshotter]"""

    root: str = _key(AbsolutePath(), "/var/lib/lazyfs/snapshotter",
                     "Snapshots and their records. On a file system that overlayfs can use as upper layer.")
    address: str = _key(AbsolutePath(), "/run/lazyfs/snapshotter.sock",
                        "The socket that containerd's `proxy_plugins` names.")
    containerd_address: str = _key(AbsolutePath(), "/run/containerd/containerd.sock",
                                   "containerd's own socket: which image a snapshot is of, `lazyfs pull`.")
    threads: int = _key(Number(1, 256, whole=True), 32,
                        "Requests of containerd served at the same time; those that wait for the daemon count.")
    mount_ahead: bool = _key(Flag(), True,
                             "Mount a lazy image when it has been pulled, not when its first container is prepared.")


@dataclass(frozen=True)
class Profile:
    """[profile]"""

    upload: str = _key(Url(), "",
                       "Send what the starts of this node's images read, anonymously, to the daemon that collects at "
                       "this URL (docs/profile-upload.md); empty: nothing is sent.")
    upload_after_s: float = _key(Number(1, 86400), 60.0,
                                 "So long after the first read it is sent, or when the image is unmounted; what is "
                                 "read later is not sent.", unit="s")
    token_file: str = _key(AbsolutePath(optional=True), "",
                           "A file with the token on its first line that sender and collector share, readable for root "
                           "only.")
    ca_file: str = _key(AbsolutePath(optional=True), "", "Trust this authority's certificates (PEM) for `upload`.")
    collect: str = _key(Address(), "",
                        "Where this daemon collects what others send, over HTTP, or HTTPS with `cert_file`; empty: "
                        "nowhere. A port alone means loopback. Needs `token_file`.")
    collect_dir: str = _key(AbsolutePath(), "/var/lib/lazyfs/profiles", "Where it keeps that, at most 1 GiB.")
    cert_file: str = _key(AbsolutePath(optional=True), "", "The certificate of `collect` (PEM); with `key_file`.")
    key_file: str = _key(AbsolutePath(optional=True), "", "Its key (PEM).")


@dataclass(frozen=True)
class Log:
    """[log]"""

    level: str = _key(Choice(("debug", "info", "warning", "error")), "info", "What is not written is below this.")
    format: str = _key(Choice(("auto", "text", "json")), "auto",
                       "text is for people, json for machines; auto: text on a terminal and for systemd's journal, "
                       "else json.")
    file: str = _key(AbsolutePath(optional=True), "", "Write there instead of standard error.")
    file_max_bytes: int = _key(Size(), 16 * limits.MIB,
                               "The file is rotated at this size; three older ones are kept; 0: it is never rotated.",
                               unit="bytes")


@dataclass(frozen=True)
class RegistryHost:
    """[registry.host."NAME"]: one registry, by the host[:port] in image references. Not set by the environment."""

    username: str = _key(Kind(), "", "User name; the password is in `password_file`.")
    password_file: str = _key(AbsolutePath(optional=True), "",
                              "A file with the password on its first line, readable for root only; read when needed.")
    insecure: bool = _key(Flag(), False, "Allow plain HTTP, and certificates nobody vouches for.")
    allow_private: bool = _key(Flag(), False,
                               "It may send us to private addresses (redirects to its blob store, its token server) "
                               "though its own is public.")
    ca_file: str = _key(AbsolutePath(optional=True), "", "Trust this authority's certificates (PEM).")
    client_cert: str = _key(AbsolutePath(optional=True), "", "TLS client certificate (PEM); with `client_key`.")
    client_key: str = _key(AbsolutePath(optional=True), "", "Its key (PEM).")


@dataclass(frozen=True)
class Registry:
    """[registry]. `host`: by host[:port]."""

    hosts_dir: str = _key(AbsolutePath(optional=True), "/etc/containerd/certs.d",
                          "containerd's hosts.toml files: mirrors, authorities, client certificates; empty: none.")
    docker_config: str = _key(AbsolutePath(optional=True), "",
                              "Credentials as `docker login` writes them; empty: `~/.docker/config.json`.")
    credential_provider_config: str = _key(AbsolutePath(optional=True), "",
                                           "kubelet's CredentialProviderConfig (YAML or JSON); empty: none.")
    credential_provider_bin_dir: str = _key(AbsolutePath(optional=True), "", "Where its plugins are.")
    cri_keychain: bool = _key(Flag(), True,
                              "Keep, in memory, the credentials that kubelet pulls with, when it asks the "
                              "snapshotter's socket (kubelet's `--image-service-endpoint`).")
    allow_private: bool = _key(Flag(), False, "The same for all registries.")
    host: Mapping[str, RegistryHost] = field(default_factory=dict)


_POLICIES = Choice(("off", "warn", "enforce"))


@dataclass(frozen=True)
class VerifyRule:
    """[verify.rule."NAME"]: for HOST/REPOSITORY and all repositories below it. Not set by the environment."""

    policy: str = _key(_POLICIES, "enforce", "As above.")
    keys: tuple[str, ...] = _key(Paths(), (), "As above; only these count.")


@dataclass(frozen=True)
class Verify:
    """[verify]. `rule`: by HOST, or HOST/REPOSITORY, as in image references."""

    policy: str = _key(_POLICIES, "off",
                       "Signatures of images (docs/signatures.md): not looked at; looked at, and missed in the log; or "
                       "nothing is mounted without one.")
    keys: tuple[str, ...] = _key(Paths(), (),
                                 "Files of public keys (PEM, as cosign.pub): one of them must have signed.")
    timeout_s: float = _key(Number(1, 120), 15.0, "So long the registry may take to say what is signed.", unit="s")
    rule: Mapping[str, VerifyRule] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """
    The whole configuration.

    Attributes:
        file: what was read; empty: the default file is not there.
        origins: of each key that is not at its default: the file, or the environment variable.

    """

    daemon: Daemon = field(default_factory=Daemon)
    cache: Cache = field(default_factory=Cache)
    snapshotter: Snapshotter = field(default_factory=Snapshotter)
    profile: Profile = field(default_factory=Profile)
    log: Log = field(default_factory=Log)
    registry: Registry = field(default_factory=Registry)
    verify: Verify = field(default_factory=Verify)
    mirror: Mirror = field(default_factory=Mirror)
    peers: Peers = field(default_factory=Peers)
    tracker: Tracker = field(default_factory=Tracker)
    file: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)

    def value(self, key: Key) -> Any:
        """What a key of SECTIONS has here."""
        return getattr(getattr(self, key.section), key.name)


SECTIONS: dict[str, type[Any]] = {
    "daemon": Daemon, "cache": Cache, "snapshotter": Snapshotter, "profile": Profile, "log": Log, "registry": Registry,
    "verify": Verify, "mirror": Mirror, "peers": Peers, "tracker": Tracker,
}


def keys_of(section: str, table: type[Any]) -> Iterator[Key]:
    """The keys of one section, in order."""
    for one in fields(table):
        if one.metadata:
            assert one.default is not MISSING
            yield Key(section, one.name, default=one.default, **one.metadata)


def all_keys() -> list[Key]:
    """Every key but those of [registry.host] and [verify.rule]."""
    return [key for section, table in SECTIONS.items() for key in keys_of(section, table)]
