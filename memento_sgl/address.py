"""The address of a server, as users write it: with `/v1` or without, and where it comes from."""

from __future__ import annotations

from urllib.parse import urlsplit

from memento_sgl.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:30000"
BASE_URL_ENV = "MEMENTO_BASE_URL"
BASE_URL_HELP = "Address of the server, with or without /v1."
_CHAT = "/chat/completions"


def api_root(base_url: str) -> str:
    """Where the OpenAI interface begins. `/v1` is meant where the address has no path; an address
    with a path (`https://host/api/openai`) is taken as it is.

    Raises:
        ConfigError: not an http(s) address, or one with a password or query in it.
    """
    url = _checked(base_url)
    return url if urlsplit(url).path else f"{url}/v1"


def server_root(base_url: str) -> str:
    """Where the native interface of an SGLang server begins: the address without `/v1`.

    Raises:
        ConfigError: as `api_root`.
    """
    return _checked(base_url).removesuffix("/v1")


def _checked(base_url: str) -> str:
    url = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good:
        raise ConfigError(f"base URL {base_url!r}: expected http://HOST:PORT, with or without /v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "a base URL must hold no user name, password or query: put the key into an environment "
            "variable and name that variable"
        )
    return url.removesuffix(_CHAT)
