"""The edge's credential store: keys that consumers' tokens are verified with, apart from kong.yml.

One file, `<state>/credentials.json`, readable by its owner only. Each consumer has one or more credentials,
so that a key can be replaced while old tokens still live. The key of a credential is the `iss` of its tokens.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Algorithm = Literal["HS256", "RS256", "ES256"]
FILE = "credentials.json"
MAX_TTL_S = 365 * 24 * 3600
_SECRET_BYTES = 32
_RSA_BITS = 3072
_BACKDATED_S = 5
"""A token holds from before it was made: verifiers read coarser or other hosts' clocks and allow no skew."""


class Credential(BaseModel):
    """One key of a consumer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._@:-]+$")
    """The `iss` of its tokens; unique in the store."""
    algorithm: Algorithm
    secret: str | None = Field(default=None, min_length=_SECRET_BYTES, repr=False)
    """HS256: the secret as text."""
    public_key: str | None = None
    """RS256 and ES256: PEM."""
    private_key: str | None = Field(default=None, repr=False)
    """RS256 and ES256: PEM, only if the pair was made here, for `plexus token`."""

    def jwk(self) -> dict[str, str]:
        """The verification key as a JSON Web Key that admits no other algorithm.

        Raises:
            InvalidArgumentError: The key does not fit the algorithm.
        """
        if self.algorithm == "HS256":
            if self.secret is None:
                raise InvalidArgumentError(f"credential {self.key!r} has no secret", field="secret")
            encoded = base64.urlsafe_b64encode(self.secret.encode()).rstrip(b"=").decode()
            return {"kty": "oct", "alg": "HS256", "k": encoded}
        try:
            public = serialization.load_pem_public_key((self.public_key or "").encode())
        except ValueError as error:
            raise InvalidArgumentError(
                f"credential {self.key!r}: no PEM public key", field="public_key"
            ) from error
        fields: dict[str, Any]
        if self.algorithm == "RS256" and isinstance(public, rsa.RSAPublicKey):
            fields = jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True)
        elif (
            self.algorithm == "ES256"
            and isinstance(public, ec.EllipticCurvePublicKey)
            and isinstance(public.curve, ec.SECP256R1)
        ):
            fields = jwt.algorithms.ECAlgorithm.to_jwk(public, as_dict=True)
        else:
            raise InvalidArgumentError(
                f"credential {self.key!r}: the key does not fit {self.algorithm}", field="public_key"
            )
        kept = {
            name: str(value) for name, value in fields.items() if name in {"kty", "n", "e", "crv", "x", "y"}
        }
        return {**kept, "alg": self.algorithm}


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    consumers: dict[str, list[Credential]] = {}


@dataclass(frozen=True, slots=True)
class CredentialStore:
    """The store in one state folder; every method reads the file anew, changes hold a lock."""

    state_dir: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.state_dir / FILE

    def ensure(
        self, consumers: Iterable[str], *, algorithm: Algorithm = "HS256"
    ) -> dict[str, tuple[Credential, ...]]:
        """Give every named consumer that has no credential one.

        Returns:
            The credentials of the named consumers; others in the file stay there, unused.
        """
        names = list(consumers)
        content = self._read()
        if any(not content.consumers.get(name) for name in names):
            with self._locked():
                content = self._read()
                for name in names:
                    if not content.consumers.get(name):
                        content.consumers[name] = [_mint(name, algorithm)]
                self._write(content)
        return {name: tuple(content.consumers[name]) for name in names}

    def add(self, consumer: str, algorithm: Algorithm, *, public_key: str | None = None) -> Credential:
        """Give a consumer one more credential: a new key, or the public key of one held elsewhere (PEM).

        Raises:
            InvalidArgumentError: The public key does not fit the algorithm.
        """
        if public_key is None:
            credential = _mint(consumer, algorithm)
        else:
            credential = Credential(key=_new_key(consumer), algorithm=algorithm, public_key=public_key)
        credential.jwk()
        with self._locked():
            content = self._read()
            content.consumers.setdefault(consumer, []).append(credential)
            self._write(content)
        return credential

    def mint_token(self, consumer: str, ttl_s: float = 3600) -> str:
        """Sign a token for a consumer with its newest credential that can sign.

        Args:
            consumer: Name as in kong.yml.
            ttl_s: Life in seconds, 1 s to 365 days.

        Raises:
            NotFoundError: No such consumer in the store.
            FailedPreconditionError: Only public keys of it are known here.
            InvalidArgumentError: The life is out of range.
        """
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise InvalidArgumentError(f"the life of a token is 1 to {MAX_TTL_S} seconds", field="ttl_s")
        credentials = self._read().consumers.get(consumer)
        if not credentials:
            known = ", ".join(sorted(self._read().consumers)) or "none yet; `plexus up` makes them"
            raise NotFoundError(f"no consumer {consumer!r} (known: {known})", reason="CONSUMER_NOT_FOUND")
        for credential in reversed(credentials):
            signing = credential.secret or credential.private_key
            if signing:
                now = int(time.time())
                claims = {
                    "iss": credential.key,
                    "sub": consumer,
                    "iat": now,
                    "nbf": now - _BACKDATED_S,
                    "exp": now + int(ttl_s),
                    "jti": str(uuid.uuid4()),
                }
                return jwt.encode(claims, signing, algorithm=credential.algorithm)
        raise FailedPreconditionError(
            f"the private key of {consumer!r} is not kept here; sign tokens where it is",
            reason="PRIVATE_KEY_ELSEWHERE",
        )

    def _read(self) -> _Content:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return _Content()
        try:
            content = _Content.model_validate_json(text)
        except ValidationError as error:
            # Not the input: it holds secrets.
            where = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
            raise InvalidArgumentError(
                f"{FILE}: {where or 'not JSON'} is wrong", reason="CREDENTIALS_DAMAGED"
            ) from None
        keys = [credential.key for listed in content.consumers.values() for credential in listed]
        if len(keys) != len(set(keys)):
            raise InvalidArgumentError(
                f"{FILE}: a key belongs to two credentials", reason="CREDENTIALS_DAMAGED"
            )
        return content

    def _write(self, content: _Content) -> None:
        temporary = self.path.with_name(f".{FILE}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content.model_dump(exclude_none=True), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.state_dir / f".{FILE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _new_key(consumer: str) -> str:
    return f"{consumer}-{secrets.token_hex(6)}"


def _mint(consumer: str, algorithm: Algorithm) -> Credential:
    key = _new_key(consumer)
    if algorithm == "HS256":
        return Credential(key=key, algorithm=algorithm, secret=secrets.token_urlsafe(_SECRET_BYTES))
    private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    if algorithm == "RS256":
        private = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    else:
        private = ec.generate_private_key(ec.SECP256R1())
    return Credential(
        key=key,
        algorithm=algorithm,
        public_key=private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode(),
        private_key=private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )
