"""Sign a package, and read the key that checks it (OpenSSF model signing)."""

from pathlib import Path

from slmake.errors import UserError
from slmake.packaging.checksums import SIGNATURE


def sign(folder: Path, key: Path) -> None:
    """Sign every file of a package with an elliptic-curve key (OpenSSF model signing); the signature is model.sig.

    Raises:
        UserError: the key cannot be read.
    """
    from model_signing import hashing, signing

    if not key.is_file():
        raise UserError(
            f"package.signing_key: {key}: no such file. Make one: openssl ecparam -name prime256v1 -genkey -noout -out {key}"
        )
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"package.signing_key: {key}: no elliptic-curve private key in PEM form without password ({error})."
        ) from None
    ignored = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)
    signer.set_hashing_config(ignored).sign(folder, folder / SIGNATURE)


def public_key(key: Path) -> bytes:
    """The public half, in PEM form, of a private or public key file.

    Raises:
        UserError: no key in it.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        data = key.read_bytes()
        try:
            public = serialization.load_pem_private_key(data, password=None).public_key()
        except (ValueError, TypeError):
            public = serialization.load_pem_public_key(data)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: no key in PEM form: {error}") from None
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
