"""The file of API keys: one bearer key per line; blank lines and lines that begin with ``#`` do not count."""

from pathlib import Path


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in ``path``, each once. Raises ValueError with a sentence, also where there is none.

    A file without keys is no open door: whoever names a file wants one that is shut.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: write one API key per line into it") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: write one API key per line into it") from None
    keys: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{path}:{number}: a key is one word of ASCII characters, and one line holds one key")
        keys[key] = None
    if not keys:
        raise ValueError(f"{path} holds no API key: write one per line, or remove api_keys to let everybody ask")
    return tuple(keys)
