"""Sign a package, and check its signature (OpenSSF model signing)."""

import tempfile
from pathlib import Path

from slmake.errors import UserError, first_line
from slmake.packaging.checksums import SIGNATURE, TIMESTAMP

CURVES = ("secp256r1", "secp384r1", "secp521r1")  # that model signing has; the first is also called prime256v1


def refuse_unusable(key: Path) -> None:
    """Raise UserError if a file is no private key that a package can be signed with."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    make = "openssl ecparam -name prime256v1 -genkey -noout -out"
    if not key.is_file():
        raise UserError(f"package.signing_key: {key}: no such file. Make one: {make} {key}")
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        kind = private.curve.name if isinstance(private, EllipticCurvePrivateKey) else type(private).__name__
        problem = "" if kind in CURVES else f"it is of {kind}"
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        problem = first_line(error)
    if problem:
        raise UserError(
            f"package.signing_key: {key}: no private key of {', '.join(CURVES)} in PEM form without password ({problem}). "
            f"Make another: {make} FILE"
        )


def sign(folder: Path, key: Path) -> None:
    """Sign every file of a package with an elliptic-curve key (OpenSSF model signing); the signature is model.sig.

    Raises:
        UserError: the key cannot be used.
    """
    from model_signing import signing

    refuse_unusable(key)
    signer = signing.Config().use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)


def check(folder: Path, key: Path) -> None:
    """Check a package's signature with its signer's key, public or private.

    Raises:
        UserError: there is no signature, it does not fit the package or the key, or the key cannot be read.
    """
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file():
        raise UserError(
            f"{SIGNATURE}: missing, but a key is given: this package was not signed. If it is yours, build it again with `make`."
        )
    with tempfile.NamedTemporaryFile(suffix=".pem") as public:
        public.write(public_key(key))
        public.flush()
        try:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(public.name))
            verifier.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
        except Exception as error:
            raise UserError(f"{SIGNATURE}: does not fit this package and key ({first_line(error)}).") from None


def _hashing():
    """What is signed: every file but the signature and Snakemake's marker. The names are relative to the package, wherever it is."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE, TIMESTAMP], ignore_git_paths=False)


def public_key(key: Path) -> bytes:
    """The public half, in PEM form, of a private or public key file.

    Raises:
        UserError: no key in it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        data = key.read_bytes()
        try:
            public = serialization.load_pem_private_key(data, password=None).public_key()
        except (ValueError, TypeError):
            public = serialization.load_pem_public_key(data)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: no key in PEM form: {error}") from None
    if not isinstance(public, EllipticCurvePublicKey):
        raise UserError(
            f"{key}: a key of another kind ({type(public).__name__}); packages are signed with {', '.join(CURVES)}."
        )
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
