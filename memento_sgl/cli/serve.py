"""`memento serve`, `memento doctor` and `memento demo`."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from memento_sgl.demo import MODEL_DIR
from memento_sgl.errors import ConfigError
from memento_sgl.templates import template_path

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("memento-sgl", "sglang", "torch", "transformers")
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


class ServeCommand(TyperCommand):
    """Its help goes on with the flags that it passes on."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from memento_sgl.serve.checks import serve_parser

        super().format_help(ctx, formatter)
        print(serve_parser().format_help())


def register(app: typer.Typer) -> None:
    """Add the runtime's commands."""
    app.command(cls=ServeCommand, context_settings=PASS_THROUGH)(serve)
    app.command()(doctor)
    app.command()(demo)


def serve(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, or 'demo' for the embedded model.")
    ],
    chat_template: Annotated[
        str,
        typer.Option(
            help="'auto': the model's own or memento_nosys; 'memento', 'memento_nosys' or a path."
        ),
    ] = "auto",
) -> None:
    """Serve a Memento model: `sglang serve` with block eviction enabled.

    Takes SGLang's flags and the --memento-* options, listed below:

        memento serve demo --port 30000

        memento serve ./qwen3-memento --tp 2 --memento-keep-last-n-blocks 1

    Ctrl-C ends the server at once; SIGTERM lets it finish what runs.
    """
    from memento_sgl.cli.user_config import as_flags
    from memento_sgl.serve.checks import check
    from memento_sgl.serve.launch import block_interrupts

    _need_sglang()
    own = {str(parameter.name) for parameter in ctx.command.params}
    given = [*as_flags(ctx.default_map or {}, own), *ctx.args]
    path = str(MODEL_DIR) if model == "demo" else model
    options = check(path, given)
    arguments = ["--model-path", path, "--enable-memento"]
    if options.served_model_name is None and Path(path).is_dir():
        name = "demo" if model == "demo" else Path(path).resolve().name
        arguments += ["--served-model-name", name]
    if model == "demo":
        arguments += ["--dtype", "float32"]
    if (chosen := _template(chat_template, path)) is not None:
        arguments += ["--chat-template", chosen]
    arguments += given
    sys.stdout.flush()
    block_interrupts()
    os.execv(sys.executable, [sys.executable, "-m", "memento_sgl.serve.launch", *arguments])


def _need_sglang() -> None:
    """An error for the user where the light installation cannot do what was asked."""
    missing = [name for name in ("sglang", "torch") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ConfigError(f"{names} not installed: pip install 'memento-sgl[serve]'")


def _template(choice: str, model: str) -> str | None:
    if choice in ("memento", "memento_nosys"):
        return str(template_path(choice))
    if choice != "auto":
        if not Path(choice).is_file():
            raise ConfigError(f"no chat template at {choice}")
        return choice
    folder = Path(model)
    config = folder / "tokenizer_config.json"
    own = (folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )
    return None if own or not folder.is_dir() else str(template_path("memento_nosys"))


def doctor() -> None:
    """Check this installation: versions, platform, every patched function, what is missing."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    healthy = True
    console.print(f"python       {platform.python_version()} on {platform.machine()}")
    for package in PACKAGES:
        try:
            console.print(f"{package:<13}{version(package)}")
        except PackageNotFoundError:
            healthy = False
            hint = escape("pip install 'memento-sgl[serve]'")
            console.print(f"{package:<13}[red]not installed[/]: {hint}")
    if healthy:
        _show_platform(console)
        healthy = _check_seams(console)
    unready = "[red]not ready to serve[/]; the data pipeline and the client need none of this"
    console.print("[green]ready to serve[/]" if healthy else unready)
    raise typer.Exit(0 if healthy else 1)


def _show_platform(console: Console) -> None:
    from memento_sgl.environment import has_accelerator

    name = "CPU in plain PyTorch: functionality, not speed"
    if has_accelerator():
        import torch

        name = "an accelerator that is not CUDA"
        if torch.cuda.is_available():
            name = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    console.print(f"platform     {name}")


def _check_seams(console: Console) -> bool:
    """Compare SGLang's files with the ledger; importing SGLang would take many seconds."""
    from memento_patches.guard import check_version
    from memento_patches.ledger import LEDGER, RELIED, Relied, Seam
    from memento_patches.source import find
    from rich.markup import escape

    from memento_sgl.errors import PatchError

    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parents[1]
    try:
        check_version()
    except PatchError as error:
        for line in _explained(str(error), site):
            console.print(f"[red]sglang[/]       {escape(line)}")
        return False
    entries: list[Seam | Relied] = [*LEDGER, *RELIED]
    healthy = True
    for entry in entries:
        found = find(site, entry.target)
        if found is None or found.fingerprint != entry.fingerprint:
            healthy = False
            state = "does not exist" if found is None else "has changed"
            console.print(f"[red]seam[/]         {escape(entry.target)} {state}")
    if healthy:
        console.print(f"seams        {len(entries)} of {len(entries)} as expected")
    return healthy


def _explained(mismatch: str, site: Path) -> list[str]:
    """What to do about an SGLang that this release is not made for."""
    from memento_patches.compare import outlook

    return [
        mismatch,
        "(another release of memento-sgl may be made for the installed one: see CHANGELOG.md)",
        outlook(site),
        "to move memento-sgl itself: docs/upgrade.md",
    ]


def demo(
    problems: Annotated[int, typer.Option(help="Problems to send.")] = 4,
    blocks: Annotated[int, typer.Option(help="Blocks in the longest one (2 to 24).")] = 24,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the picture.")] = Path(
        "demo-output"
    ),
) -> None:
    """Serve the embedded model, solve problems, show blocks folding and the KV curve."""
    _need_sglang()
    from memento_sgl.demo.picture import run

    raise typer.Exit(run(problems, blocks, out))
