"""Identities from Consul's Connect CA: keys are made here, Consul signs, its roots are followed.

The agent's leaf endpoint is not used: it makes the key itself, in a form that Java does not read, and names
no host, so that no TLS library would verify the control plane or the edge by name.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from plexus.connectca.v1 import connectca_pb2
from services.mesh.consul.answers import Answer, listing, mapping
from services.mesh.consul.watch import changes
from services.mesh.trust.domain import Identity, spiffe_id
from services.mesh.trust.files import CA, CERT, KEY, locked, private_pem, write_identity
from services.mesh.trust.names import LOOPBACK, alternative_names, covers
from services.runtime.errors import DataLossError, PlexusError, UnavailableError
from services.runtime.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from services.mesh.consul.client import ConsulClient
    from services.mesh.consul.config import ConsulConfig

log = structlog.get_logger(__name__)

ROOTS = "/v1/connect/ca/roots"
SIGN = "/hashicorp.consul.connectca.ConnectCAService/Sign"
BACKDATE = timedelta(minutes=1)
"""Consul dates a leaf back by this much, and counts its life from then."""
RENEW_AT = 2 / 3
"""Share of its life after which a leaf is renewed."""
MIN_LIFE_S = 1.0
"""A leaf is not renewed earlier than this many seconds after it, however short a life Consul gives it."""
SPREAD_S = 5.0
"""After a change of roots all processes want a new leaf: each waits up to this long, in seconds."""
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class Roots:
    """Whom a Consul trusts.

    Attributes:
        trust_domain: Of all SPIFFE ids, such as `1f…c3.consul`.
        active: Id of the root that signs now.
        pem: All trusted roots, the active one first; during a change there is more than one.
    """

    trust_domain: str
    active: str
    pem: bytes


def roots_of(answer: Answer) -> Roots:
    """The roots in an answer.

    Raises:
        DataLossError: It names no usable root.
    """
    content = mapping(answer.json(), "roots")
    try:
        active = str(content["ActiveRootID"])
        entries = sorted(listing(content["Roots"], "roots"), key=lambda root: root["ID"] != active)
        pem = b"".join(root["RootCert"].strip().encode() + b"\n" for root in entries)
        loaded = x509.load_pem_x509_certificates(pem)
        domain = str(content["TrustDomain"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataLossError("Consul's roots are malformed", reason="CONSUL_ANSWER_INVALID") from error
    if not loaded or not domain:
        raise DataLossError("Consul names no root", reason="CONSUL_ANSWER_INVALID")
    return Roots(domain, active, pem)


async def read_roots(client: ConsulClient) -> Roots:
    """The roots now.

    Raises:
        PlexusError: Consul does not answer, or not with roots.
    """
    return roots_of(await client.request("GET", ROOTS))


async def watch_roots(client: ConsulClient) -> AsyncIterator[Roots]:
    """The roots now and after each change."""

    async def believe(answer: Answer) -> bool:
        roots_of(answer)
        return True

    async for answer in changes(client, ROOTS, believe=believe):
        yield roots_of(answer)


async def datacentre_of(client: ConsulClient) -> str:
    """The datacentre of the agent, unless one is configured; Consul lists the nearest first."""
    return client.config.datacentre or str((await client.get("/v1/catalog/datacenters"))[0])


class ConnectCertificateSource:
    """Identity of one service from the Connect CA, in `<state>/identities/<service>`."""

    def __init__(self, state_dir: Path, service: str, client: ConsulClient, address: str = LOOPBACK) -> None:
        """Name the service; nothing is asked or written yet.

        Args:
            state_dir: The state folder.
            service: Whose identity.
            client: An open client.
            address: IP address at which the service may be dialled.
        """
        self._state_dir = state_dir
        self._address = address
        self._service = service
        self._client = client
        self._folder = state_dir / "identities" / service
        self._roots: Roots | None = None

    async def obtain(self) -> Identity:
        """See CertificateSource; without Consul the identity on disk is used as long as it is valid."""
        failures = 0
        while True:
            found = await asyncio.to_thread(self._load)
            try:
                roots = await read_roots(self._client)
                if found is not None and self._fits(found, roots):
                    return found.identity
                return await self._issue(roots)
            except PlexusError as error:
                if found is not None and found.identity.not_after > datetime.now(UTC):
                    log.warning("certificate_not_checked", reason=error.reason)
                    return found.identity
                failures += 1
                if failures == 1:
                    log.warning("waiting_for", dependency="consul", what="certificate", reason=error.reason)
                await _pause(failures)

    def ensure(self) -> Identity:
        """See CertificateSource; over a session of its own, since sessions belong to a loop."""

        async def obtain() -> Identity:
            async with self._client.another() as client:
                return await ConnectCertificateSource(
                    self._state_dir, self._service, client, self._address
                ).obtain()

        return asyncio.run(obtain())

    async def rotate(self, on_change: Callable[[Identity], None]) -> None:
        """Follow the roots; renew the leaf at two thirds of its life, and when another root signs."""
        roots_changed = asyncio.Event()
        follower = asyncio.create_task(self._follow_roots(roots_changed, on_change), name="connect-roots")
        try:
            await self._renew(roots_changed, follower, on_change)
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    async def _follow_roots(self, changed: asyncio.Event, on_change: Callable[[Identity], None]) -> None:
        async for roots in watch_roots(self._client):
            before, self._roots = self._roots, roots
            found = await asyncio.to_thread(self._load)
            if found is None:
                changed.set()
                continue
            if found.ca != roots.pem:
                # Before any leaf of the new root is met, and with the old one still trusted.
                await asyncio.to_thread(self._store, found.key, found.cert, roots.pem)
                log.info("roots_changed", roots=roots.pem.count(b"BEGIN CERTIFICATE"))
                on_change(found.identity)
            if not self._fits(found, roots) or (before is not None and before.active != roots.active):
                changed.set()

    async def _renew(
        self,
        roots_changed: asyncio.Event,
        follower: asyncio.Task[None],
        on_change: Callable[[Identity], None],
    ) -> None:
        failures = 0
        while True:
            found = await asyncio.to_thread(self._load)
            wait_s = 0.0 if found is None else (found.renew_at - datetime.now(UTC)).total_seconds()
            if await _set_within(roots_changed, follower, wait_s * random.uniform(0.95, 1.0)):  # noqa: S311 - spreads load only
                roots_changed.clear()
                await asyncio.sleep(random.uniform(0, SPREAD_S))  # noqa: S311 - spreads load only
            while True:
                try:
                    renewed = await self._issue(self._roots or await read_roots(self._client))
                    break
                except (PlexusError, OSError) as error:
                    # The present certificate still holds; neither Consul nor a full disk ends the process.
                    failures += 1
                    if failures == 1:
                        log.warning("certificate_renewal_failed", error=type(error).__name__)
                    await _pause(failures)
            failures = 0
            log.info("certificate_renewed", not_after=renewed.not_after.isoformat())
            on_change(renewed)

    async def _issue(self, roots: Roots) -> Identity:
        name = spiffe_id(
            self._service, trust_domain=roots.trust_domain, datacentre=await datacentre_of(self._client)
        )
        key = ec.generate_private_key(ec.SECP256R1())
        chain = await sign(
            self._client.config, _csr(alternative_names(name, self._service, self._address), key)
        )
        newest = self._roots or roots  # they may have changed while Consul signed
        await asyncio.to_thread(self._store, private_pem(key), chain, newest.pem)
        found = await asyncio.to_thread(self._load)
        if found is None:
            raise DataLossError("Consul signed something else", reason="CONSUL_ANSWER_INVALID")
        return found.identity

    def _store(self, key: bytes, cert: bytes, ca: bytes) -> None:
        with locked(self._folder):
            write_identity(self._folder, key=key, cert=cert, ca=ca)

    def _fits(self, found: _OnDisk, roots: Roots) -> bool:
        """Whether the identity is young, of this Consul, and signed by its present root."""
        return (
            datetime.now(UTC) < found.renew_at
            and found.identity.spiffe_id.startswith(f"spiffe://{roots.trust_domain}/")
            and found.signed_by(roots.pem)
            and covers(found.chain[0], self._address)
        )

    def _load(self) -> _OnDisk | None:
        try:
            with locked(self._folder):
                return _OnDisk.read(self._folder)
        except (OSError, ValueError, x509.ExtensionNotFound, IndexError):
            return None


@dataclass(frozen=True, slots=True)
class _OnDisk:
    identity: Identity
    renew_at: datetime
    chain: tuple[x509.Certificate, ...]
    key: bytes
    cert: bytes
    ca: bytes

    @classmethod
    def read(cls, folder: Path) -> _OnDisk:
        key, cert, ca = ((folder / name).read_bytes() for name in (KEY, CERT, CA))
        chain = tuple(x509.load_pem_x509_certificates(cert))
        private = serialization.load_pem_private_key(key, None)
        if private.public_key() != chain[0].public_key():
            raise ValueError("the key is another's")  # the process ended between two files
        names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        born = chain[0].not_valid_before_utc + BACKDATE
        end = chain[0].not_valid_after_utc
        identity = Identity(
            spiffe_id=names.get_values_for_type(x509.UniformResourceIdentifier)[0],
            cert_path=folder / CERT,
            key_path=folder / KEY,
            ca_path=folder / CA,
            not_after=end,
        )
        return cls(identity, born + (end - born) * RENEW_AT, chain, key, cert, ca)

    def signed_by(self, roots: bytes) -> bool:
        """Whether the leaf, or the last of its intermediates, is signed by the first of these roots."""
        root = x509.load_pem_x509_certificates(roots)[0]
        for cert in (self.chain[0], self.chain[-1]):
            try:
                cert.verify_directly_issued_by(root)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return True
        return False


def _csr(names: x509.SubjectAlternativeName, key: ec.EllipticCurvePrivateKey) -> bytes:
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def sign(config: ConsulConfig, csr: bytes) -> bytes:
    """Have a Consul server sign a request.

    Args:
        config: Names the server and the token, which must be allowed to write the service.
        csr: PEM.

    Returns:
        The PEM chain, leaf first.

    Raises:
        PermissionDeniedError: The token may not.
        UnavailableError: The server does not answer.
    """
    target = config.signer
    if config.tls:
        credentials = await asyncio.to_thread(_channel_credentials, config)
        channel = grpc.aio.secure_channel(target, credentials)
    else:
        channel = grpc.aio.insecure_channel(target)
    async with channel:
        call = channel.unary_unary(
            SIGN,
            request_serializer=connectca_pb2.SignRequest.SerializeToString,
            response_deserializer=connectca_pb2.SignResponse.FromString,
        )
        metadata = [("x-consul-token", config.secret)] if config.secret else []
        try:
            response = await call(
                connectca_pb2.SignRequest(csr=csr.decode()),
                timeout=config.request_timeout_s,
                metadata=metadata,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}:
                raise UnavailableError("Consul did not sign in time", dependency="consul") from error
            raise from_rpc_error(error, dependency="consul") from error
    return str(response.cert_pem).encode()


def _channel_credentials(config: ConsulConfig) -> grpc.ChannelCredentials:
    def read(path: Path | None) -> bytes | None:
        return path.read_bytes() if path else None

    return grpc.ssl_channel_credentials(read(config.ca), read(config.key), read(config.certificate))


async def _set_within(event: asyncio.Event, follower: asyncio.Task[None], seconds: float) -> bool:
    """Wait for the event, at most so long; the end of the follower, which only a defect is, is raised."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait(
            [waiting, follower], timeout=max(MIN_LIFE_S, seconds), return_when=asyncio.FIRST_COMPLETED
        )
        if follower.done():
            follower.result()
        return waiting.done()
    finally:
        waiting.cancel()


async def _pause(failures: int) -> None:
    longest = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(failures, 16))
    await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
