"""Says what this machine runs: versions, devices, and what does not fit.

  vit-jax doctor

Exit code 0 if nothing is wrong, 2 otherwise.
"""
import importlib.metadata
import sys

from packaging import requirements

from vit_jax import workdir

DISTRIBUTION = 'vit-early-conv'


def main(argv):
  """Runs the command; returns its exit code."""
  del argv
  from vit_jax import devices
  print(f'python {sys.version.split()[0]}')
  problems = []
  for requirement, found in installed():
    verdict = mismatch(requirement, found)
    print(f'{requirement.name} {found or "not installed"}'
          f'{"   <-- " + verdict if verdict else ""}')
    problems += [f'{requirement.name}: {verdict}'] if verdict else []
  print(f'git {workdir.git_revision()}')
  print(devices.summary())
  print(f'NVIDIA GPUs on this machine: {devices.nvidia_gpus()}')
  try:
    devices.check()
  except ValueError as e:
    problems.append(str(e).replace('\n', ' '))
  for problem in problems:
    print('problem: ' + problem)
  print(f'{len(problems)} problem(s)')
  return 2 if problems else 0


def installed():
  """Yields (requirement, installed version or None) of our dependencies."""
  try:
    listed = importlib.metadata.requires(DISTRIBUTION) or ()
  except importlib.metadata.PackageNotFoundError:
    listed = workdir.PACKAGES  # run from its source, uninstalled: no bounds
  for line in listed:
    requirement = requirements.Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({'extra': ''}):
      continue
    try:
      yield requirement, importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
      yield requirement, None


def mismatch(requirement, found):
  """What is wrong with an installed version, or ''."""
  if found is None:
    return f'missing; pip install "{requirement}"'
  if not requirement.specifier.contains(found, prereleases=True):
    return f'outside {requirement.specifier}; pip install "{requirement}"'
  return ''
