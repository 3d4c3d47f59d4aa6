"""Programs are kept in the user's cache folder, or where the user says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

CODE = """
import jax, jax.numpy as jnp
from research.programs import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
"""


@pytest.mark.parametrize(
    "variable, folder", [("RESEARCH_CACHE", "programs"), ("JAX_COMPILATION_CACHE_DIR", ".")], ids=str
)
def test_programs_are_kept(variable: str, folder: str, tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"RESEARCH_CACHE": str(tmp_path / "unused"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {variable: str(tmp_path / "used")}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)
    assert [path for path in (tmp_path / "used" / folder).iterdir() if path.is_file()]
    assert not (tmp_path / "unused").exists()
