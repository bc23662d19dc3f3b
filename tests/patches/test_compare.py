"""What two installed SGLangs differ in, read from their files alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from memento_patches.compare import compare, main, outlook, report
from memento_patches.ledger import LEDGER, RELIED
from memento_patches.source import find, site_of

from memento_sgl.errors import PatchError

STEP = "sglang.srt.managers.scheduler.Scheduler.update_running_batch"


def install(root: Path, version: str, **modules: str) -> Path:
    """An environment with an SGLang of these modules below `srt/managers`."""
    site = root / "lib" / "python3.11" / "site-packages"
    folder = site / "sglang" / "srt" / "managers"
    folder.mkdir(parents=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    info = site / f"sglang-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return root


OLD = """
class Scheduler:
    @staticmethod
    def process_batch_result(batch):
        return 1

    def update_running_batch(self, batch):
        return batch
"""
NEW = OLD.replace("return batch\n", "return batch or None\n")


def test_each_function_is_same_changed_gone_or_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    utils = "def validate_input_length(req):\n    pass\n"
    old = install(tmp_path / "old", "1.0", scheduler=OLD, utils=utils)
    moved = "class Lengths:\n    def validate_input_length(self):\n        pass\n"
    new = install(tmp_path / "new", "1.1", scheduler=NEW, lengths=moved)
    states = {
        change.target.rpartition(".")[2]: change for change in compare(site_of(old), site_of(new))
    }
    assert len(states) <= len(LEDGER) + len(RELIED)
    assert states["process_batch_result"].state == "same"
    step = states["update_running_batch"]
    assert (step.state, step.added, step.removed) == ("changed", 1, 1)
    assert "+    return batch or None" in step.diff
    lengths = states["validate_input_length"]
    assert lengths.state == "gone"
    assert lengths.elsewhere == ["sglang.srt.managers.lengths.Lengths.validate_input_length"]
    assert main([str(old), str(new), "--diff"]) == 1
    told = capsys.readouterr().out
    assert "sglang: 1.0 -> 1.1" in told
    assert f"changed  {STEP} (+1 -1): wrapped by scheduler:around_decode" in told
    assert "+    return batch or None" in told
    assert "now perhaps sglang.srt.managers.lengths.Lengths.validate_input_length" in told
    assert {change.state for change in compare(site_of(new), site_of(old))} >= {"gone", "changed"}


def test_an_environment_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sglang")
    import sglang

    site = Path(sglang.__file__).parents[1]
    changes = compare(site, site)
    assert {change.state for change in changes} == {"same"}
    total = len(LEDGER) + len(RELIED)
    assert list(report(changes)) == [f"{total} functions: {total} same, 0 changed, 0 gone, 0 new"]
    assert f"{total} are the same there, 0 changed and 0 missing" in outlook(site)


def test_files_and_running_functions_have_one_fingerprint() -> None:
    pytest.importorskip("sglang")
    import sglang

    site = Path(sglang.__file__).parents[1]
    for entry in (*LEDGER, *RELIED):
        found = find(site, entry.target)
        assert found is not None, entry.target
        assert found.fingerprint == entry.fingerprint, entry.target


def test_a_folder_without_sglang_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PatchError, match="no SGLang in"):
        site_of(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path)])
    assert "no SGLang in" in capsys.readouterr().err


def test_doctor_says_what_to_do_about_another_version() -> None:
    pytest.importorskip("sglang")
    code = (
        "import memento_patches.guard as guard\n"
        "guard.SGLANG_VERSION = '0.5.99'\n"
        "from memento_sgl.cli.app import main\n"
        "import sys; sys.argv = ['memento', 'doctor']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    told = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "pip install sglang==0.5.99" in told
    assert "are the same there, 0 changed and 0 missing" in told
    assert "docs/upgrade.md" in told
    assert "not ready to serve" in told
