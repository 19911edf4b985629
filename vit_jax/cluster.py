"""Which processes form one run, where Slurm or Kubernetes started them.

JAX detects both, too, but not so that it can be relied on: it takes the tasks
of the job in place of those of the step (a single-task srun waits for others
that never come), gives every Slurm task the one GPU of its local number (one
task a node then trains on one of eight, and with --gpus-per-task=1 most find
none), and asks the Kubernetes API, for which a pod needs a role. So JAX's own
detection is turned off wherever this module answers.
"""
import os
import re
import socket
from typing import NamedTuple

from vit_jax import devices


class Processes(NamedTuple):
  """What `jax.distributed.initialize` needs, but for its timeouts.

  Attributes:
    coordinator: 'HOST:PORT' of process 0; '' if nobody said.
    num_processes, process_id: int, or None if nobody said.
    source: who said so, for a line of the log; '' for the flags.
  """
  coordinator: str = ''
  num_processes: int | None = None
  process_id: int | None = None
  source: str = ''


def find(coordinator='', num_processes=None, process_id=None, environ=None):
  """Returns the processes that the flags or else the environment speak of.

  Flags go first: with one of them nothing is detected. The exception is
  --num_processes alone in a Kubernetes indexed Job, which knows all but that.

  Args:
    coordinator, num_processes, process_id: the flags of `train.py`.
    environ: defaults to `os.environ`.

  Returns:
    `Processes`; empty for a single process.

  Raises:
    ValueError: a variable that is missing or no number, or a pod whose host
      has no name that the others could find.
  """
  environ = os.environ if environ is None else environ
  index = environ.get('JOB_COMPLETION_INDEX')
  if index and num_processes is not None and not coordinator and (
      process_id is None):
    return _of_kubernetes(environ, num_processes)
  if coordinator or num_processes is not None or process_id is not None:
    return Processes(coordinator, num_processes, process_id)
  # Set by srun in the tasks that it starts; the shells of sbatch and salloc
  # have SLURM_NTASKS and no step, or a step of one task.
  if environ.get('SLURM_STEP_ID') and _number(
      environ, 'SLURM_STEP_NUM_TASKS', 1) > 1:
    return _of_slurm(environ)
  return Processes()


def _of_slurm(environ):
  host = _first_host(_text(environ, 'SLURM_STEP_NODELIST'))
  # One port for each step, above the range from which Linux hands out ports.
  port = 61440 + (_number(environ, 'SLURM_JOB_ID')
                  + _number(environ, 'SLURM_STEP_ID')) % 4096
  count = _number(environ, 'SLURM_STEP_NUM_TASKS')
  process = _number(environ, 'SLURM_PROCID')
  return Processes(
      f'{host}:{port}', count, process,
      f'Slurm step {environ["SLURM_JOB_ID"]}.{environ["SLURM_STEP_ID"]}: task '
      f'{process} of {count}, coordinator {host}:{port}')


def _of_kubernetes(environ, num_processes):
  process = _number(environ, 'JOB_COMPLETION_INDEX')
  pod, dot, domain = socket.getfqdn().partition('.')
  if not dot or not pod.endswith(f'-{process}'):
    raise ValueError(
        f'This pod is {pod!r}, with no name under which the others find it.\n'
        'Give the Job a headless Service: spec.template.spec.subdomain; see '
        'the README.')
  host = f'{pod.removesuffix(str(process))}0.{domain}'
  return Processes(
      f'{host}:61440', num_processes, process,
      f'Kubernetes indexed Job: pod {process} of {num_processes}, coordinator '
      f'{host}:61440')


def local_gpus(environ=None):
  """Numbers of the GPUs that this process is to take, of those it sees.

  Returns:
    A list of int, or None: all that it sees. That is right for one process a
    node, and where Slurm has handed each task its own (--gpus-per-task,
    --gpu-bind). Tasks of one node that all see the same GPUs share them out
    evenly.

  Raises:
    ValueError: they do not divide.
  """
  environ = os.environ if environ is None else environ
  if not environ.get('SLURM_STEP_ID') or environ.get('SLURM_GPUS_PER_TASK'):
    return None
  tasks = _tasks_on_node(environ)
  visible = environ.get('CUDA_VISIBLE_DEVICES')
  gpus = (devices.nvidia_gpus() if visible is None
          else len(list(filter(None, visible.split(',')))))
  if tasks == 1 or gpus <= 1:
    return None
  if gpus % tasks:
    raise ValueError(
        f'{tasks} Slurm tasks of this node see {gpus} GPUs and cannot share '
        'them evenly.\nStart as many tasks as GPUs, or one a node '
        '(--ntasks-per-node).')
  each, local = gpus // tasks, _number(environ, 'SLURM_LOCALID')
  return list(range(local * each, (local + 1) * each))


def _tasks_on_node(environ):
  """Tasks of this step on this node, from a text such as '8(x2),3'."""
  counts = []
  for part in environ.get('SLURM_STEP_TASKS_PER_NODE', '1').split(','):
    match = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part)
    if not match:
      raise ValueError(f'SLURM_STEP_TASKS_PER_NODE has {part!r}, which is no '
                       'number of tasks.\nGive --coordinator, '
                       '--num_processes and --process_id.')
    counts += [int(match[1])] * int(match[2] or 1)
  node = _number(environ, 'SLURM_NODEID', 0)
  return counts[node] if node < len(counts) else counts[-1]


def _first_host(nodes):
  """'node[007-015,20],b' -> 'node007'."""
  match = re.match(r'([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?', nodes)
  return ''.join(filter(None, match.groups())) if match else nodes


def _text(environ, name):
  if not environ.get(name):
    raise ValueError(f'{name} is not set beside the other variables of Slurm.\n'
                     'Start with srun, or give --coordinator, --num_processes '
                     'and --process_id.')
  return environ[name]


def _number(environ, name, default=None):
  text = (environ.get(name) or str(default) if default is not None
          else _text(environ, name))
  if not text.isdecimal():
    raise ValueError(f'{name}={text} is no number.\nGive --coordinator, '
                     '--num_processes and --process_id.')
  return int(text)
