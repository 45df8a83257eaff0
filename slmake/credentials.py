"""Credentials in the text of a source: recognized, refused, and never repeated in a message. Standard library only.

params.yaml, logs, receipts and results are shared, so a source holds no credential. They come from the environment:
~/.netrc (or the file that NETRC names) for web servers, AZURE_STORAGE_* or `az login` for Azure, HF_TOKEN for the hub.
"""

import re
from urllib.parse import unquote

_NAMES = (
    r"sig|signature|token|secret|pass|passwd|password|pwd|auth|authorization|credential|credentials|apikey|accountkey|jwt|sas"
    r"|(?:api|access|account|private|secret|shared|subscription|master)[-_]?key(?:[-_]?id)?|awsaccesskeyid|sharedaccesssignature"
)
_ASSIGNED = re.compile(rf"(?i)(?<![^/?&;#\s'\"`,(\[{{<|])((?:[\w.-]*[-_])?(?:{_NAMES}))=[^/&;\s'\"`]*[^/&;\s'\"`:,.)]")
# As headers and JSON answers have them, and percent-encoded.
_SAID = re.compile(
    rf"(?i)(\b(?:bearer|authorization:\s*basic)\s+|[\"'](?:[\w.-]*[-_])?(?:{_NAMES})[\"']\s*:\s*[\"']?|\b(?:{_NAMES})%3d)(?!\*\*\*)[\w.~+/=%-]{{6,}}"
)
# A private key, as its file has it or in one line; of a part of one, whole lines.
_KEY = re.compile(
    r"-----BEGIN ([A-Z ]*PRIVATE KEY(?: BLOCK)?)-----(?:.*?-----END \1-----|(?:\s|\\n)*(?:[\w+/=]{16,}(?:\s|\\n)*)*)",
    re.DOTALL,
)
# Credentials that say themselves whose they are: Hugging Face, GitHub, GitLab, OpenAI and those like it, AWS, Google; signed JSON (RFC 7519).
_ISSUED = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{20,}"
    r"|sk-(?:[A-Za-z0-9]{40,}|(?:proj|svcacct|admin|ant-\w+|or-v1)-[\w-]{20,})|A(?:KI|SI)A[A-Z0-9]{16}\b|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,500}\.eyJ[\w-]{8,4000}(?:\.[\w-]*)?)"
)
HARMLESS = {
    "alt",
    "api-version",
    "branch",
    "dl",
    "download",
    "export",
    "format",
    "inline",
    "raw",
    "ref",
    "ref_type",
    "rev",
}
FLAGS = {
    "alt",
    "dl",
    "download",
    "export",
    "inline",
    "raw",
    "v",
}  # of those, that have short values: `1`, `true`, `media`
HARMLESS |= {"revision", "v", "version", "versionid"}  # query parameters that choose a content, not who may read it


def holds_secret(text: str) -> bool:
    """Whether a source assigns a value to a name that credentials have, as in `;sig=…` or `/token=…`, or has one that is known by its form."""
    return any(pattern.search(form) for pattern in (_ASSIGNED, _ISSUED) for form in (text, unquote(text)))


def harmless(name: str, value: str) -> bool:
    """Whether a query parameter of a web address is known to carry no credential."""
    return (
        name.lower() in HARMLESS
        and bool(re.fullmatch(r"[\w./-]{0,40}", value))
        and not (name.lower() in FLAGS and len(value) > 12)
    )


def masked(source: str) -> str:
    """A source as an error may show it: without user, password, query, fragment and parameters."""
    scheme = re.match(r"\w+:(//)?", source)
    prefix = scheme[0] if scheme else ""
    rest = unquote(source[len(prefix) :])
    head, mark, tail = re.fullmatch(r"([^?#;&]*)([?#;&]?)(.*)", rest, re.DOTALL).groups()
    authority, _, path = head.partition("/")
    user, at, _ = head.rpartition("@")
    encoded = re.search(r"%(?:40|3a|2f|5c)", source.partition("//")[2].partition("/")[0], re.IGNORECASE)
    named = (
        not encoded and prefix.lower() in ("abfs://", "abfss://") and at and ":" not in user
    )  # CONTAINER@ACCOUNT, no password
    if not prefix or (named and "@" not in tail):
        pass
    elif prefix.endswith("//"):
        if encoded:
            head = "***"
        elif "@" in authority or (":" in authority and "@" in path):
            head = "***@" + head.rpartition("@")[2]
        elif "@" in tail or (":" in authority and not re.fullmatch(r"[^:]*:\d{1,5}", authority)):
            head = "***"
    elif ":" in head:  # hf:user:password@…
        head = "***" + ("@" + head.rpartition("@")[2] if "@" in head else "")
    return scrub(prefix + head + (f"{mark}***" if tail else mark))


def scrub(text: str) -> str:
    """Any text without private keys, and without passwords and credentials of addresses in it; the same if there are none left."""
    # Up to the last `@`: a password may have one, or a slash, that is not encoded.
    text = re.sub(r"(://[^/?#\s'\"@:]*):(?!\d{1,5}[/?#\s'\"])[^\s'\"]+@", r"\1:***@", text)
    text = re.sub(r"(?i)\b(https?://)[^/?#\s'\"@]*@", r"\1***@", text)
    text = _SAID.sub(r"\1***", _KEY.sub(r"-----BEGIN \1-----***", text))
    # What a sentence has behind an address, in backticks or not, is no part of it.
    query = r"(?i)(https?://[^\s'\"?#`]*\?)([^\s'\"#`]*[^\s'\"#`:,.;)])"
    text = re.sub(query, lambda found: found[1] + _query(found[2]), text)
    return _ASSIGNED.sub(r"\1=***", _ISSUED.sub("***", text))


def _query(text: str) -> str:
    """A query without the values that may be a credential."""
    pairs = (part.partition("=") for part in text.split("&"))
    return "&".join(
        f"{name}{equals}{value if harmless(name, value) else '***'}"
        if equals
        else name
        if name.lower() in HARMLESS
        else "***"
        for name, equals, value in pairs
    )
