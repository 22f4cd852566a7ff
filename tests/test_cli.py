import pytest

from hf_transfer_ext import __version__
from hf_transfer_ext.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in COMMANDS) and out.endswith(f"{__version__}\n")


def test_a_typo_is_answered(capsys):
    assert main(["mrege"]) == 2
    assert "Unknown command 'mrege'. Did you mean 'merge'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out.lower()


def test_bad_input_is_one_line_and_status_two(tmp_path, capsys):
    assert main(["merge", str(tmp_path / "absent.yml"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-transfer-ext merge: ") and "absent.yml" in error and error.count("\n") == 1
