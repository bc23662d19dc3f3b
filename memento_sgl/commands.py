"""`memento serve`, `memento doctor` and `memento demo`."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from memento_sgl.demo import MODEL_DIR
from memento_sgl.environment import has_accelerator
from memento_sgl.templates import template_path

console = Console()
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the runtime's commands."""
    app.command(context_settings=PASS_THROUGH)(serve)
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

    Everything else is passed on to SGLang, --memento-* options included:

        memento serve demo --port 30000

        memento serve ./qwen3-memento --tp 2 --memento-keep-last-n-blocks 1

    `memento serve MODEL --help` lists SGLang's flags and the memento group.
    """
    _need_sglang()
    path = str(MODEL_DIR) if model == "demo" else model
    arguments = ["--model-path", path, "--enable-memento", *ctx.args]
    if model == "demo" and "--dtype" not in ctx.args:
        arguments += ["--dtype", "float32"]
    if (chosen := _template(chat_template, path)) is not None:
        arguments += ["--chat-template", chosen]
    if "--device" not in ctx.args and not has_accelerator():
        arguments += ["--device", "cpu"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several times faster for small models
    os.execv(sys.executable, [sys.executable, "-m", "memento_sgl.launch", *arguments])


def _need_sglang() -> None:
    """An error for the user where the light installation cannot do what was asked."""
    missing = [name for name in ("sglang", "torch") if find_spec(name) is None]
    if missing:
        hint = escape("pip install 'memento-sgl[serve]'")
        console.print(f"[red]{' and '.join(missing)} not installed[/]: {hint}")
        raise typer.Exit(2)


def _template(choice: str, model: str) -> str | None:
    if choice in ("memento", "memento_nosys"):
        return str(template_path(choice))
    if choice != "auto":
        if not Path(choice).is_file():
            console.print(f"[red]no chat template at {escape(choice)}[/]", soft_wrap=True)
            raise typer.Exit(2)
        return choice
    folder = Path(model)
    config = folder / "tokenizer_config.json"
    own = (folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )
    return None if own or not folder.is_dir() else str(template_path("memento_nosys"))


def doctor() -> None:
    """Check this installation: versions, platform, every patched function, what is missing."""
    healthy = True
    console.print(f"python      {platform.python_version()} on {platform.machine()}")
    for package in ("memento-sgl", "sglang", "torch", "transformers"):
        try:
            console.print(f"{package:<11} {version(package)}")
        except PackageNotFoundError:
            healthy = False
            hint = escape("pip install 'memento-sgl[serve]'")
            console.print(f"{package:<11} [red]not installed[/]: {hint}")
    if healthy:
        healthy = _check_platform() and _check_seams()
    unready = "[red]not ready to serve[/]; the data pipeline and the client need none of this"
    console.print("[green]ready to serve[/]" if healthy else unready)
    raise typer.Exit(0 if healthy else 1)


def _check_platform() -> bool:
    import torch

    if torch.cuda.is_available():
        console.print(f"platform    {torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    else:
        console.print("platform    CPU in plain PyTorch: functionality, not speed")
    return True


def _check_seams() -> bool:
    from memento_patches.guard import check_version, problems
    from memento_patches.ledger import LEDGER, RELIED

    from memento_sgl.errors import PatchError

    try:
        check_version()
    except PatchError as error:
        _explain_version(str(error))
        return False
    entries = [*LEDGER, *RELIED]
    wrong = problems(entries)
    for line in wrong:
        console.print(f"[red]seam[/]        {escape(line)}", soft_wrap=True)
    if not wrong:
        console.print(f"seams       {len(entries)} of {len(entries)} as expected")
    return not wrong


def _explain_version(mismatch: str) -> None:
    """What to do about an SGLang that this release is not made for."""
    from memento_patches.compare import outlook

    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    lines = [
        mismatch,
        "(another release of memento-sgl may be made for the installed one: see CHANGELOG.md)",
        outlook(Path(spec.origin).parents[1]),
        "to move memento-sgl itself: docs/upgrade.md",
    ]
    for line in lines:
        console.print(f"[red]sglang[/]      {escape(line)}", soft_wrap=True)


def demo(
    problems: Annotated[int, typer.Option(help="Problems to send.")] = 4,
    blocks: Annotated[int, typer.Option(help="Blocks in the longest one (2 to 24).")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-output"),
) -> None:
    """Serve the embedded model, solve problems, show blocks folding and the KV curve."""
    _need_sglang()
    from memento_sgl.demo.show import run

    raise typer.Exit(run(problems, blocks, out))
