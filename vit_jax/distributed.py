"""Several processes as one program: start-up, and a name for who is missing.

`jax.distributed` connects the processes, but ends the program with an abort
(exit code 134) when one is missing or dies, and names it only in some cases.
So each process keeps a sign of life, <workdir>/processes/<id>.json, that it
rewrites all the time. Process 0 watches the others' and they watch its. The
workdir is the one place that all have to share anyway, for the checkpoints;
one that they do not share shows up here, too. Clocks are not compared: a file
is alive if it changes.
"""
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.request

from etils import epath
import jax
import numpy as np
from orbax.checkpoint import multihost

from vit_jax import cluster

FOLDER = 'processes'
PEER_LOST = 69  # sysexits.h: EX_UNAVAILABLE


def check_flags(coordinator, num_processes, process_id, timeout):
  """Raises ValueError unless the flags of `train.py` go together.

  Args:
    coordinator: 'HOST:PORT' or ''.
    num_processes, process_id: int or None.
    timeout: seconds.

  Returns:
    Whether they ask for several processes.
  """
  if timeout < 2:
    raise ValueError(f'--peer_timeout_seconds={timeout} is below 2.\n'
                     'Hosts that start one after the other need 120 or more.')
  given = {'coordinator': coordinator or None, 'num_processes': num_processes,
           'process_id': process_id}
  missing = [f'--{k}' for k, v in given.items() if v is None]
  if len(missing) == 3:
    return False
  if missing:
    raise ValueError(
        f'{" and ".join(missing)} is missing beside the other flags of several '
        'processes.\nGive --coordinator, --num_processes and --process_id, or '
        'none of them.')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(
        f'--coordinator={coordinator} is not HOST:PORT.\nGive the host of '
        'process 0 and a free port on it, such as node0:1234.')
  if num_processes < 1:
    raise ValueError(f'--num_processes={num_processes} is below 1.\n'
                     'Give the number of processes that are started.')
  if not 0 <= process_id < num_processes:
    raise ValueError(
        f'--process_id={process_id} is not in 0 to {num_processes - 1}.\n'
        f'The {num_processes} processes count from 0.')
  return True


def start(workdir, coordinator='', num_processes=None, process_id=None,
          timeout=120):
  """Connects the processes; on TPU VMs of several hosts without being asked.

  Prints who this process is.

  Args:
    workdir: the run's folder, which all processes share; it exists.
    coordinator, num_processes, process_id: see `check_flags`.
    timeout: seconds after which a process that has not come, or whose sign of
      life stands still, is lost.

  Returns:
    Peers, or None if this is the only process.

  Raises:
    ValueError: see `cluster.local_gpus`.
  """
  asked = check_flags(coordinator, num_processes, process_id, timeout)
  if not asked and tpu_hosts() == 1:
    return None
  # JAX aborts without a name, so that ours has to come first.
  timeouts = dict.fromkeys(
      ('initialization_timeout', 'heartbeat_timeout_seconds',
       'shutdown_timeout_seconds'), 2 * timeout)
  if asked:
    peers = Peers(workdir, process_id, num_processes, timeout, coordinator)
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        local_device_ids=cluster.local_gpus(),
        # It would give a Slurm task one GPU, whatever it is to have.
        cluster_detection_method='deactivate', **timeouts)
    peers.connected()
  else:
    # Who we are is known afterwards only.
    jax.distributed.initialize(**timeouts)
    peers = Peers(workdir, jax.process_index(), jax.process_count(), timeout)
  print(f'process {jax.process_index()} of {jax.process_count()}: host '
        f'{socket.gethostname()}, pid {os.getpid()}, '
        f'{jax.local_device_count()} of {jax.device_count()} x '
        f'{jax.devices()[0].device_kind}', flush=True)
  return peers


def tpu_hosts():
  """How many hosts the slices of this TPU VM have; 1 where it is none."""
  platforms = os.environ.get('JAX_PLATFORMS') or 'tpu'
  if 'tpu' not in platforms or importlib.util.find_spec('libtpu') is None:
    return 1
  slices = int(os.environ.get('MEGASCALE_NUM_SLICES') or 1)
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES')  # GKE
  if hosts is None:
    # Where JAX looks, too: the metadata server of Google's machines.
    request = urllib.request.Request(
        'http://metadata.google.internal/computeMetadata/v1/instance/'
        'attributes/worker-network-endpoints',
        headers={'Metadata-Flavor': 'Google'})
    try:
      with urllib.request.urlopen(request, timeout=3) as reply:
        hosts = reply.read().decode()
    except OSError:
      hosts = ''
  return slices * len(hosts.split(','))


def stop_agreed(poll):
  """Whether all processes are to stop at this poll, as one was told to.

  Args:
    poll: 1, 2, 3, ... from the start of this process. All processes ask the
      same number of times. (Numbers of steps would not do: JAX stops at the
      highest number seen plus one, which a resumed run steps over if the
      signal comes before its first step.)
  """
  return multihost.reached_preemption(poll)


def from_first(value):
  """Process 0's bool, on every process."""
  if jax.process_count() == 1:
    return value
  return bool(multihost.broadcast_one_to_all(np.asarray(value)))


def compiled(jitted, *args):
  """Compiles a jitted function, and waits until all processes have.

  Some find it in the compilation cache (which process 0 alone writes) and
  others compile for minutes. On CPU the exchange of data waits 30 s.

  Args:
    jitted: of `jax.jit`, or what this function has returned.
    *args: arrays or their shapes.
  """
  if not hasattr(jitted, 'lower'):
    return jitted
  made = jitted.lower(*args).compile()
  multihost.get_barrier_sync_fn()(key='compiled', timeout_ms=3_600_000)
  return made


class Peers:
  """This process's sign of life, and the watch over the others'."""

  def __init__(self, workdir, process_id, num_processes, timeout,
               coordinator=''):
    """Starts both; see `start` for the arguments."""
    self._folder = epath.Path(workdir) / FOLDER
    self._folder.mkdir(parents=True, exist_ok=True)
    self._id = process_id
    self._timeout = timeout
    self._coordinator = coordinator
    self._period = min(5.0, timeout / 10)
    self._left = threading.Event()
    self._beats = 0
    watched = range(1, num_processes) if process_id == 0 else (0,)
    # id -> (its file, when that changed, whether it did): what is there now is
    # of an earlier launch, or will change.
    now = time.monotonic()
    self._seen = {i: (self._read(i), now, False) for i in watched}
    self._beat()
    self._thread = threading.Thread(
        target=self._watch, name='peers', daemon=True)
    self._thread.start()
    # JAX aborts the others as soon as process 0's connection closes.
    self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)

  def connected(self):
    """All are here, so that their files are of this launch.

    Unless a file system is late: a sign that is of an end is not believed.
    """
    now = time.monotonic()
    for i in self._seen:
      text = self._read(i)
      if text and 'left' not in json.loads(text):
        self._seen[i] = text, now, True

  def leave(self, code):
    """Says that this process ends. Exits, unless all processes do so alike.

    JAX would wait at the exit until the others end, too.

    Args:
      code: its exit code; None for one that all processes arrive at.
    """
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    self._left.set()
    self._thread.join(timeout=2 * self._period)
    self._beat(left=code or 0)
    if code is not None:
      self._exit(code)

  def wait(self):
    """Waits for the name of a lost process, after a failed exchange of data.

    The watch ends the program if it finds one.
    """
    print('error: the exchange of data between the processes failed; looking '
          f'for up to {self._timeout} s which of them is gone',
          file=sys.stderr, flush=True)
    # Process 0 may have to find it first, and to say so.
    self._thread.join(timeout=self._timeout + 5 * self._period)

  def _exit(self, code):
    sys.stdout.flush()
    sys.stderr.flush()
    if self._id == 0 and self._seen:
      # JAX's coordinator: with it the others end, and cannot say why.
      time.sleep(3 * self._period)
    os._exit(code)

  def _beat(self, **note):
    self._beats += 1
    content = {'host': socket.gethostname(), 'pid': os.getpid(),
               'time': time.time(), 'beats': self._beats, **note}
    part = self._folder / f'{self._id}.tmp'
    part.write_text(json.dumps(content))
    part.replace(self._folder / f'{self._id}.json')

  def _read(self, process):
    path = self._folder / f'{process}.json'
    try:
      return path.read_text() if path.exists() else ''
    except FileNotFoundError:
      return ''

  def _watch(self):
    looked = time.monotonic()
    while not self._left.wait(self._period):
      try:
        self._beat()
        now = {i: self._read(i) for i in self._seen}
      except Exception:
        traceback.print_exc()
        continue
      # A file system that is away for a while, by errors or by a long wait, is
      # nobody's death: others could not write, either.
      away = time.monotonic() - looked > 3 * self._period
      looked = time.monotonic()
      for i, text in now.items():
        old, _, alive = self._seen[i]
        if text != old or away:
          self._seen[i] = text, looked, alive or text != old
      lost = list(filter(None, map(self._why_lost, self._seen)))
      if lost and not self._left.is_set():
        self._give_up('; '.join(lost))

  def _why_lost(self, process):
    """One clause, or None for a process that is alive or ended well."""
    text, changed, alive = self._seen[process]
    still = time.monotonic() - changed
    content = json.loads(text) if alive and text else {}
    if 'left' in content:
      # Time for this process to come to its own end, if it has the same fault.
      return content['left'] and still > 2 * self._period and (
          content.get('why')
          or f'{_name(process, content)} ended with exit code '
          f'{content["left"]}')
    if still < self._timeout:
      return None
    if not alive:
      return f'no sign of life of process {process} within {still:.0f} s'
    return f'{_name(process, content)} has been silent for {still:.0f} s'

  def _give_up(self, why):
    print(f'error: {why}.\n  Its own log says more. Then start all processes '
          'again: they resume. (--workdir has to be one folder for all; '
          '--peer_timeout_seconds is how long they wait.)', file=sys.stderr)
    with contextlib.suppress(Exception):  # a file system that is away
      self._beat(left=PEER_LOST, why=why)
    self._exit(PEER_LOST)

  def _abort(self, number):
    """Runs on SIGABRT, in whatever thread aborts; says why where it can."""
    signal_ = ctypes.CDLL(None).signal
    signal_(number, None)  # SIG_DFL: what follows may not come here again
    for process in self._seen if self._id else ():
      text, _, alive = self._seen[process]
      new = self._read(process)
      content = json.loads(new) if alive or new != text else {}
      if content.get('left'):
        self._give_up(content.get('why') or (
            f'{_name(process, content)} ended with exit code '
            f'{content["left"]}'))
      elif not self._coordinator_answers():
        # It was here, so what its file says is of this launch.
        name = _name(process, json.loads(new or '{}'))
        self._give_up(f'{name} is gone: nothing answers at '
                      f'{self._coordinator}')

  def _coordinator_answers(self):
    if not self._coordinator:
      return True
    host, _, port = self._coordinator.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
    except OSError:
      return False
    return True


def _name(process, content):
  if not content:
    return f'process {process}'
  return f'process {process} (host {content["host"]}, pid {content["pid"]})'
