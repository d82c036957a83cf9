"""Python and the packages: their versions, and whether torch and DeepSpeed import."""

from __future__ import annotations

import platform
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from speft_ds.config.load_recipe import ROOT
from speft_ds.doctor.check import Check, text_of

PIP_INSTALL = f"{sys.executable} -m pip install"


def check_python(wanted: str | None = None) -> list[Check]:
    """This interpreter against the range of pyproject.toml, or of `wanted`."""
    wanted = wanted or _project().get("requires-python", "")
    found = f"{platform.python_version()}, {sys.executable}"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return [Check("python", "ok", found)]
    return [Check("python", "problem", f"{found}: not in {wanted}", f"make a .venv with a Python {wanted}")]


def check_packages(
    requirements: list[str] | None = None, tested: dict[str, str] | None = None
) -> list[Check]:
    """Installed packages against their ranges, without importing them.

    Args:
        requirements: like `torch>=2.8`; default: those of this package.
        tested: versions that CI runs, by canonical name; default: those of constraints.txt.
    """
    # The metadata of an editable install is as old as the last `pip install`.
    requirements = requirements or _project().get("dependencies") or metadata.requires("speft_ds") or []
    tested = _tested_versions() if tested is None else tested
    wanted = [Requirement(text) for text in requirements]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [_check_package(one, tested.get(canonicalize_name(one.name))) for one in wanted]


def _check_package(wanted: Requirement, tested: str | None) -> Check:
    fits = tested is not None and wanted.specifier.contains(tested, prereleases=True)
    fix = f"{PIP_INSTALL} '{wanted.name}{f'=={tested}' if fits else wanted.specifier}'"
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Check(wanted.name, "problem", f"not installed; needed: {wanted.specifier or 'any'}", fix)
    if not wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, "problem", f"{found} is not in {wanted.specifier}", fix)
    if tested is None or Version(Version(found).public) == Version(tested):
        return Check(wanted.name, "ok", found)
    return Check(wanted.name, "ok", f"{found}; not the tested version, {tested}")


def check_torch(facts: dict) -> list[Check]:
    """That torch imports, and what it was built for."""
    if "torch" not in facts:
        fix = f"install it again: {reinstall('torch')}"
        return [Check("torch build", "problem", f"torch does not import: {facts.get('error')}", fix)]
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "the CPU"
    return [Check("torch build", "ok", f"{facts['torch']}, built for {build}")]


def check_deepspeed(facts: dict) -> list[Check]:
    """That DeepSpeed imports, and what it would run on."""
    if "accelerator" in facts:
        what = f"imports; accelerator {facts['accelerator']}, collectives over {facts['backend']}"
        return [Check("DeepSpeed", "ok", what)]
    if "torch" not in facts:
        return [Check("DeepSpeed", "skipped", "torch does not import")]
    fix = f"DS_BUILD_OPS=0 {reinstall('deepspeed', '--no-deps')}"
    return [Check("DeepSpeed", "problem", f"does not import: {facts.get('error')}", fix)]


def reinstall(package: str, *flags: str) -> str:
    """The command that installs a package again, in its tested version."""
    version = _tested_versions().get(canonicalize_name(package))
    pinned = f"{package}=={version}" if version else package
    return " ".join([PIP_INSTALL, "--force-reinstall", *flags, pinned])


def _tested_versions() -> dict[str, str]:
    lines = text_of(ROOT / "constraints.txt").splitlines()
    pairs = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, _, version in pairs}


def _project() -> dict:
    return tomllib.loads(text_of(ROOT / "pyproject.toml")).get("project", {})
