"""No command reaches for the network when its model and data are here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Any look-up or connection is written down, and refused as if there were no network.
TRAP = """
import socket, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = arguments[0] if event.startswith("socket.get") else arguments[1]
        if isinstance(address, (str, tuple)) and address not in ("localhost", "127.0.0.1"):
            with open(sys.argv[1], "a") as file:
                file.write(f"{event} {address}\\n")
            raise OSError("no network in this test")

sys.addaudithook(refuse)
"""
PROGRAM = f"""{TRAP}
from remix_cli import main
for command in sys.argv[2].split("|"):
    code = main(command.split(chr(9)))
    assert code == 0, (command, code)
"""


def test_the_trap_is_one(tmp_path: Path) -> None:
    program = f"{TRAP}socket.create_connection(('huggingface.co', 443))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "attempts")], capture_output=True, text=True
    )
    assert "no network in this test" in result.stderr
    assert "huggingface.co" in (tmp_path / "attempts").read_text()


def test_no_command_reaches_for_the_network(workspace: Path, tmp_path: Path) -> None:
    """Without HF_HUB_OFFLINE=1, which all other tests run under."""
    attempts, folder = tmp_path / "attempts", str(tmp_path / "run")
    config = ["--config", str(workspace / "c.yaml"), "--output-dir", folder]
    config += ["--eval-size", "2", "--max-steps", "1"]
    commands = [
        ["validate", *config],
        ["train", *config],
        ["train", *config[:-1], "2", "--resume"],
        ["eval", "--adapter", folder],
        ["generate", "--adapter", folder, "--prompt", "1+2?", "--compare"],
        ["env"],
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    environment["HF_HOME"] = str(tmp_path / "hub")
    arguments = [str(attempts), "|".join("\t".join(command) for command in commands)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment
    )
    assert not attempts.exists(), attempts.read_text()
    assert result.returncode == 0, result.stderr
