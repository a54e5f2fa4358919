"""
A token server for bearer tests: distribution's token specification, with tokens that docker-registry itself verifies.

    server = TokenServer(tmp_path, users={"kim": "pass"}, lifetime_s=60)
    with server, running_registry(tmp_path, **server.registry_arguments()) as registry:
        open_source(f"docker://{registry.host}/repo:tag", RegistryOptions(username="kim", password="pass"))
        server.requests                     # list of Asked(method, path, authorization, form, scopes)

GET with Basic, GET without (anonymous may pull if `anonymous_pull`), POST with grant_type=refresh_token and a token out
of `refresh_tokens`. Knobs that may be changed while it runs: lifetime_s (0 < x; also the token's real `exp`),
says_lifetime (False: no expires_in), status (not 0: answer that), location (with a 3xx status), delay_s, answer (raw
bytes instead of a token), allows_push; reset() puts them back. `private`: who
alone may have anything of a repository.
Only ES256 with a certificate chain in the header (x5c) is made.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from dataclasses import MISSING, dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

if TYPE_CHECKING:
    from pathlib import Path

SERVICE = "test-service"
ISSUER = "test-issuer"


@dataclass(frozen=True)
class Asked:
    """One request for a token."""

    method: str
    path: str
    authorization: str
    form: dict[str, list[str]]
    scopes: list[str]


@dataclass
class TokenServer:
    """See the module's text."""

    directory: Path
    users: dict[str, str] = field(default_factory=dict)
    refresh_tokens: set[str] = field(default_factory=set)
    anonymous_pull: bool = False
    lifetime_s: float = 60.0
    says_lifetime: bool = True
    status: int = 0
    location: str = ""
    delay_s: float = 0.0
    answer: bytes = b""
    allows_push: bool = True
    requests: list[Asked] = field(default_factory=list)
    private: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        authority = trustme.CA()
        leaf = authority.issue_cert("token.test")
        key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
        self._x5c = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
        self.ca_file = self.directory / "token-ca.pem"
        authority.cert_pem.write_to_path(self.ca_file)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.kit = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def reset(self, *, users: dict[str, str], refresh_tokens: set[str]) -> None:
        """All knobs as at the start, and an empty log."""
        self.users, self.refresh_tokens, self.requests = users, refresh_tokens, []
        for knob in fields(self):
            if knob.default is not MISSING:
                setattr(self, knob.name, knob.default)

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def registry_arguments(self) -> dict[str, Any]:
        """For running_registry()."""
        return {"token_realm": self.realm, "token_service": SERVICE, "token_issuer": ISSUER, "token_ca": self.ca_file}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()

    def make_token(self, scopes: list[str], user: str) -> str:
        """A JWT for what `user` may do of `scopes`."""
        now = time.time()
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            allowed = [a for a in actions.split(",") if a == "pull" or (a == "push" and user and self.allows_push)]
            if user not in self.private.get(name, {user}):
                allowed = []
            access.append({"type": kind, "name": name, "actions": allowed})
        claims = {"iss": ISSUER, "sub": user, "aud": SERVICE, "exp": int(now + max(self.lifetime_s, 1)),
                  "nbf": int(now) - 60, "iat": int(now), "jti": uuid.uuid4().hex, "access": access}
        header = {"typ": "JWT", "alg": "ES256", "x5c": [self._x5c]}
        signed = b".".join(_encode(json.dumps(part).encode()) for part in (header, claims))
        r, s = utils.decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return (signed + b"." + _encode(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        self._serve({}, query.get("scope", []))

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        self._serve(form, " ".join(form.get("scope", [])).split())

    def _serve(self, form: dict[str, list[str]], scopes: list[str]) -> None:
        kit: TokenServer = self.server.kit  # type: ignore[attr-defined]
        authorization = self.headers.get("Authorization", "")
        kit.requests.append(Asked(self.command, self.path, authorization, form, scopes))
        time.sleep(kit.delay_s)
        if kit.status:
            self._answer(kit.status, b"{}", {"Location": kit.location} if kit.location else {})
            return
        user = self._user(kit, authorization, form)
        if user is None:
            self._answer(401, b'{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}', {})
            return
        token = {"token": kit.make_token(scopes, user)}
        lifetime = {"expires_in": kit.lifetime_s} if kit.says_lifetime else {}
        self._answer(200, kit.answer or json.dumps({**token, **lifetime}).encode(), {})

    def _user(self, kit: TokenServer, authorization: str, form: dict[str, list[str]]) -> str | None:
        """The name that is proved; "" for anonymous; None for nobody."""
        if form.get("grant_type") == ["refresh_token"]:
            return "refreshed" if form.get("refresh_token", [""])[0] in kit.refresh_tokens else None
        if authorization.startswith("Basic "):
            name, _, password = base64.b64decode(authorization[6:]).decode().partition(":")
            return name if kit.users.get(name) == password else None
        return "" if kit.anonymous_pull else None

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
