"""pyproject.toml says what is needed, constraints.txt which versions; nothing else may say either."""
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INSTALLED_BY_MAKE = ("book", "test", "minilm")


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def pip_part():
    return next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))


def test_conda_names_only_a_python_that_the_package_allows_and_pip():
    names = [entry for entry in CONDA["dependencies"] if isinstance(entry, str)]
    assert [name.split("=")[0] for name in names] == ["python", "pip"]
    assert names[0].split("=")[1] in SpecifierSet(PROJECT["requires-python"])


def test_conda_takes_everything_else_from_pyproject_and_the_constraints():
    index, constraints, package = pip_part()
    assert index == f"--extra-index-url {CPU_INDEX}"
    assert constraints == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", package)[1].split(",")
    assert set(INSTALLED_BY_MAKE) <= set(extras) <= set(PROJECT["optional-dependencies"])


def test_make_uses_the_same_index_constraints_and_extras():
    makefile = (ROOT / "Makefile").read_text()
    assert f"CPU_INDEX := {CPU_INDEX}\n" in makefile
    assert "-c constraints.txt" in makefile
    assert f"'.[{','.join(INSTALLED_BY_MAKE)}]'" in makefile


@pytest.mark.parametrize("extra", ["", *INSTALLED_BY_MAKE])
def test_every_requirement_has_a_pin_that_it_allows(extra):
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pinned = pins()
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} against {requirement}"


def test_torch_is_pinned_without_a_build_so_that_cpu_and_cuda_both_match():
    assert pins()["torch"] == "2.13.0"
