"""`llmq push OUT REPO`"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.streams import print_text
from llmq.cli.terminal import interruptible, print_done, print_json, print_notes, print_table, quiet_transformers
from llmq.errors import CheckpointError
from llmq.report.shown import megabytes

PANEL, ORDER = "Quantization", 3


def command(
    out: Annotated[Path, Argument(help="The folder of a finished model of llmq.", metavar="OUT")],
    repository: Annotated[str, Argument(help="The repository on the Hub, such as owner/name.", metavar="REPO")],
    public: Annotated[
        bool, Option("--public", help="Everybody may read the repository. By default it is private.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="List the files that would be uploaded, with their sizes, and upload nothing.")
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Upload a finished model to the Hugging Face Hub.

    All files are read and checked first, as llmq verify does. Only files of
    the model are uploaded, in one commit, with their card (README.md).
    A repository has one format: of a run with several formats, push each
    folder to a separate repository.

    Examples:
      llmq push out/ owner/Qwen3-8B-4bit --dry-run
      llmq push out/ owner/Qwen3-8B-4bit
      llmq push out/gguf owner/Qwen3-8B-GGUF --public

    Exit codes:
      0  success
      2  unsuitable repository
      3  unfinished, broken or unreadable model
      7  the Hub refused the files, or cannot be reached

    See also:
      llmq verify  the same checks, and which engines load the model
    """
    if not out.is_dir():
        raise CheckpointError(f"{out} is not a folder", hint="give the output folder of llmq quantize or convert")
    begin(quiet=quiet)
    from llmq.checkpoint.model_path import require_model
    from llmq.export.push import parcel, push, require_name
    from llmq.verification.verified import verify

    quiet_transformers()
    require_name(repository)
    require_model(Path(out))
    chosen = parcel(out)
    with ProgressDisplay(silent=quiet) as display:
        verify(out, on_event=display).require_intact()
    sizes = chosen.sizes()
    print_notes(chosen.notes)
    if dry_run:
        if json:
            print_json({"repository": repository, "files": sizes, "left_out": chosen.left_out})
            return
        rows = [
            *((name, megabytes(size)) for name, size in sizes.items()),
            ("together", megabytes(sum(sizes.values()))),
        ]
        print_table(f"{out} → {repository}", ("file", "size"), rows)
        print_text(f"left out: {', '.join(chosen.left_out) or 'nothing'}")
        return
    with interruptible("repeat the command: uploaded files are kept"):
        address = push(chosen, repository, public=public)
    print_done("done:", f" {len(sizes)} files, {megabytes(sum(sizes.values()))}")
    if json:
        print_json({"repository": repository, "url": address, "files": sizes})
    else:
        print_text(address)
