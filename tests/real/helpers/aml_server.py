"""The network side of the stand-in for Azure: one loopback port that is token endpoint, HTTPS proxy and every host behind it.

The unmodified SDK speaks HTTPS to the hosts that the cloud's metadata names. HTTPS_PROXY leads all of it here; a CONNECT is answered with
a certificate of a throw-away authority (REQUESTS_CA_BUNDLE), and what comes out is either the service's REST interface or, for the storage
account, the bytes of a real Azurite. Nothing leaves the machine: a host that is not one of ours is refused.
"""

import base64
import contextlib
import datetime
import json
import os
import re
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

DOMAIN = "slmake.test"
ARM, API, REGISTRY = (f"{name}.{DOMAIN}" for name in ("management", "api", "registry"))


class Fault(Exception):
    """Answer with this status instead of the service's own; None: close the connection without a word."""

    def __init__(self, status: int | None, body: dict | None = None, headers: dict | None = None):
        self.status, self.body, self.headers = status, body or {}, headers or {}


def error(status: int, code: str, message: str) -> Fault:
    """An error in the form of Azure Resource Manager's."""
    return Fault(status, {"error": {"code": code, "message": message}})


class Server:
    """The listening port; `service(method, host, path, query, body)` answers, or raises Fault."""

    def __init__(self, folder: Path, service, blob_port: int, account: str):
        self.service, self.blob_port, self.blob_host = service, blob_port, f"{account}.blob.{DOMAIN}"
        self.hosts = [ARM, API, REGISTRY, self.blob_host]
        self.faults: list = []  # (pattern of "METHOD path", Fault, how many times), first match wins
        self.requests: list[str] = []
        self.lifetime = 3600  # seconds that a token is good for
        self.known = True  # whether Azure knows who asks
        self.ca, self.context = certificates(folder, self.hosts)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self) -> dict[str, str]:
        """What leads the SDK here; who is logged in is a managed identity, as on a machine of Azure's."""
        return {
            "HTTPS_PROXY": f"http://127.0.0.1:{self.port}",
            "NO_PROXY": "127.0.0.1",
            "REQUESTS_CA_BUNDLE": str(self.ca),
            "ARM_CLOUD_METADATA_URL": f"https://{ARM}/metadata/endpoints?api-version=2022-09-01",
            "REGISTRY_DISCOVERY_ENDPOINT_URL": f"https://{REGISTRY}/",
            "IDENTITY_ENDPOINT": f"http://127.0.0.1:{self.port}/identity",
            "IDENTITY_HEADER": "test",
            "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
        }

    def token(self, resource: str) -> dict:
        """An access token in form; nothing but this server believes it."""
        end = int(time.time()) + self.lifetime
        claims = {"aud": resource.rstrip("/"), "exp": end, "tid": "t", "oid": "o"}
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "none"}, claims)]
        return {
            "access_token": b".".join([*parts, b"AAAA"]).decode(),
            "expires_on": str(end),
            "resource": resource,
            "token_type": "Bearer",
        }

    def admit(self, authorization: str) -> None:
        """Raise Fault unless a request carries a token that has not expired."""
        token = re.fullmatch(r"Bearer [\w-]+\.([\w-]+)\.\w+", authorization)
        if not token or not self.known:
            raise error(401, "AuthenticationFailed", "Authentication failed. The token is missing or invalid.")
        claims = json.loads(base64.urlsafe_b64decode(token[1] + "=" * (-len(token[1]) % 4)))
        if claims["exp"] < time.time():
            raise error(
                401, "ExpiredAuthenticationToken", "The access token expiry UTC time is earlier than current UTC time."
            )


def certificates(folder: Path, hosts: list[str]) -> tuple[Path, ssl.SSLContext]:
    """An authority's certificate file, and a server context for `hosts` that it vouches for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    authority, server = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("test CA", hosts[0])
    )

    def certificate(subject, key, *extensions):
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(authority).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        made = made.not_valid_after(now + datetime.timedelta(days=1))
        for extension in extensions:
            made = made.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return made.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca = folder / "ca.pem"
    ca.write_bytes(certificate(authority, keys[0], x509.BasicConstraints(ca=True, path_length=None)))
    chain = folder / "server.pem"
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    secret = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(secret + certificate(server, keys[1], names))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return ca, context


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    """The request handler of one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        host = None  # after CONNECT: whom the client believes to speak to

        def log_message(self, *_):
            pass

        def do_CONNECT(self):
            host = self.path.partition(":")[0]
            if host not in server.hosts:
                self.send_error(403, "not a host of this test")
                return
            self.send_response(200)
            self.end_headers()
            try:
                self.connection = server.context.wrap_socket(self.connection, server_side=True)
            except (OSError, ssl.SSLError):
                self.close_connection = True
                return
            if host == server.blob_host:
                pump(self.connection, server.blob_port)
                self.close_connection = True
                return
            self.host, self.close_connection = host, False
            self.rfile = self.connection.makefile("rb")
            self.wfile = self.connection.makefile("wb", buffering=0)

        def answer(self):
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            try:
                status, body, headers = self.respond(url.path, parse_qs(url.query), content)
            except Fault as fault:
                if fault.status is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, body, headers = fault.status, fault.body, fault.headers
            text = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(text)

        def respond(self, path, query, content):
            if self.host is None:
                if path != "/identity" or not server.known:
                    raise Fault(400, {"message": "identity not found"})
                return 200, server.token(query["resource"][0]), {}
            line = f"{self.command} {path}"
            server.requests.append(line)
            for entry in server.faults:
                if entry[2] > 0 and re.search(entry[0], line):
                    entry[2] -= 1
                    raise entry[1]
            if not path.startswith(("/metadata/", "/discovery")):
                server.admit(self.headers.get("Authorization", ""))
            body = json.loads(content) if content else {}
            return server.service(self.command, self.host, path, query, body)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = answer

    return Handler


def pump(client: ssl.SSLSocket, port: int) -> None:
    """Pass bytes between a client and a server on loopback until one of them ends."""
    with socket.create_connection(("127.0.0.1", port)) as target:

        def copy(source, sink):
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
            except OSError:
                pass
            finally:
                for end in (source, sink):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

        back = threading.Thread(target=copy, args=(target, client), daemon=True)
        back.start()
        copy(client, target)
        back.join()


def clean_environment() -> dict[str, str]:
    """The environment without what leads to Azure, or to a proxy."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AZURE", "ARM_", "IDENTITY_", "MSI_")) and "PROXY" not in name.upper()
    }
