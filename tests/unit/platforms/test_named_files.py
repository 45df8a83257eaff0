"""Files that only the last rules read are refused before the first one runs."""

import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tiny import write_params

from slmake import params
from slmake.errors import UserError
from slmake.plan import Plan
from slmake.platforms.named_files import refuse_unusable, refuse_unusable_date

AGAINST_PUBLISHED = {"metric": "accuracy", "maximum_drop": 0.02, "against": "published"}
SEEDS = {"summary": [], "params": {}, "inputs": {}, "runs": [{"scores": {"int4": {"accuracy": 0.9, "rouge_l": 0.8}}}]}


@pytest.fixture
def checked(tmp_path):
    """Call the check with changes to params.yaml."""

    def check(**changes) -> None:
        refuse_unusable(Plan(params.load(write_params(tmp_path / "params.yaml", **changes))))

    return check


def pem(key, password: bytes = b"") -> bytes:
    kept = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kept)


P256 = ec.generate_private_key(ec.SECP256R1())
PUBLIC = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pem(rsa.generate_private_key(65537, 1024)), "it is of RSAPrivateKey"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "it is of Ed25519PrivateKey"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "it is of secp256k1"),
        (pem(P256, b"secret"), "encrypted"),
        (P256.public_key().public_bytes(*PUBLIC), "private key"),
        (b"", "PEM"),
    ],
    ids=["rsa", "ed25519", "secp256k1", "password", "public", "empty"],
)
def test_a_key_that_signs_no_package(checked, tmp_path, content, problem):
    key = tmp_path / "key.pem"
    key.write_bytes(content)
    with pytest.raises(UserError) as refused:
        checked(package={"signing_key": str(key)})
    assert str(refused.value).startswith(f"package.signing_key: {key}: no private key of secp256r1, ")
    assert problem in str(refused.value).partition("without password")[2]
    checked(package={"signing_key": str(key)}, all={"stages": ["finetune"]})  # nothing is signed


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"a": 1}, "gates.published: .*last.json: no model's metrics in it"),
        ({"int4": {"rouge_l": 0.9}}, r"gates.checks\[0\]: published has no figure `accuracy`"),
    ],
)
def test_published_metrics_that_no_gate_can_compare_with(checked, tmp_path, content, problem):
    (tmp_path / "last.json").write_text(json.dumps(content), encoding="utf-8")
    gates = {"published": str(tmp_path / "last.json"), "checks": [AGAINST_PUBLISHED]}
    with pytest.raises(UserError, match=problem):
        checked(gates=gates)
    checked(gates=gates, all={"stages": ["finetune"]})  # nothing is judged


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("not json", "Expecting value"),
        ("5", "another form"),
        ("{}", "another form"),
        (json.dumps(SEEDS | {"runs": []}), "another form"),
        (json.dumps(SEEDS | {"runs": [{"scores": {"int4": {"accuracy": "high"}}}]}), "another form"),
        (json.dumps(SEEDS | {"runs": [*SEEDS["runs"], {"scores": {}}]}), "not every run has an accuracy"),
        (json.dumps(SEEDS | {"params": 5}), "another form"),
    ],
)
def test_a_result_of_make_seeds_that_is_damaged(checked, tmp_path, content, problem):
    """It is the user's file: no rule builds it again."""
    (tmp_path / "seeds.json").write_text(content, encoding="utf-8")
    with pytest.raises(
        UserError, match=f"^report.seeds: .*seeds.json: .*{problem}.*bring that back, or set report.seeds to null"
    ):
        checked(report={"seeds": str(tmp_path / "seeds.json")})
    checked(report={"seeds": str(tmp_path / "seeds.json")}, all={"stages": ["finetune"]})  # there is no report


def test_files_that_can_be_used(checked, tmp_path):
    (tmp_path / "last.json").write_text(json.dumps({"base": {}, "int4": {"accuracy": 0.9}}), encoding="utf-8")
    checked(gates={"published": str(tmp_path / "last.json"), "checks": [AGAINST_PUBLISHED]})
    for key in (P256, ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP521R1())):
        (tmp_path / "key.pem").write_bytes(pem(key))
        checked(package={"signing_key": str(tmp_path / "key.pem")})
    (tmp_path / "seeds.json").write_text(json.dumps(SEEDS), encoding="utf-8")
    checked(report={"seeds": str(tmp_path / "seeds.json")})
    checked()


@pytest.mark.parametrize(
    "stages", [["finetune", "merge"], ["finetune", "merge", "quantize", "evaluate", "gates", "package"]]
)
def test_a_date_that_no_package_can_have(tmp_path, monkeypatch, stages):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    plan = Plan(params.load(write_params(tmp_path / "params.yaml", all={"stages": stages})))
    if "package" in stages:
        with pytest.raises(UserError, match="SOURCE_DATE_EPOCH=: it must be a whole number of seconds since 1970"):
            refuse_unusable_date(plan)
    else:
        refuse_unusable_date(plan)
