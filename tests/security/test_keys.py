"""The keys of a fleet: derived from one secret, kept in a file that nobody else may read, and never shown."""

import os
import stat
from pathlib import Path

import pytest
from zmq.utils import z85

from callboard.bus.keys import KEY_FILE, FleetKeys, KeysError, fingerprint, format_secret, read_secret
from callboard.bus.private import make_private, why_open
from callboard.tools.cli import main

SECRET = bytes(range(32))
KEYS = FleetKeys(SECRET, "demo")


def test_keys_are_the_same_on_every_host_and_in_every_version() -> None:
    assert KEYS.of("control").public == b"2Z--U]zAjb+CJH$Q6=1GcHLqnLd+a+{LEE./KhMd"
    assert KEYS.member.public == b"?x=6=p8mE6Oa7XoN[@j?NfBsH]rhqW5Sgy{dI!H3"
    assert KEYS.proof("control", "0123456789abcdef").hex() == "11e0dbc466311a7d31fb9a6877f9ead7"


def test_every_name_fleet_and_secret_has_keys_of_its_own() -> None:
    fleets = (KEYS, FleetKeys(SECRET, "other"), FleetKeys(bytes(32), "demo"), FleetKeys(SECRET, ""))
    pairs = [keys.of(name) for keys in fleets for name in ("control", "decode", "decode-0", "", "é")]
    pairs += [keys.member for keys in fleets]
    assert len({pair.public for pair in pairs}) == len({pair.secret for pair in pairs}) == len(pairs) == 24


def test_a_proof_holds_for_one_name_and_one_incarnation() -> None:
    proof = KEYS.proof("a", "i")
    assert KEYS.is_proof(proof, "a", "i")
    for name, incarnation in (("b", "i"), ("a", "j"), ("a", "")):
        assert not KEYS.is_proof(proof, name, incarnation)
    assert not KEYS.is_proof(b"", "a", "i")
    assert not FleetKeys(SECRET, "other").is_proof(proof, "a", "i")


def test_nothing_that_is_printed_shows_a_secret() -> None:
    pair = KEYS.of("a")
    for shown in (repr(KEYS), str(KEYS), repr(pair), f"{pair}", fingerprint(SECRET)):
        for secret in (SECRET.hex(), repr(SECRET), pair.secret.decode(), z85.encode(SECRET).decode()):
            assert secret not in shown
    with pytest.raises(KeysError, match="has 32 bytes, not 5") as caught:
        FleetKeys(b"short", "demo")
    assert "short" not in str(caught.value)


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A directory as ``callboard keys new`` makes it."""
    made = tmp_path / "keys"
    assert main(["keys", "new", str(made)]) == 0
    return made


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_a_new_key_is_for_its_owner_alone_whatever_the_umask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], umask: int
) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "keys").mkdir(mode=0o700)
        (tmp_path / "keys").chmod(0o700)
        for words in ([], ["--force"]):
            assert main(["keys", "new", str(tmp_path / "keys"), *words]) == 0
            assert modes(tmp_path / "keys") == {"keys": 0o700, KEY_FILE: 0o600, ".gitignore": 0o600}
    finally:
        os.umask(before)
    assert len(read_secret(tmp_path / "keys")) == 32


def test_a_key_is_random_and_shown_by_its_fingerprint_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secrets = []
    for name in ("one", "two"):
        assert main(["keys", "new", str(tmp_path / name)]) == 0
        assert main(["keys", "show", str(tmp_path / name)]) == 0
        secrets.append(read_secret(tmp_path / name))
        out, err = capsys.readouterr()
        assert out.count(fingerprint(secrets[-1])) == 2
        assert str(tmp_path / name / KEY_FILE) in out
        assert secrets[-1].hex() not in out + err
    assert secrets[0] != secrets[1]


def test_a_key_is_replaced_by_force_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_secret(folder)
    capsys.readouterr()
    assert main(["keys", "new", str(folder)]) == 2
    assert "exists already: name another directory, or pass --force" in capsys.readouterr().err
    assert read_secret(folder) == before
    assert main(["keys", "new", str(folder), "--force"]) == 0
    assert read_secret(folder) != before
    assert sorted(modes(folder)) == sorted(["keys", ".gitignore", KEY_FILE])


def test_keys_are_not_put_where_others_may_enter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    assert main(["keys", "new", str(tmp_path / "open")]) == 2
    assert f"is open to other users (mode 0750): run chmod 700 {tmp_path / 'open'}" in capsys.readouterr().err
    assert not list((tmp_path / "open").iterdir())
    assert main(["keys", "new", "/tmp"]) == 2
    assert "/tmp is shared by all users: use a directory of your own" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for name in ("file", "file/keys"):
        assert main(["keys", "new", str(tmp_path / name)]) == 2
        assert f"{tmp_path / name} is no directory: name one" in capsys.readouterr().err
    assert main(["keys", "new", "/proc/none"]) == 2
    assert "cannot write /proc/none/fleet.key (no such file or directory): name a" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_key_file_that_others_may_touch_is_refused_with_the_remedy(folder: Path, mode: int) -> None:
    path = folder / KEY_FILE
    path.chmod(mode)
    with pytest.raises(KeysError, match=rf"open to other users \(mode 0{mode:o}\): run chmod 600 {path}"):
        FleetKeys.read(folder, "demo")
    path.chmod(0o400)
    FleetKeys.read(folder, "demo")


def test_a_directory_of_keys_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o711)
    with pytest.raises(KeysError, match=f"run chmod 700 {folder}"):
        read_secret(folder)


def test_what_belongs_to_another_user_is_refused(folder: Path) -> None:
    found = (folder / KEY_FILE).stat()
    foreign = os.stat_result((found.st_mode, 0, 0, 1, found.st_uid + 1, 0, 179, 0, 0, 0))
    assert f"belongs to another user (uid {found.st_uid + 1})" in why_open(folder / KEY_FILE, foreign)
    if os.geteuid() == 0:
        os.chown(folder / KEY_FILE, 12345, 0)
        with pytest.raises(KeysError, match="another user"):
            read_secret(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "callboard-key-1\n",
        f"callboard-key-2 {'0' * 64}\n",
        f"callboard-key-1 {'0' * 63}\n",
        "\xff",
        format_secret(SECRET) * 2,
    ],
)
def test_a_damaged_key_file_is_a_sentence_that_shows_nothing_of_it(folder: Path, text: str) -> None:
    (folder / KEY_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(KeysError, match="is damaged, or no key file: copy it anew") as caught:
        read_secret(folder)
    assert SECRET.hex() not in str(caught.value)


def test_no_file_no_directory_and_no_regular_file_are_sentences(folder: Path) -> None:
    (folder / KEY_FILE).unlink()
    for place in (folder, folder / "none", folder / ".gitignore"):
        with pytest.raises(
            KeysError, match=f'there is no key file {place}/fleet.key: make one with "callboard keys new'
        ):
            read_secret(place)
    os.mkfifo(folder / KEY_FILE, 0o600)
    with pytest.raises(KeysError, match="no key file"):
        read_secret(folder)
    (folder / KEY_FILE).unlink()
    (folder / KEY_FILE).mkdir(mode=0o700)
    with pytest.raises(KeysError, match="no key file"):
        read_secret(folder)


def test_a_private_directory_is_made_or_found_and_an_open_one_refused(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    make_private(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").chmod(0o755)
    with pytest.raises(PermissionError, match="chmod 700"):
        make_private(tmp_path / "a" / "b")
