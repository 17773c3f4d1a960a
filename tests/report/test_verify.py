"""A report's files are checked against the checksums from when it was written."""

import json
import shutil

import pytest

from vision_plugin import report
from vision_plugin.cli import main


def test_a_damaged_or_missing_file_is_found(built, tmp_path, capfd):
    folder = shutil.copytree(built, tmp_path / "report")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    recorded = json.loads((folder / "checksums.json").read_text())["sha256"]
    assert set(recorded) == files - {"checksums.json"}
    assert report.verify(folder).n_files == len(files) - 1
    assert main(["verify", str(folder)]) == 0
    assert "no problem" in capfd.readouterr().out
    for name in ("data.js", "report.json", "index.html", "features/1.html"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        (problem,) = report.verify(folder).problems
        assert problem.startswith(f"{name}: expected SHA-256 {recorded[name]}, found ")
        (folder / name).write_bytes(content)
    (folder / "data.js").unlink()
    assert report.verify(folder).problems == ("data.js: it is missing",)
    assert main(["verify", str(folder)]) != 0
    told = " ".join(capfd.readouterr().err.split())
    assert f"{folder} is damaged" in told
    assert "DAMAGED data.js: it is missing" in told


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[" * 100_000, '{"sha256": {"../x": "0"}}', '{"sha256": 5}']
)
def test_damaged_checksums_are_said_to_be_so(content, built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "report")
    (folder / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=r"checksums\.json"):
        report.verify(folder)


def test_a_report_without_checksums_is_not_said_to_be_sound(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "report")
    (folder / "checksums.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no checksums\.json"):
        report.verify(folder)
