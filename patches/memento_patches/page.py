"""Seam: the page at /memento on SGLang's own HTTP server, and what it shows of the scheduler.

The figures ride along with the load snapshots that every scheduler publishes in shared memory for
`/v1/loads` anyway: nobody asks a scheduler for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from memento_sgl.engine import runtime
from memento_sgl.serve.arguments import settings_of
from memento_sgl.ui.about import describe, load

logger = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"


@cache
def _snapshot_class() -> Any:
    """SGLang's load snapshot with one more field, which its own readers pass over."""
    import msgspec
    from sglang.srt.managers.load_snapshot import LoadSnapshot

    return msgspec.defstruct(
        "MementoSnapshot",
        [("memento", tuple[int, int] | None, None)],
        bases=(LoadSnapshot,),
        omit_defaults=True,
    )


def add_to_snapshot(snapshot: Any, inquirer: Any) -> Any:
    """Evictions since the start, and tokens that the rows of running requests miss."""
    missing = sum(req.memento.evicted for req in inquirer.get_running_batch().reqs)
    own = {name: getattr(snapshot, name) for name in snapshot.__struct_fields__}
    return _snapshot_class()(**own, memento=(runtime.current().evictions, missing))


def add_page(server_args: Any, tokenizer_manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """Before the HTTP server starts."""
    import msgspec
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.managers import load_snapshot

    from memento_sgl.ui.inside import post_inside
    from memento_sgl.ui.routes import PATH, routes

    load_snapshot.snapshot_decoder = msgspec.msgpack.Decoder(_snapshot_class())
    settings = settings_of(server_args)
    assert settings is not None

    async def about(_request: Any) -> dict[str, Any]:
        return describe([tokenizer_manager.served_model_name], "memento", settings.config)

    async def stats(_request: Any) -> dict[str, Any]:
        found = await tokenizer_manager.get_loads(include=["core"])
        return load({name: getattr(one, name) for name in one.__struct_fields__} for one in found)

    app.router.routes.extend(routes(about=about, stats=stats, post=partial(post_inside, app, CHAT)))
    logger.info(
        "memento: a page to watch the model think, once it is ready: %s", server_args.url() + PATH
    )


def let_page_through(original: Callable[..., Any], *, method: str, path: str, **kwargs: Any) -> Any:
    """The page itself needs no API key: a browser sends none with an address. What it asks does."""
    from sglang.srt.utils.auth import AuthDecision

    from memento_sgl.ui.routes import PATH

    if method == "GET" and path == PATH:
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **kwargs)
